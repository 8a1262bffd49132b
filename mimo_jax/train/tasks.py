"""The three trainings: `train(kind, config)` for a target, an MXFP4-aware target or a drafter."""

import json
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.checkpoint import store
from mimo_jax.checkpoint.manifest import write_atomically
from mimo_jax.compilation import use_compilation_cache
from mimo_jax.config import ModelConfig
from mimo_jax.decode.program import Plan, make_plan
from mimo_jax.errors import MimoError
from mimo_jax.model.mimo import MiMo
from mimo_jax.sharding import make_mesh
from mimo_jax.text.tokenizer import Tokenizer
from mimo_jax.train.config import TrainConfig
from mimo_jax.train.distill import Answers, prepare_answers, read_answers
from mimo_jax.train.drafter import (
    DraftRecipe,
    abstract_drafter,
    init_drafter,
    make_draft_evaluate,
    make_draft_step,
)
from mimo_jax.train.export import save_target, save_with_drafter, target_arrays
from mimo_jax.train.flops import drafter_flops, target_flops
from mimo_jax.train.loader import Loader
from mimo_jax.train.optimizer import make_optimizer, make_schedule
from mimo_jax.train.placing import Placing
from mimo_jax.train.pretrain import (
    Recipe,
    abstract_target,
    init_params,
    make_evaluate,
    make_quantization_error,
    make_step,
    start_state,
)
from mimo_jax.train.run import Result, Task, compute_dtype, open_run, run
from mimo_jax.train.sources import Rows, Tokens, prepare
from mimo_jax.train.start import (
    CHECKPOINT,
    DATA,
    Start,
    drafter_shapes,
    load_target,
    read_recipe,
    resolve,
)
from mimo_jax.train.steps import Steps
from pallas_kernels.sequence_attention import TILE

KINDS = ("target", "qat", "drafter")


def train(kind: str, config: TrainConfig) -> Result:
    """Trains; goes on where the run's folder stands.

    Args:
      kind: "target", "qat" (MXFP4-aware, ends in packed experts) or "drafter" (of a frozen target).
      config: of `load_config`.

    Raises:
      MimoError: if something does not fit, training stops, or a checkpoint cannot be written.
    """
    if kind not in KINDS:
        raise MimoError(f"kind={kind!r} is not allowed: it must be one of {KINDS}.")
    out = open_run(config, kind)
    use_compilation_cache()
    placing = Placing(
        make_mesh(config.run.devices or None), config.run.batch, config.run.accumulate
    )
    _check_attention(config, placing)
    dtype = compute_dtype(config.run.dtype)
    build = drafter_task if kind == "drafter" else target_task
    task = build(config, out, placing, dtype, kind)
    return run(task, config, placing, dtype)


def _check_attention(config: TrainConfig, placing: Placing) -> None:
    """Refuses the kernels where they cannot run.

    Raises:
      MimoError: without a GPU, on more than one, or for rows that they do not take.
    """
    if config.run.attention == "blocks":
        return
    platform = placing.mesh.devices.flat[0].platform
    if platform != "gpu" or placing.devices > 1:
        raise MimoError(
            f"run.attention={config.run.attention!r} is not allowed on {placing.devices} "
            f"{platform} device(s): it runs on one GPU. Use 'blocks'."
        )
    if config.data.length % TILE:
        raise MimoError(
            f"data.length={config.data.length} is not allowed with run.attention="
            f"{config.run.attention!r}: it must be a multiple of {TILE}."
        )


