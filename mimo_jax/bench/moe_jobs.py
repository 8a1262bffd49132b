"""Jobs of `mimo bench kernels --only moe`: router and experts in one launch, checked and timed.

Times are of many layers in one program, over and over, as one CUDA graph. The experts' weights are
the same for all of them and the routers are not, so that each layer reads other experts: more of
them than the L2 cache holds. Beside it, in the same run, are the router's launch and the experts'.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.bench.kernel_cases import Job
from mimo_jax.bench.kernel_jobs import (
    distance,
    held_weights,
    kernel_times,
    poison,
    random_checkpoint,
    seconds,
)
from mimo_jax.bench.kernel_lines import ROUTED_EVENTS, read_stamps
from mimo_jax.decode.program import GPU_OPTIONS
from pallas_kernels.expert_ffn.block import Launch, default_launch
from pallas_kernels.expert_ffn.layout import pack_experts
from pallas_kernels.expert_ffn.mosaic_gpu import run_flow
from pallas_kernels.expert_ffn.shapes import SHAPES, Shape
from pallas_kernels.moe_layer.mosaic_gpu import moe_layer_mosaic
from pallas_kernels.moe_layer.reference import moe_layer_reference
from pallas_kernels.router import new_counter
from pallas_kernels.router.mosaic_gpu import route_mosaic

_LAYERS, _PASSES, _REPEATS = 8, 6, 4
_RUNS, _DRAWS = 50, 200
_EPSILON = 1e-5
_MARGIN = 1e-3
"""Between the last expert that a checked token chooses and the next one."""
_WIDE = ("nano",)
"""Shapes whose router is float32."""


def jobs(check: bool, time: bool) -> list[Job]:
    """All of them, in the order in which they run."""
    found: list[Job] = []
    for shape, t in (("pro-tp8", 8), ("pro-tp8", 1), ("flash-tp8", 5), ("nano", 8)):
        found += [{"job": "moe-check", "shape": shape, "t": t}] if check else []
    for shape in ("pro-tp8", "flash-tp8", "nano") if time else ():
        for t in (8, 1):
            job = {"job": "moe-time", "shape": shape, "t": t}
            found += [{**job, "way": way} for way in ("separate", "whole")]
    found += [{"job": "moe-line", "shape": "pro-tp8", "t": t} for t in (8, 1) if time]
    return found


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_routers(key, shape: Shape, wide: bool, layers: int):
    """Weights and biases of layers, made on the device."""
    kind, found = jnp.float32 if wide else jnp.bfloat16, []
    for k in jax.random.split(key, layers):
        weight = jax.random.normal(k, (shape.e, shape.d)) * shape.d**-0.5
        found.append((weight.astype(kind), 0.01 * jax.random.normal(k, (shape.e,))))
    return found


# --- correctness ----------------------------------------------------------------------------------


def check(rng, job: Job):
    """Distance to the reference; equal bits over runs; rows that mind their own business.

    Blocks of other sizes run in between: what launches leave behind must not be taken for scores.
    """
    shape, t, wide = SHAPES[job["shape"]], job["t"], job["shape"] in _WIDE
    shape = dataclasses.replace(shape, e=min(shape.e, 96))
    key = jax.random.key(int(rng.integers(1 << 30)))
    weights = random_checkpoint(key, shape, shape.e)
    packed = jax.jit(pack_experts)(weights)
    ((router, bias),) = random_routers(key, shape, wide, 1)
    norm = jnp.asarray(rng.normal(size=shape.d), jnp.bfloat16)
    options = dict(choices=shape.c, epsilon=_EPSILON, normalise=True, scale=1.5)

    def run(h, live=None, stream=False):
        given = h, norm, router, bias, packed, live
        return np.asarray(moe_layer_mosaic(*given, **options, stream=stream)["y"])

    @jax.jit
    def reference(h, live):
        with jax.default_matmul_precision("highest"):
            given = h, norm, router, bias, weights, live
            return moe_layer_reference(*given, **options, stream=False)

    h = clear_rows(rng, t, shape, norm, router, bias)
    live = jnp.asarray(np.arange(t) != 1)
    poison()
    ref, first = reference(h, live), run(h)
    found = {"distance": distance(run(h, live), ref)}
    added = np.asarray(h, np.float64) + np.asarray(first, np.float64)
    found["stream_distance"] = distance(run(h, stream=True), added)
    moved, own = 0, 0
    for _ in range(_RUNS):
        moved += bool((run(h) != first).any())
    noise = jnp.asarray(rng.normal(size=(16, shape.d)), jnp.bfloat16)
    for _ in range(_DRAWS):
        size, start = int(rng.integers(1, 9)), int(rng.integers(8))
        row, slot = int(rng.integers(t)), int(rng.integers(size))
        block = noise[start : start + size].at[slot].set(h[row])
        own += np.array_equal(run(block)[slot], first[row])
    yield {
        **{k: job[k] for k in ("shape", "t")}, "experts": shape.e, **found,
        "same_bits": not moved, "runs_that_moved": moved, "independent": f"{own}/{_DRAWS}",
    }  # fmt: skip


def clear_rows(rng, t: int, shape: Shape, norm, router, bias):
    """Rows of which no choice is a close call."""
    wide = np.asarray(router, np.float64), np.asarray(norm, np.float64)
    while True:
        rows = jnp.asarray(rng.normal(size=(t, shape.d)), jnp.bfloat16)
        h = np.asarray(rows, np.float64)
        x = h / np.sqrt((h * h).mean(1, keepdims=True)) * wide[1]
        total = np.sort(1 / (1 + np.exp(-(x @ wide[0].T))) + np.asarray(bias), axis=1)
        if (total[:, -shape.c] - total[:, -shape.c - 1]).min() > _MARGIN:
            return rows


# --- time -----------------------------------------------------------------------------------------


def once(h, norm, router, bias, weights, counter, way: str, c: int, launch: Launch):
    """The stream after one layer, and a time line's stamps; shares are so small that it stays."""
    options = dict(choices=c, epsilon=_EPSILON, scale=1e-6)
    if way == "whole":
        given = h, norm, router, bias, weights, None
        found = moe_layer_mosaic(*given, **options, launch=launch)
    else:
        x, ids, shares = route_mosaic(h, norm, router, bias, None, counter, **options)
        found = run_flow(x, weights, ids, shares, h, launch=launch)
    return found["y"], found.get("stamps")


