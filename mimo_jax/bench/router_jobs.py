"""Jobs of `mimo bench kernels --only router`: checks and times of the router on a GPU.

Times are of many layers with weights of their own in one program, over and over, as one CUDA graph:
more weights than the L2 cache holds. Between two layers XLA adds to the stream; the way "glue" is
that alone, and `net_us` what is left without it. `kernel_us` is the device's time of the kernel by
itself, from the profiler.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mimo_jax.bench.kernel_cases import Job
from mimo_jax.bench.kernel_jobs import distance, kernel_times, poison, seconds
from mimo_jax.decode.program import GPU_OPTIONS
from pallas_kernels.router import new_counter
from pallas_kernels.router.mosaic_gpu import route_mosaic
from pallas_kernels.router.plan import Plan, plan_for
from pallas_kernels.router.reference import route_reference
from pallas_kernels.router.shapes import SHAPES, Shape

_LAYERS = 24
_REPEATS = 20
_RUNS = 50
_DRAWS = 30
_EPSILON = 1e-5
_TIE = 1e-6
"""Scores that are no further apart may change places."""
_CUTS: dict[str, list] = {
    "pro": [None, (8, 8, 3), (4, 12, 3), (8, 12, 2), (8, 12, 4)],
    "pro-wide": [None],
    "flash": [None, (8, 8, 2), (4, 16, 2)],
    "nano": [None],
}
"""Ranks, warps and tiles of `Plan`; None is `plan_for`'s."""


def jobs(check: bool, time: bool) -> list[Job]:
    """All of them, in the order in which they run."""
    found: list[Job] = []
    for shape in SHAPES if check else ():
        found += [{"job": "router-check", "shape": shape, "t": t} for t in (8, 1, 13, 16)]
    for shape, cuts in _CUTS.items() if time else ():
        job = {"job": "router-time", "shape": shape, "t": 8}
        found += [{**job, "way": way} for way in ("glue", "xla")]
        found += [{**job, "way": "kernel", "cut": cut} for cut in cuts]
        found += [{**job, "way": way, "t": t} for t in (1, 16) for way in ("glue", "xla", "kernel")]
    return found


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_weights(key, shape: Shape, layers: int):
    """Weights and biases of layers, made on the device."""
    kind, found = jnp.float32 if shape.wide else jnp.bfloat16, []
    for k in jax.random.split(key, layers):
        weight = jax.random.normal(k, (shape.e, shape.d)) * shape.d**-0.5
        found.append((weight.astype(kind), 0.1 * jax.random.normal(k, (shape.e,))))
    return found


def make_plan(shape: Shape, cut) -> Plan:
    """The plan of a job."""
    return plan_for(shape.e, shape.d) if cut is None else Plan(shape.e, shape.d, *cut)


# --- correctness ----------------------------------------------------------------------------------


def check(rng, job: Job):
    """Against float64, of the kernel's own rows; equal bits; rows that mind their own business."""
    shape, t = SHAPES[job["shape"]], job["t"]
    key = jax.random.key(int(rng.integers(1 << 30)))
    ((weight, bias),) = random_weights(key, shape, 1)
    h = jnp.asarray(rng.normal(size=(t, shape.d)), jnp.bfloat16)
    norm = jnp.asarray(rng.normal(size=shape.d), jnp.bfloat16)
    counter = new_counter()

    def run(h):
        options = dict(choices=shape.c, epsilon=_EPSILON)
        found = route_mosaic(h, norm, weight, bias, None, counter, **options)
        return [np.asarray(part) for part in found]

    poison()
    first = run(h)
    moved = sum(
        any((a != b).any() for a, b in zip(first, run(h), strict=True)) for _ in range(_RUNS)
    )
    own = 0
    for _ in range(_DRAWS):
        slots = int(rng.integers(1, 17))
        row, slot = rng.integers(t), rng.integers(slots)
        block = jnp.asarray(rng.normal(size=(slots, shape.d)), jnp.bfloat16)
        found = run(block.at[slot].set(h[row]))
        own += all(np.array_equal(a[slot], b[row]) for a, b in zip(found, first, strict=True))
    yield {
        **{k: job[k] for k in ("shape", "t")},
        **compare(first, h, norm, weight, bias, shape.c),
        "counter": int(counter[0]), "same_bits": not moved, "runs_that_moved": moved,
        "independent": f"{own}/{_DRAWS}",
    }  # fmt: skip