def target_task(
    config: TrainConfig, out: Path, placing: Placing, dtype: Any, kind: str = "target"
) -> Task:
    """Pre-training, or with kind "qat" training with the rounding of MXFP4."""
    start = resolve(config, masters=True)
    write_atomically(out / store.CONFIG, _json(start.config.to_dict()))
    rows = _rows(config, start, out)
    rule = config.qat.rule if kind == "qat" else None
    optimizer, learning_rate = _optimizer(config)
    graph, abstract = abstract_target(start.config)
    shapes = _target_shapes(start, config)
    placed = placing.state(shapes, abstract)
    layout = jax.tree.flatten(placed)
    layout = tuple(layout[0]), layout[1]
    steps = {
        used: _target_step(graph, optimizer, _recipe(config, used, dtype), layout, placing.whole)
        for used in {None, rule}
    }
    begin = round(config.qat.begin * config.run.steps)

    def step(state, batch, number):
        return steps[rule if number >= begin else None](state, batch)

    def init():
        if start.checkpoint is None and start.run is None:
            return _random_state(start.config, optimizer, layout)(jnp.int32(config.run.seed))
        params = _masters(start, placing, abstract)
        return jax.jit(lambda p: start_state(p, optimizer), out_shardings=placed)(params)

    def finish(state) -> Path:
        arrays = target_arrays(state.params, rule, dtype)
        notes = {"trained": kind, "steps": int(state.step)}
        return save_target(out / CHECKPOINT, start.config, arrays, start.tokenizer, notes)

    return Task(
        kind=kind,
        init=init,
        abstract=placing.abstract(shapes, placed),
        step=step,
        loader=Loader([(rows, config.run.batch)], config.data.seed),
        learning_rate=learning_rate,
        flops=target_flops(start.config, config.run.batch, config.data.length),
        evaluate=_target_evaluation(config, start, out, placing, graph, dtype, rule),
        finish=finish,
    )


@lru_cache(maxsize=8)
def _target_step(graph, optimizer, recipe: Recipe, layout: tuple, whole: Any) -> Callable:
    """The step; one for all runs of the same settings, so that it is compiled once for them.

    Args:
      graph: of the target.
      optimizer: of `make_optimizer`.
      recipe: how it computes.
      layout: the state's NamedShardings, flattened: leaves and structure.
      whole: the metrics' NamedSharding.
    """
    placed = jax.tree.unflatten(layout[1], layout[0])
    return make_step(graph, optimizer, recipe, out_shardings=(placed, whole))


@lru_cache(maxsize=8)
def _random_state(config: ModelConfig, optimizer, layout: tuple) -> Callable:
    """The jitted `first(seed)`: a state with random weights."""

    def first(seed):
        return start_state(init_params(config, seed), optimizer)

    return jax.jit(first, out_shardings=jax.tree.unflatten(layout[1], layout[0]))


