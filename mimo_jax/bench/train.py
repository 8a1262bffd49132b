"""Speed of training steps: tokens a second and share of the peak, of mimo-nano and of 1 billion.

    mimo bench train --cases nano nano-qat 1b-qat

Steps are whole ones, optimiser included, on random tokens that lie on the device. Operations are
those of `mimo_jax.train.flops`: products of active weights, without what the experts' spare places,
the optimiser or computing again costs. The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.bench.card import environment, print_json, print_table
from mimo_jax.compilation import use_compilation_cache
from mimo_jax.config import AttentionConfig, ModelConfig
from mimo_jax.errors import MimoError
from mimo_jax.model.sequence import attend_sequence
from mimo_jax.presets import preset
from mimo_jax.train.config import OptimizerSection, ScheduleSection
from mimo_jax.train.flops import target_flops
from mimo_jax.train.optimizer import make_optimizer, make_schedule
from mimo_jax.train.pretrain import (
    Recipe,
    abstract_target,
    init_params,
    make_step,
    start_state,
)
from mimo_jax.train.run import compute_dtype

NANO = preset("mimo-nano")
BILLION = dataclasses.replace(
    NANO,
    vocab_size=16384,
    hidden_size=1024,
    num_hidden_layers=10,
    num_attention_heads=16,
    num_key_value_heads=4,
    swa_num_key_value_heads=8,
    head_dim=96,
    swa_head_dim=96,
    v_head_dim=64,
    swa_v_head_dim=64,
    hybrid_layer_pattern=(0, 1, 0, 1, 1, 1, 0, 1, 1, 1),
    moe_layer_freq=(0,) + (1,) * 9,
    intermediate_size=3072,
    moe_intermediate_size=1024,
)
"""mimo-nano's shape with 1.0 billion parameters, 32 experts a layer of which 4 are active."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
      config: of the target.
      batch: rows of a step.
      recipe: how it computes.
      length: tokens of a row.
    """

    config: ModelConfig
    batch: int
    recipe: Recipe
    length: int = 2048


CASES = {
    "nano": Case(NANO, 32, Recipe()),
    "nano-qat": Case(NANO, 32, Recipe(rule="mse")),
    "1b": Case(BILLION, 128, Recipe(accumulate=8, capacity=1.25)),
    "1b-qat": Case(BILLION, 128, Recipe(rule="mse", accumulate=8, capacity=1.25)),
    "1b-remat": Case(BILLION, 128, Recipe(accumulate=2, capacity=1.25, remat=True)),
    "toy": Case(
        dataclasses.replace(NANO, vocab_size=320, n_routed_experts=8), 2, Recipe(rule="mse"), 256
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo bench train`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=["nano", "nano-qat"])
    parser.add_argument(
        "--attention", nargs="+", choices=("blocks", "triton"), default=["blocks"],
        help="implementations to time each case with (default blocks)",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="first, how far kernels and blocks are from all scores at once in float32",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, help="rows of a step, instead of the cases' own")
    parser.add_argument("--steps", type=int, default=10, help="of a timed pass (default 10)")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes (default 3)")
    parser.add_argument(
        "--peak", type=float, default=790.0, metavar="TFLOPS",
        help="operations a second of the device, for the share (default 790, an H200's, measured)",
    )  # fmt: skip
    parser.add_argument(
        "--kernels", type=int, default=0, metavar="N",
        help="also list the N kernels that a step spends most time in",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")


def main(options: argparse.Namespace) -> int:
    """Times the cases, and prints a table and the line of JSON."""
    use_compilation_cache()
    rows, checks = [], []
    asked = [(name, attention) for name in options.cases for attention in options.attention]
    for name, attention in asked:
        case = CASES[name]
        recipe = dataclasses.replace(case.recipe, attention=attention)
        case = dataclasses.replace(case, recipe=recipe, batch=options.batch or case.batch)
        print(f"{name}, {attention} ...", file=sys.stderr, flush=True)
        row = {"case": name, "attention": attention}
        try:
            if options.check and attention != "blocks":
                checks.append(row | check_attention(case))
                print(json.dumps(checks[-1]), file=sys.stderr, flush=True)
            row |= time_case(case, options)
        except (MimoError, ValueError, RuntimeError) as error:
            # Too large for the device, or a kernel that it does not run: the others go on.
            row["error"] = str(error).splitlines()[0][:300]
        # A line of JSON each, at once: nothing measured is lost if what follows is killed.
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    if not options.json:
        _print_tables(rows)
    result = {"benchmark": "train", **environment(), "peak_tflops": options.peak}
    print_json(result | {"checks": checks, "cases": rows})
    return 0


def time_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step and what follows from them."""
    dtype = compute_dtype("auto")
    recipe = dataclasses.replace(case.recipe, dtype=dtype)
    schedule = make_schedule(ScheduleSection(), 1e-3, 1000)
    optimizer = make_optimizer(schedule, OptimizerSection())
    graph, abstract = abstract_target(case.config)
    step = make_step(graph, optimizer, recipe)
    state = jax.jit(lambda: start_state(init_params(case.config, 0), optimizer))()
    shape = case.batch, case.length
    tokens = jax.random.randint(jax.random.key(0), shape, 0, case.config.vocab_size, jnp.int32)
    batch = {"tokens": tokens, "trained": jnp.ones(shape, bool)}
    begin = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_s = time.perf_counter() - begin
    state = _run(compiled, state, batch, 2)
    passes = []
    for _ in range(options.repeats):
        begin = time.perf_counter()
        state = _run(compiled, state, batch, options.steps)
        passes.append((time.perf_counter() - begin) / options.steps)
    seconds = statistics.median(passes)
    flops = target_flops(case.config, case.batch, case.length)
    row = {
        "parameters": sum(p.size for p in jax.tree.leaves(abstract)),
        "batch": case.batch,
        "length": case.length,
        "accumulate": recipe.accumulate,
        "rule": recipe.rule,
        "dtype": dtype.name,
        "step_s": seconds,
        "spread": (max(passes) - min(passes)) / seconds,
        "tokens_per_second": case.batch * case.length / seconds,
        "tflops": flops / seconds / 1e12,
        "peak_share": flops / seconds / 1e12 / options.peak,
        "workspace_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "compile_s": compile_s,
    }
    if options.kernels:
        row |= _listed(lambda: _run(compiled, state, batch, 2), options.kernels)
    return row


