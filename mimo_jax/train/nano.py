"""The recipe of mimo-nano: pre-training, MXFP4-aware training, the drafter; each stage one command.

    python -m mimo_jax.train.corpus --out .corpus
    python -m mimo_jax.train.data --corpus .corpus --out checkpoints/mimo-nano
    python -m mimo_jax.train.nano target --out runs/nano --steps 3600
    python -m mimo_jax.train.nano drafter --target runs/nano --out runs/nano --steps 5500
    python -m mimo_jax.train.nano package --target runs/nano --out checkpoints/mimo-nano

A stage writes its arrays as numbered .npz parts of at most 15 MiB, with a JSON of its figures.
"""

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.checkpoint import store
from mimo_jax.checkpoint.flat import flatten, nest, read_parts, unflatten, write_parts
from mimo_jax.config import DrafterConfig, ModelConfig
from mimo_jax.model.mimo import MiMo
from mimo_jax.presets import drafter_preset, preset
from mimo_jax.quant.mxfp4 import quantize
from mimo_jax.text.tokenizer import Tokenizer
from mimo_jax.train.data import Batches, heldout_rows, load_tokens
from mimo_jax.train.distill import generate_rows
from mimo_jax.train.drafter import init_draft_state, make_draft_step
from mimo_jax.train.optimizer import make_optimizer, schedule
from mimo_jax.train.pretrain import (
    compute_params,
    init_train_state,
    make_evaluate,
    make_step,
    train,
)
from pallas_kernels.mxfp4 import decode

LENGTH = 2048
"""Tokens of a row."""

DECAY = 0.35
"""Share of the steps in which the learning rate falls; quantization-aware training is these."""

QAT_RULE = "mse"
"""How MXFP4-aware training and packing choose a block's shared exponent."""


def config(tokenizer: Tokenizer) -> ModelConfig:
    """The preset with the tokenizer's end-of-text id."""
    return dataclasses.replace(preset("mimo-nano"), eos_token_ids=tuple(tokenizer.eos_ids))


def draft_config(tokenizer: Tokenizer) -> DrafterConfig:
    """The drafter's preset with the tokenizer's mask id."""
    return dataclasses.replace(drafter_preset("mimo-nano"), mask_token_id=tokenizer.mask_id)


def train_target(options) -> None:
    """Trains to the plateau's end, and from there on twice: MXFP4-aware and in bfloat16."""
    tokenizer = Tokenizer.from_file(options.tokenizer)
    shapes = config(tokenizer)
    log = Log(options.out / "target.jsonl")
    tokens = load_tokens(options.corpus / "train.txt.xz", tokenizer)
    heldout = heldout_rows(options.tokenizer.parent / "heldout.txt.xz", tokenizer, LENGTH)[0]
    heldout = heldout[: options.heldout_rows].astype(np.int32)
    heldout_bytes = len(tokenizer.decode_bytes(heldout[:, 1:].ravel().tolist()))
    batches = Batches(tokens, options.batch, LENGTH, seed=options.seed)
    log(0, {"train_tokens": len(tokens), "heldout_rows": len(heldout)})

    steps = options.steps
    decay = round(steps * DECAY)
    optimizer = make_optimizer(schedule(options.peak, steps, options.warmup, decay), 0.1)
    graph, state = init_train_state(shapes, options.seed, optimizer)
    rules = {"qat": QAT_RULE, "bfloat16": None}
    step = {
        name: make_step(graph, optimizer, rule, options.balance) for name, rule in rules.items()
    }
    plateau = steps - decay
    state = train(step["bfloat16"], state, map(batches.batch_at, range(plateau)), plateau, log)
    results = {"steps": steps, "decay": decay, "trained_tokens": steps * options.batch * LENGTH}
    forks = {"qat": jax.tree.map(jnp.copy, state), "bfloat16": state}
    del state
    ended = {}
    for name in rules:
        stream = map(batches.batch_at, range(plateau, steps))
        named = partial(_log_branch, log, name)
        ended[name] = train(step[name], forks.pop(name), stream, decay, named).params
        if name == "qat":
            write_parts(options.out, "target", pack_experts(ended[name]))
    for name, rule in (
        ("qat", QAT_RULE), ("bfloat16", None), ("bfloat16", "floor"), ("bfloat16", "mse")
    ):  # fmt: skip
        bits = (
            make_evaluate(graph, rule)(ended[name], heldout) * heldout[:, 1:].size / heldout_bytes
        )
        results[f"bits_per_byte {name} {rule or 'unquantized'}"] = bits
        log(steps, results)
    _write_results(options, "target", results)


