"""Benchmark of prefill: how long a prompt takes on one rank of a divided model, alone on one GPU.

The engine's own `prefill` runs on one device's part of random weights, without the collectives.
Chunks are timed at some places of a prompt, and whole prompts where that is quick; times of longer
prompts are integrated over the chunks, in a table of their own.
"""

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.bench.card import environment, print_json, print_table
from mimo_jax.bench.rank_run import shorten
from mimo_jax.bench.rank_weights import random_params, random_state
from mimo_jax.checkpoint.layout import FP8
from mimo_jax.config import AttentionConfig, ModelConfig
from mimo_jax.decode.kernel_weights import kernel_plan
from mimo_jax.decode.prefill import prefill
from mimo_jax.decode.program import GPU_OPTIONS, Plan, Settings, make_plan
from mimo_jax.decode.rank import rank_plan
from mimo_jax.decode.state import State, state_specs
from mimo_jax.errors import MimoError
from mimo_jax.planning.models import find_model
from mimo_jax.planning.sizes import abstract_mesh
from mimo_jax.sharding import make_mesh, shardings

DTYPE = jnp.bfloat16
WARM = 1
"""Runs of each kind that do not count."""
ROWS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo bench prefill`."""
    parser.add_argument("--model", default="mimo-v2.6-pro", help="a preset's name")
    parser.add_argument("--ranks", type=int, default=8, help="devices that share it (default 8)")
    parser.add_argument("--layers", type=int, help="only so many of its first layers")
    parser.add_argument(
        "--prompts", default="1024,32768,262144", help="tokens of prompts, comma-separated"
    )
    parser.add_argument("--chunk", type=int, default=2048, help="rows of a pass (default 2048)")
    parser.add_argument("--places", type=int, default=6, help="chunks to time (default 6)")
    parser.add_argument("--repeats", type=int, default=3, help="of each (default 3)")
    parser.add_argument(
        "--whole-s", type=float, default=15.0, help="run prompts that take so long (default 15)"
    )
    parser.add_argument(
        "--peak", type=float, default=790.0, help="TFLOP/s to compare with (default 790)"
    )
    parser.add_argument(
        "--linear", choices=("auto", "fp8", "bf16"), default="auto", help="default: as released"
    )
    parser.add_argument("--no-drafter", action="store_true", help="without the drafter's intake")
    parser.add_argument(
        "--no-kernel", action="store_true", help="experts as in checkpoints, without their kernel"
    )
    parser.add_argument("--cache", type=Path, help="directory of compiled programs")
    parser.add_argument("--seed", type=int, default=0, help="of weights and caches (default 0)")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")


# --- what must be done ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of the target on one rank; the drafter's intake is not counted.

    Attributes:
      attentions: a layer's query heads on this rank, and its sizes.
      a_token: of products with weights, the head's left out: prefill does not run it.
    """

    attentions: tuple[tuple[int, AttentionConfig], ...]
    a_token: float

    def weights(self, tokens: int) -> float:
        """Of all products with weights."""
        return self.a_token * tokens

    def attention(self, start: int, tokens: int) -> float:
        """Of scores and weighted means, for keys that a query sees."""
        seen, total = np.arange(start + 1, start + tokens + 1, dtype=np.float64), 0.0
        for n, config in self.attentions:
            near = seen if config.window is None else np.minimum(seen, config.window)
            total += 2.0 * n * (config.head_dim + config.v_head_dim) * float(near.sum())
        return total


def work_of(config: ModelConfig, plan: Plan, ranks: int) -> Work:
    """Counts a rank's products.

    Args:
      config: of the target.
      plan: of the rank.
      ranks: that the model is divided over.
    """
    total, attentions = 0.0, []
    for index, layer in enumerate(plan.modules(plan.params)[0].layers):
        found = config.attention(index)
        attentions.append((found.num_heads // ranks, found))
        matrices = [layer.attention.qkv, layer.attention.output]
        if layer.sparse:
            matrices.append(layer.ffn.router.weight)
            columns = config.moe_intermediate_size // ranks
            total += 6.0 * config.num_experts_per_tok * config.hidden_size * columns
        else:
            matrices += [layer.ffn.gate_up, layer.ffn.down]
        total += 2.0 * sum(float(np.prod(matrix.shape)) for matrix in matrices)
    return Work(tuple(attentions), total)


# --- running --------------------------------------------------------------------------------------


def declare(options: argparse.Namespace) -> tuple[ModelConfig, Plan, dict[str, Any]]:
    """The model, one rank's plan, and what the JSON line says of them.

    Raises:
      MimoError: if the expert kernel cannot take such a rank.
    """
    found = find_model(options.model, True)
    drafter = None if options.no_drafter else found.drafter
    config, drafter = shorten(found.config, drafter, options.layers)
    stored_fp8 = found.layout is not None and found.layout.linear == FP8
    fp8 = stored_fp8 if options.linear == "auto" else options.linear == "fp8"
    mesh = abstract_mesh(options.ranks)
    whole = make_plan(config, drafter, mesh, packed=True, fp8=fp8, dtype=DTYPE)
    try:
        plan = rank_plan(whole if options.no_kernel else kernel_plan(whole), make_mesh(1))
    except ValueError as error:
        raise MimoError(f"The expert kernel cannot take such a rank: {error}") from None
    said = {
        "layers": config.num_hidden_layers,
        "linear": "fp8" if fp8 else "bf16",
        "drafter": drafter is not None,
        "experts": "checkpoint order" if options.no_kernel else "kernel order",
    }
    return config, plan, said


def make_prefill(plan: Plan, state: State, chunk: int):
    """The engine's prefill alone: the jitted `program(params, state) -> state`.

    Args:
      plan: of the rank.
      state: or its shapes.
      chunk: rows of a pass.
    """
    specs = state_specs(state, plan.rules)

    def body(params, state):
        model, drafter = plan.modules(params)
        return prefill(model, drafter, plan.taps, state, chunk, plan.parallel)

    sharded = jax.shard_map(
        body,
        mesh=plan.mesh,
        in_specs=(plan.param_specs, specs),
        out_specs=specs,
        check_vma=False,
    )
    on_gpu = plan.mesh.devices.flat[0].platform == "gpu"
    return jax.jit(
        sharded,
        donate_argnums=1,
        out_shardings=shardings(specs, plan.mesh),
        compiler_options=GPU_OPTIONS if on_gpu else None,
    )


class Prefiller:
    """The compiled prefill of a plan, and the state that it runs on.

    Args:
      plan: of the rank.
      params: of target and drafter.
      max_len: tokens that the caches hold.
      chunk: rows of a pass.
      seed: of the state's noise.
    """

    def __init__(self, plan: Plan, params: Any, max_len: int, chunk: int, seed: int):
        self.params, self.chunk = params, chunk
        block = 8 if plan.drafter is None else plan.drafter.block_size
        settings = Settings(1, max_len, block, chunk, DTYPE)
        self.state: State | None = random_state(plan, settings, 1, seed)
        start = time.perf_counter()
        self._program = make_prefill(plan, self.state, chunk).lower(params, self.state).compile()
        self.compile_s = time.perf_counter() - start
        self.temporaries = self._program.memory_analysis().temp_size_in_bytes

    def run(self, start: int, tokens: int) -> float:
        """Seconds to cache so many tokens after `start`."""
        state, self.state = self.state, None
        fields = {
            "cached": jnp.full_like(state.cached, start),
            "length": jnp.full_like(state.length, start + tokens + 1),
        }
        places = {name: getattr(state, name).sharding for name in fields}
        state = dataclasses.replace(state, **jax.device_put(fields, places))
        jax.block_until_ready(state)
        begin = time.perf_counter()
        self.state = jax.block_until_ready(self._program(self.params, state))
        took = time.perf_counter() - begin
        if int(self.state.cached[0]) != start + tokens:
            raise MimoError(f"Prefill stopped at {int(self.state.cached[0])} tokens.")
        return took


def places(longest: int, chunk: int, count: int) -> list[int]:
    """Where to time chunks: at the beginning, at the end, and ever denser towards the beginning."""
    last = (longest - 2) // chunk
    steps = {round(last * 2.0**-i) for i in range(count - 1)} | {0}
    return sorted(step * chunk for step in steps)


def integrate(timed: list[dict[str, Any]], prompt: int, chunk: int) -> float:
    """Seconds of a prompt: each of its chunks costs what those timed on both sides of it suggest.

    Between two places a chunk's time grows linearly with its start, as attention to all tokens
    before it does; a chunk that is only partly filled counts as a full one.
    """
    starts = np.arange(0, prompt - 1, chunk)
    known = [row["start"] for row in timed], [row["ms"] for row in timed]
    return float(np.interp(starts, *known).sum()) / 1e3


def time_chunks(runner: Prefiller, work: Work, options) -> list[dict[str, Any]]:
    """Times full chunks at some places of the longest prompt."""
    rows = []
    longest = max(prompts_of(options))
    for start in places(longest, options.chunk, options.places):
        each = [runner.run(start, options.chunk) for _ in range(WARM + options.repeats)][WARM:]
        ms = 1e3 * statistics.median(each)
        row = {"start": start, "tokens": options.chunk, "ms": ms}
        row |= {"spread": 1e3 * (max(each) - min(each)) / ms}
        rows.append(row | rates(work, start, options.chunk, ms / 1e3, options.peak))
    return rows


def time_prompts(runner: Prefiller, work: Work, options, timed) -> list[dict[str, Any]]:
    """Times whole prompts, those that take not too long."""
    rows = []
    for prompt in prompts_of(options):
        if integrate(timed, prompt, options.chunk) > options.whole_s:
            continue
        each = [runner.run(0, prompt - 1) for _ in range(WARM + options.repeats)][WARM:]
        took = statistics.median(each)
        row = {"prompt": prompt, "seconds": took, "spread": (max(each) - min(each)) / took}
        row |= {"tokens/s": (prompt - 1) / took}
        rows.append(row | rates(work, 0, prompt - 1, took, options.peak))
    return rows


def rates(work: Work, start: int, tokens: int, took: float, peak: float) -> dict[str, float]:
    """FLOPs of attention and of weights, and the share of the peak of both."""
    attention, weights = work.attention(start, tokens), work.weights(tokens)
    rate = (attention + weights) / took / 1e12
    return {
        "attention_TFLOP": attention / 1e12,
        "weights_TFLOP": weights / 1e12,
        "TFLOP/s": rate,
        "share": rate / peak,
    }


def integrated(work: Work, options, timed) -> list[dict[str, Any]]:
    """All prompts, from the times of chunks."""
    rows = []
    for prompt in prompts_of(options):
        took = integrate(timed, prompt, options.chunk)
        row = {"prompt": prompt, "chunks": -(-(prompt - 1) // options.chunk), "seconds": took}
        row |= {"tokens/s": (prompt - 1) / took}
        rows.append(row | rates(work, 0, prompt - 1, took, options.peak))
    return rows


def growth(timed: list[dict[str, Any]]) -> float | None:
    """TFLOP/s at which the added FLOPs of the last place are done in its added time."""
    first, last = timed[0], timed[-1]
    if last["ms"] <= first["ms"]:
        return None
    return (last["attention_TFLOP"] - first["attention_TFLOP"]) / (last["ms"] - first["ms"]) * 1e3


def prompts_of(options: argparse.Namespace) -> list[int]:
    """The prompts' lengths.

    Raises:
      MimoError: on one below 2: its only token is left to the first round.
    """
    found = sorted(int(text) for text in options.prompts.split(","))
    if found[0] < 2:
        raise MimoError(f"--prompts: {found[0]} leaves nothing to prefill; at least 2.")
    return found


def main(options: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables and its JSON line."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    if options.cache:
        options.cache.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(options.cache))
    prompts = prompts_of(options)
    config, plan, said = declare(options)
    params = random_params(plan, options.seed)
    # The last place's chunk is timed full, whatever the prompt leaves of it, and one token more;
    # the kernel takes caches of a multiple of 8 rows.
    max_len = -(-max(prompts) // options.chunk) * options.chunk + ROWS
    runner = Prefiller(plan, params, max_len, options.chunk, options.seed + 1)
    work = work_of(config, plan, options.ranks)
    timed = time_chunks(runner, work, options)
    result = {
        "benchmark": "prefill",
        "model": options.model,
        "ranks": options.ranks,
        **said,
        **environment(),
        "seed": options.seed,
        "chunk": options.chunk,
        "peak_TFLOP/s": options.peak,
        "compile_s": runner.compile_s,
        "temporaries": runner.temporaries,
        "measured": {"chunks": timed, "prompts": time_prompts(runner, work, options, timed)},
        "integrated": {
            "from": "measured.chunks, linear in the start of a chunk between the places timed",
            "prompts": integrated(work, options, timed),
            "growth_TFLOP/s": growth(timed),
        },
        "left_out": "sums over ranks, and the first round, which gives the first token",
    }
    if not options.json:
        show(result)
    print_json(result)
    return 0


def show(result: dict[str, Any]) -> None:
    """Prints what was measured, and, apart from it, what is integrated."""
    title = f"Prefill, one rank of {result['ranks']} of {result['model']}, {result['device']}"
    rates = ("attention_TFLOP", "weights_TFLOP", "TFLOP/s", "share")
    columns = ("start", "tokens", "ms", "spread", *rates)
    _table(f"{title}: chunks, measured", columns, result["measured"]["chunks"])
    columns = ("prompt", "seconds", "spread", "tokens/s", *rates)
    if result["measured"]["prompts"]:
        _table("Whole prompts, measured", columns, result["measured"]["prompts"])
    columns = ("prompt", "chunks", "seconds", "tokens/s", *rates)
    _table("Prompts, integrated over chunks", columns, result["integrated"]["prompts"])


def _table(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    print_table(title, columns, [[row[name] for name in columns] for row in rows])