@functools.partial(jax.jit, static_argnames=("way", "c", "launch"), compiler_options=GPU_OPTIONS)
def layers(h, norm, routers, weights, counter, way, c, launch):
    """Many layers in a row, each on the stream of the one before, over and over: one CUDA graph."""

    def all_layers(_, h):
        for router, bias in routers * _PASSES:
            h, _ = once(h, norm, router, bias, weights, counter, way, c, launch)
        return h

    return jax.lax.fori_loop(0, _REPEATS, all_layers, h)


def inputs(rng, job: Job, held: dict):
    """Arguments of `layers`, and the shape's choices."""
    shape, wide = SHAPES[job["shape"]], job["shape"] in _WIDE
    weights = held_weights(job, held)
    if "routers" not in held:  # Another shape's went with its weights.
        held["routers"] = random_routers(jax.random.key(1), shape, wide, _LAYERS)
    h = jnp.asarray(rng.normal(size=(job["t"], shape.d)), jnp.bfloat16)
    norm = jnp.ones(shape.d, jnp.bfloat16)
    return (h, norm, held["routers"], weights, new_counter()), shape.c


def time_layers(rng, job: Job, held: dict):
    """Microseconds a layer."""
    arguments, c = inputs(rng, job, held)
    run = functools.partial(layers, way=job["way"], c=c, launch=default_launch())
    took = seconds(run, *arguments, queue=1) / (_LAYERS * _PASSES * _REPEATS) * 1e6
    known = {k: job[k] for k in ("shape", "t", "way")}
    yield {**known, "us": took, "kernels_us": kernel_times(run, *arguments)}


def time_line(rng, job: Job, held: dict):
    """When each warpgroup of each block began and ended what: one launch after some others."""
    (h, norm, routers, weights, counter), c = inputs(rng, job, held)
    launch = dataclasses.replace(default_launch(), time_line=True)

    @functools.partial(jax.jit, compiler_options=GPU_OPTIONS)
    def run(h, norm, routers, weights, counter):
        for router, bias in routers:
            h, stamps = once(h, norm, router, bias, weights, counter, "whole", c, launch)
        return stamps

    given = h, norm, routers, weights, counter
    run(*given)
    stamps = np.asarray(run(*given)).astype(np.int64)
    yield {**{k: job[k] for k in ("shape", "t")}, **read_stamps(stamps, ROUTED_EVENTS)}


def do(rng, job: Job, held: dict):
    """Yields the results of a job."""
    if job["job"] == "moe-check":
        held.clear()
        yield from check(rng, job)
    elif job["job"] == "moe-time":
        yield from time_layers(rng, job, held)
    elif job["job"] == "moe-line":
        yield from time_line(rng, job, held)