def train_drafter(options) -> None:
    """Trains the drafter on the packed target's features, on the corpus and on its own answers."""
    tokenizer = Tokenizer.from_file(options.tokenizer)
    shapes, draft_shapes = config(tokenizer), draft_config(tokenizer)
    log = Log(options.out / "drafter.jsonl")
    tokens = load_tokens(options.corpus / "train.txt.xz", tokenizer)
    corpus = Batches(tokens, options.batch, LENGTH, seed=options.seed + 1)
    graph, params = dequantized_target(shapes, read_parts(options.target, "target"))
    rows = generate_rows(shapes, params, tokens, options.own_rows, options.seed, log)
    own = Batches(rows.reshape(-1), 4 * options.batch, rows.shape[1], seed=options.seed)

    def batch_at(index: int) -> np.ndarray:
        return own.batch_at(index // 2) if index % 2 else corpus.batch_at(index // 2)

    steps = options.steps
    optimizer = make_optimizer(
        schedule(options.peak, steps, options.warmup, round(steps * 0.5)), 0.1
    )
    draft_graph, state = init_draft_state(
        draft_shapes, params["embedding"][...], options.seed, optimizer
    )
    anchors = options.anchors
    step = {
        length: make_draft_step(
            graph, draft_graph, draft_shapes, optimizer,
            anchors=anchors * length // LENGTH, decay=4.0, seed=options.seed,
        )
        for length in (LENGTH, rows.shape[1])
    }  # fmt: skip

    def one_step(state, tokens):
        return step[tokens.shape[1]](state, params, tokens)

    state = train(one_step, state, map(batch_at, range(steps)), steps, log)
    trained = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    write_parts(options.out, "drafter", flatten(trained))
    _write_results(options, "drafter", {"steps": steps})


def package(options) -> None:
    """Puts target, drafter and tokenizer together as a checkpoint; its held-out files stay."""
    tokenizer = Tokenizer.from_file(options.tokenizer)
    notes = {
        stage: json.loads((options.target / f"{stage}.json").read_text())
        for stage in ("target", "drafter")
    }
    store.save(
        options.out,
        config(tokenizer),
        nest(read_parts(options.target, "target")),
        draft_config(tokenizer),
        nest(read_parts(options.target, "drafter")),
        tokenizer=options.tokenizer,
        notes=notes,
        overwrite=True,
    )


def pack_experts(params: nnx.State) -> dict[str, np.ndarray]:
    """The checkpoint's tree: bfloat16 but for the router, experts as MXFP4 codes and scales."""
    model_params = compute_params(params, None)
    arrays = flatten(model_params)
    masters = flatten(params)
    for name in [name for name in arrays if name.endswith(("experts.gate_up", "experts.down"))]:
        codes, scales = quantize(jnp.asarray(masters[name]), QAT_RULE)
        arrays[name], arrays[f"{name}_scale"] = np.asarray(codes), np.asarray(scales)
    return arrays


def dequantized_target(shapes: ModelConfig, arrays: dict) -> tuple[nnx.GraphDef, nnx.State]:
    """The target as decoding uses it, its experts decoded to bfloat16 (exactly)."""
    dense = {name: value for name, value in arrays.items() if not name.endswith("_scale")}
    for name in [name for name in arrays if name.endswith("_scale")]:
        codes = name.removesuffix("_scale")
        dense[codes] = decode(jnp.asarray(arrays[codes]), jnp.asarray(arrays[name]), jnp.bfloat16)
    model = nnx.eval_shape(lambda: MiMo(shapes, nnx.Rngs(0), packed=False))
    graph, abstract = nnx.split(model)
    return graph, jax.tree.map(jnp.asarray, unflatten(abstract, dense))


class Log:
    """Prints measurements, and appends them to a JSONL file."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w")
        self.start = time.perf_counter()

    def __call__(self, step: int, values: dict) -> None:
        """Logs the values of a step."""
        record = {"step": step, "seconds": round(time.perf_counter() - self.start, 1), **values}
        print(json.dumps(record), flush=True)
        print(json.dumps(record), file=self.file, flush=True)


def _log_branch(log: Log, branch: str, step: int, values: dict) -> None:
    """Logs values of one of two runs whose steps have the same numbers."""
    log(step, {"branch": branch, **values})


def _write_results(options, stage: str, results: dict) -> None:
    """Writes what was measured and the options that it was measured with."""
    kinds = (int, float)
    given = {name: value for name, value in vars(options).items() if isinstance(value, kinds)}
    device = jax.devices()[0].device_kind
    record = {"options": given, "device": device, "jax": jax.__version__, **results}
    (options.out / f"{stage}.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Parses a stage and its options, and runs it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    stages = parser.add_subparsers(required=True)
    for name, run in (("target", train_target), ("drafter", train_drafter), ("package", package)):
        stage = stages.add_parser(name)
        stage.set_defaults(run=run)
        stage.add_argument("--corpus", type=Path, default=Path(".corpus"))
        stage.add_argument("--out", type=Path, required=True)
        stage.add_argument(
            "--tokenizer", type=Path, default=Path("checkpoints/mimo-nano/tokenizer.json")
        )
        stage.add_argument("--seed", type=int, default=0)
        stage.add_argument("--batch", type=int, default=32, help="sequences of 2048 tokens a step")
        stage.add_argument("--peak", type=float, default=3e-3, help="the largest learning rate")
        stage.add_argument("--warmup", type=int, default=100, help="steps")
        stage.add_argument("--steps", type=int, default=3600)
        stage.add_argument("--balance", type=float, default=1e-3, help="router bias a step")
        stage.add_argument(
            "--heldout-rows", type=int, default=128, help="target: of 2048 tokens, a multiple of 16"
        )
        stage.add_argument("--target", type=Path, help="drafter: where the target stage wrote")
        stage.add_argument("--anchors", type=int, default=128, help="drafter: blocks of a sequence")
        stage.add_argument(
            "--own-rows", type=int, default=24576, help="drafter: self-distilled rows"
        )
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