def drafter_task(
    config: TrainConfig, out: Path, placing: Placing, dtype: Any, kind: str = "drafter"
) -> Task:
    """A DFlash drafter on the features of the frozen target in `model.start`."""
    if not config.model.start:
        raise MimoError(
            "model.start is empty: name the target that the drafter is for, --target DIR."
        )
    start = resolve(config, masters=False)
    tokenizer = Tokenizer.from_file(start.tokenizer)
    shapes = drafter_shapes(config, start.config, tokenizer)
    write_atomically(out / store.CONFIG, _json(start.config.to_dict()))
    write_atomically(out / store.DRAFTER, _json(shapes.to_dict()))
    kinds = _answers(config, start, out, placing, dtype, _tokens(config, start, out), tokenizer)
    optimizer, learning_rate = _optimizer(config)
    target_graph, target = _frozen(start, placing, dtype)
    graph, abstract = abstract_drafter(shapes)
    embedding = target["embedding"][...]

    def first(embedding):
        return start_state(init_drafter(shapes, embedding, config.run.seed), optimizer)

    abstract_state = jax.eval_shape(first, embedding)
    placed = placing.state(abstract_state, abstract)
    recipe = _draft_recipe(config, dtype)
    draft_step = make_draft_step(
        target_graph, graph, shapes, optimizer, recipe, config.run.seed,
        out_shardings=(placed, placing.whole),
    )  # fmt: skip

    def finish(state) -> Path:
        notes = {
            "trained": kind,
            "steps": int(state.step),
            "target": start.checkpoint.manifest.notes,
        }
        return save_with_drafter(
            out / CHECKPOINT, start.checkpoint, shapes, state.params, dtype, start.tokenizer, notes
        )

    length = config.data.length
    anchors = max(1, recipe.anchors * length // 1024)
    return Task(
        kind=kind,
        init=lambda: jax.jit(first, out_shardings=placed)(embedding),
        abstract=placing.abstract(abstract_state, placed),
        step=lambda state, batch, number: draft_step(state, target, batch),
        loader=Loader(kinds, config.data.seed),
        learning_rate=learning_rate,
        flops=drafter_flops(shapes, start.config, config.run.batch, length, anchors),
        evaluate=_draft_evaluation(
            config, start, out, placing, (target_graph, target), graph, shapes, recipe
        ),
        finish=finish,
    )


def _optimizer(config: TrainConfig) -> tuple[Any, Callable]:
    learning_rate = make_schedule(config.schedule, config.optimizer.lr, config.run.steps)
    return make_optimizer(learning_rate, config.optimizer), learning_rate


def _recipe(config: TrainConfig, rule: str | None, dtype: Any) -> Recipe:
    return Recipe(
        rule=rule,
        dtype=dtype,
        balance=config.experts.balance,
        capacity=config.experts.capacity,
        accumulate=config.run.accumulate,
        remat=config.run.remat,
        chunk=config.run.loss_chunk,
        attention=config.run.attention,
    )


def _draft_recipe(config: TrainConfig, dtype: Any) -> DraftRecipe:
    section = config.drafter
    names = ("weighting", "gamma", "alpha", "loss", "ce_share", "anchors", "far")
    return DraftRecipe(
        dtype=dtype,
        accumulate=config.run.accumulate,
        chunk=config.run.loss_chunk,
        attention=config.run.attention,
        **{name: getattr(section, name) for name in names},
    )


def _target_shapes(start: Start, config: TrainConfig) -> Any:
    """The training state's shapes."""
    optimizer, _ = _optimizer(config)
    return jax.eval_shape(lambda: start_state(init_params(start.config, 0), optimizer))


def _masters(start: Start, placing: Placing, abstract: nnx.State) -> nnx.State:
    """Float32 weights of a checkpoint, or of the newest step of a run."""
    if start.run is None:
        return load_target(start, abstract, placing.params(abstract))
    shapes = _target_shapes(start, read_recipe(start.run))
    placed = placing.state(shapes, abstract)
    state, _ = Steps(start.run).restore(placing.abstract(shapes, placed))
    return state.params


def _frozen(start: Start, placing: Placing, dtype: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """The target as a drafter's training computes with it."""
    model = nnx.eval_shape(lambda: MiMo(start.config, nnx.Rngs(0), packed=False, dtype=dtype))
    graph, abstract = nnx.split(model)
    return graph, load_target(start, abstract, placing.params(abstract))


def _tokens(config: TrainConfig, start: Start, out: Path) -> Tokens:
    if not config.data.files:
        raise MimoError("data.files is empty: name the text to train on, --data FILE.")
    return prepare(config.data.files, start.tokenizer, out / DATA, "files")


def _rows(config: TrainConfig, start: Start, out: Path) -> Rows:
    return _tokens(config, start, out).rows(config.data.length)


def _answers(
    config: TrainConfig,
    start: Start,
    out: Path,
    placing: Placing,
    dtype: Any,
    tokens: Tokens,
    tokenizer: Tokenizer,
) -> list[tuple[Rows, int]]:
    """The kinds of rows that a drafter is trained on: data, the target's own answers, or both."""
    section, kinds = config.drafter, []
    if section.answers != "own":
        kinds.append((tokens.rows(config.data.length), config.run.batch))
    if section.answers == "data":
        return kinds
    how = Answers(
        rows=section.own_rows,
        length=section.own_length,
        prompt=section.own_prompt,
        batch=section.own_batch,
        greedy=section.greedy,
        coldest=section.coldest,
        hottest=section.hottest,
        seed=config.data.seed,
    )
    if section.own_from:
        own = read_answers(_other_run(config), how)
    else:
        plan = _decoding_plan(start, placing, dtype)
        params = load_target(start, plan.params[0], plan.param_shardings[0])
        own = prepare_answers(out / DATA, plan, params, tokens, how, tokenizer.end_of_text_id, _say)
        for leaf in jax.tree.leaves(params):
            leaf.delete()
    # As many tokens as in a batch of data, about; the devices can share them too, however many.
    batch = config.run.batch * max(1, config.data.length // section.own_length)
    kinds.append((own.rows(section.own_length), batch))
    return kinds


def _other_run(config: TrainConfig) -> Path:
    """The data of the run in drafter.own_from.

    Raises:
      MimoError: if it is a drafter's for another target.
    """
    folder = Path(config.drafter.own_from)
    target = read_recipe(folder).model.start
    if target != config.model.start:
        raise MimoError(
            f"drafter.own_from={folder} has answers of the target {target or 'of its own'}, and "
            f"model.start is {config.model.start}: leave it out, and they are made."
        )
    return folder / DATA


def _decoding_plan(start: Start, placing: Placing, dtype: Any) -> Plan:
    """Of the loop that decoding runs, on as many of the devices as can share the heads."""
    devices = list(placing.mesh.devices.flat)
    for count in range(len(devices), 0, -1):
        try:
            plan = make_plan(
                start.config, None, make_mesh(devices[:count]), packed=False, dtype=dtype
            )
        except MimoError:
            if count == 1:
                raise
        else:
            break
    if count < len(devices):
        _say(f"Answers are generated on {count} of {len(devices)} devices, as heads are shared.")
    return plan


def _heldout(config: TrainConfig, start: Start, out: Path) -> Rows | None:
    if not config.data.heldout:
        return None
    rows = prepare(config.data.heldout, start.tokenizer, out / DATA, "heldout")
    rows = rows.rows(config.data.length)
    if not len(rows):
        raise MimoError(f"data.heldout has not one row of data.length={config.data.length} tokens.")
    return rows


def batches_of(rows: Rows, count: int, batch: int, placing: Placing):
    """The first `count` rows in batches; a last one is filled up with rows that do not count."""
    count = min(count, len(rows))
    for first in range(0, count, batch):
        chosen = [rows[index] for index in range(first, min(first + batch, count))]
        empty = {"tokens": chosen[0]["tokens"], "trained": np.zeros(rows.length, bool)}
        chosen += [empty] * (batch - len(chosen))
        yield placing.batch({name: np.stack([row[name] for row in chosen]) for name in empty})


def _target_evaluation(config, start, out, placing, graph, dtype, rule) -> Callable | None:
    rows = _heldout(config, start, out)
    error = make_quantization_error(rule) if rule else None
    if rows is None and error is None:
        return None
    evaluate = make_evaluate(graph, _recipe(config, rule, dtype))
    size = None if rows is None else _bytes(rows, config.run.eval_rows, start.tokenizer)

    def measure(state) -> dict[str, Any]:
        record: dict[str, Any] = {}
        if rows is not None:
            sums = [
                jax.device_get(evaluate(state.params, batch))
                for batch in batches_of(rows, config.run.eval_rows, config.run.batch, placing)
            ]
            record |= summarise(sums, size)
        if error is not None:
            errors = jax.device_get(error(state.params))
            record["qat_error"] = {name: float(value) for name, value in errors.items()}
            record["qat_error_mean"] = float(np.mean(list(record["qat_error"].values())))
        return record

    return measure


def _bytes(rows: Rows, count: int, tokenizer: Path) -> int:
    """Bytes of text that the predicted tokens of the first rows stand for."""
    reader = Tokenizer.from_file(tokenizer)
    chosen = [rows[index] for index in range(min(count, len(rows)))]
    ids = [row["tokens"][1:][row["trained"][1:]] for row in chosen]
    return len(reader.decode_bytes(np.concatenate(ids).tolist()))


def summarise(sums: list[dict[str, Any]], size: int) -> dict[str, float]:
    """Bits per byte, bits per token and accuracy out of `make_evaluate`'s sums."""
    nats, right, tokens = (
        math.fsum(float(s[name]) for s in sums) for name in ("nats", "right", "tokens")
    )
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "bits_per_token": nats / math.log(2) / tokens,
        "accuracy": right / tokens,
    }


def _draft_evaluation(config, start, out, placing, target, graph, shapes, recipe):
    rows = _heldout(config, start, out)
    if rows is None:
        return None
    evaluate = make_draft_evaluate(target[0], graph, shapes, recipe)

    def measure(state) -> dict[str, Any]:
        total: dict[str, Any] = {}
        for batch in batches_of(rows, config.run.eval_rows, config.run.batch, placing):
            measured = jax.device_get(evaluate(state.params, target[1], batch))
            total = {k: total.get(k, 0.0) + np.asarray(v, np.float64) for k, v in measured.items()}
        right = total["right_k"] / np.maximum(total["reached_k"], 1)
        return {
            "heldout_acceptance": float(1 + total["run"] / total["anchors"]),
            "heldout_on_path": float(1 + total["on_path"] / total["anchors"]),
            "right_by_slot": right.tolist(),
        }

    return measure


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