def _listed(run: Callable[[], Any], count: int) -> dict[str, Any]:
    """The busiest kernels of two steps; a profiler that fails must not cost what was measured."""
    try:
        with traced() as events:
            run()
    except Exception as error:  # Whatever a profiler or its files raise.
        return {"kernels_error": str(error)[:300]}
    return {"kernels": busiest(events, count, 2)}


def check_attention(case: Case) -> dict[str, float]:
    """How far the case's implementation and blocks, in bfloat16, are from all scores in float32.

    Of one row and a layer of each kind, the worst ||x - x'|| / ||x'|| of outputs and gradients. The
    kernels are right where they are as near as blocks.
    """
    config = case.config
    layers = {config.attention(n).window: n for n in range(config.num_hidden_layers)}
    result: dict[str, float] = {}
    for window, layer in layers.items():
        shapes = config.attention(layer)
        arrays = _attention_arrays(shapes, case.length)
        wanted = _attended(*arrays, window, "reference")
        for name, implementation in (("blocks", "blocks"), ("kernels", case.recipe.attention)):
            found = _attended(*(x.astype(jnp.bfloat16) for x in arrays), window, implementation)
            pairs = zip(found, wanted, strict=True)
            worst = max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs)
            result[f"{name}, {'full' if window is None else f'window of {window}'}"] = float(worst)
    return result


def _attention_arrays(shapes: AttentionConfig, t: int) -> list[jax.Array]:
    """q, k, v, sinks and the outputs' gradient of one row, random, as bfloat16 has them."""
    n, k = shapes.num_heads, shapes.num_kv_heads
    sizes = [(1, t, n, shapes.head_dim), (1, t, k, shapes.head_dim), (1, t, k, shapes.v_head_dim)]
    sizes += [(n,), (1, t, n, shapes.v_head_dim)]
    keys = jax.random.split(jax.random.key(2), len(sizes))
    drawn = (jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True))
    return [x.astype(jnp.bfloat16).astype(jnp.float32) for x in drawn]


def _attended(q, k, v, sink, gradient, window, implementation: str) -> list[np.ndarray]:
    """Outputs and the gradients of q, k, v and sinks, on the host."""

    @jax.jit
    def both(q, k, v, sink):
        def attend(*arrays):
            return attend_sequence(*arrays[:3], window, arrays[3], implementation=implementation)

        out, backward = jax.vjp(attend, q, k, v, sink)
        return out, *backward(gradient.astype(out.dtype))

    return [np.asarray(x, np.float64) for x in both(q, k, v, sink)]


def _run(step: Any, state: Any, batch: Any, count: int) -> Any:
    for _ in range(count):
        state, metrics = step(state, batch)
    # The loss is on its way to the host only when the last step is done.
    float(metrics["loss"])
    return jax.block_until_ready(state)


@contextlib.contextmanager
def traced() -> Iterator[list[tuple[str, float]]]:
    """Records what runs on the devices inside; fills (kernel, microseconds) in afterwards."""
    events: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        try:
            yield events
        finally:
            jax.profiler.stop_trace()
        for path in Path(folder).rglob("*.xplane.pb"):
            data = jax.profiler.ProfileData.from_file(str(path))
            for plane in data.planes:
                if not plane.name.startswith("/device:"):
                    continue
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        events += [(event.name, event.duration_ns / 1e3) for event in line.events]


def busiest(events: list[tuple[str, float]], count: int, steps: int) -> list[dict[str, Any]]:
    """The kernels with most time, of one step: name, calls, milliseconds, share of all kernels."""
    total: dict[str, list[float]] = {}
    for name, duration in events:
        total.setdefault(name, []).append(duration)
    every = sum(map(sum, total.values()))
    order = sorted(total.items(), key=lambda item: -sum(item[1]))
    return [
        {
            "name": name,
            "calls": len(durations) / steps,
            "ms": sum(durations) / steps / 1e3,
            "share": sum(durations) / every,
        }
        for name, durations in order[:count]
    ]


def _print_tables(rows: list[dict[str, Any]]) -> None:
    columns = ("parameters", "batch", "step_s", "tokens_per_second", "tflops", "peak_share")
    table = [
        (f"{r['case']}, {r['attention']}", *(r.get(c, r.get("error", "")) for c in columns))
        for r in rows
    ]
    print_table("Training steps", ("case", *(c.replace("_", " ") for c in columns)), table)
    for row in rows:
        if row.get("kernels"):
            lines = [(k["name"][:70], k["calls"], k["ms"], k["share"]) for k in row["kernels"]]
            print_table(f"{row['case']}: a step", ("kernel", "calls", "ms", "share"), lines)