def compare(found, h, norm, weight, bias, c: int) -> dict:
    """Distances, and choices that float64 would not make: XLA's are those of unrounded rows."""
    x, ids, weights = found
    wide = x.astype(np.float64) @ np.asarray(weight, np.float64).T
    scores = 1 / (1 + np.exp(-wide))
    total = scores + np.asarray(bias, np.float64)
    order = np.argsort(-total, axis=1, kind="stable")[:, :c]
    gap = np.take_along_axis(total, order, axis=1) - np.take_along_axis(total, ids, axis=1)
    shares = np.take_along_axis(scores, ids, axis=1)
    reference = route_reference(h, norm, weight, bias, choices=c, epsilon=_EPSILON)
    return {
        "distance": distance(weights, shares / shares.sum(1, keepdims=True)),
        "x_distance": distance(x.astype(np.float32), np.asarray(reference[0], np.float32)),
        "wrong_choices": int((np.abs(gap) > _TIE).sum()),
        "ties": int(((ids != order) & (np.abs(gap) <= _TIE)).sum()),
        "distinct": all(len(set(row)) == c for row in ids.tolist()),
    }


# --- time -----------------------------------------------------------------------------------------


def one(h, norm, weight, bias, counter, way, plan, c):
    """One layer's normed rows, ids and weights."""
    options = dict(choices=c, epsilon=_EPSILON)
    if way == "kernel":
        return route_mosaic(h, norm, weight, bias, None, counter, plan=plan, **options)
    if way == "xla":
        return route_reference(h, norm, weight, bias, **options)
    ids = jnp.zeros((h.shape[0], c), jnp.int32)
    return h, ids, jnp.zeros(ids.shape, jnp.float32) + h[0, 0].astype(jnp.float32)


@functools.partial(
    jax.jit, static_argnames=("way", "plan", "c", "repeats"), compiler_options=GPU_OPTIONS
)
def layers(h, norm, weights, counter, way, plan, c, repeats=_REPEATS):
    """Layers in a row, each on the stream of the one before, over and over: one CUDA graph."""

    def all_layers(_, h):
        for weight, bias in weights:
            x, ids, shares = one(h, norm, weight, bias, counter, way, plan, c)
            used = shares[:, :1] + (ids[:, :1] & 1).astype(jnp.float32)
            h = lax.optimization_barrier(h + jnp.bfloat16(1e-3) * x * used.astype(x.dtype))
        return h

    return lax.fori_loop(0, repeats, all_layers, h)


def time_layers(rng, job: Job, held: dict):
    """Microseconds a layer and GB/s of weights."""
    shape, way = SHAPES[job["shape"]], job["way"]
    if held.get("router") != job["shape"]:
        held.clear()
        held["weights"] = random_weights(jax.random.key(0), shape, _LAYERS)
        held["router"] = job["shape"]
    h = jnp.asarray(rng.normal(size=(job["t"], shape.d)), jnp.bfloat16)
    norm = jnp.ones(shape.d, jnp.bfloat16)
    plan = make_plan(shape, job.get("cut"))
    run = functools.partial(layers, way=way, plan=plan, c=shape.c)
    arguments = h, norm, held["weights"], new_counter()
    took = seconds(run, *arguments, queue=1) / (_LAYERS * _REPEATS) * 1e6
    result = {**{k: job.get(k) for k in ("shape", "t", "way", "cut")}, "us": took}
    if way == "glue":
        held["glue", job["t"]] = took
    else:
        net = took - held.get(("glue", job["t"]), 0.0)
        result |= {"net_us": net, "GB/s": shape.bytes / net / 1e3}
    if way == "kernel" and job.get("cut") is None:
        found = kernel_times(run, *arguments)
        result["kernels_us"] = found
        result["kernel_us"] = max((us for k, us in found.items() if "router" in k), default=None)
    yield result


def do(rng, job: Job, held: dict):
    """Yields the results of a job."""
    if job["job"] == "router-check":
        held.clear()
        yield from check(rng, job)
    elif job["job"] == "router-time":
        yield from time_layers(rng, job, held)
