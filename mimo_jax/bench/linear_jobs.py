"""Jobs of `mimo bench kernels --only linear`: checks and times of the few-token linear on a GPU.

Times are of eight layers with weights of their own in one program, over and over, as one CUDA
graph. Between two layers XLA adds the result to the stream; the way "glue" is that alone.
`kernel_us` is the device's time of the kernel by itself, from the profiler, without graphs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mimo_jax.bench.kernel_cases import Job
from mimo_jax.bench.kernel_jobs import distance, kernel_times, poison, seconds
from mimo_jax.decode.program import GPU_OPTIONS
from mimo_jax.quant import fp8
from pallas_kernels.linear.mosaic_gpu import linear_mosaic
from pallas_kernels.linear.plan import Plan, plan_for
from pallas_kernels.linear.reference import linear_reference, rms_norm
from pallas_kernels.linear.shapes import SHAPES, Shape

_LAYERS = 8
_REPEATS = 20
_RUNS = 50
_DRAWS = 20
_EPSILON = 1e-5
_CHECKS = (
    # shape, t, other numbers of tokens in which rows must keep their bits, norm, cuts
    ("pro-qkv", 8, (1, 13), False, [None, (2, 12, 1, 1)]),
    ("pro-qkv", 5, (), True, [None]),
    ("pro-o", 8, (16,), False, [None]),
    ("pro-down", 8, (), False, [None]),
    ("pro-head", 8, (), False, [None]),
    ("pro-draft-features", 8, (), False, [None]),
    ("flash-qkv", 7, (), True, [None]),
    ("nano-up", 3, (16,), False, [None]),
)
_CUTS = {
    "pro-qkv": [None, (1, 12, 2, 1), (1, 12, 4, 1), (1, 16, 3, 1), (2, 12, 1, 1)],
    "pro-o": [None, (1, 8, 1, 1), (1, 16, 2, 1), (1, 16, 1, 2)],
    "pro-head": [None, (1, 12, 4, 1), (1, 16, 3, 1)],
    "pro-up": [None, (1, 12, 2, 1)],
    "pro-down": [None, (1, 16, 1, 2)],
    "pro-draft-features": [None, (12, 20, 1, 1)],
}
"""Ways to cut a matrix: split, warps, parts, tiles of `Plan`; None is `plan_for`'s."""
_WAYS = {
    "pro-qkv": ("xla", "norm", "norm-apart", "xla-norm", "glue", "ahead-8", "ahead-99"),
    "pro-o": ("xla", "glue", "ahead-8", "ahead-99"),
    "pro-head": ("xla",),
}
"""Ahead: the next layer's weights are brought to the L2 cache, at most so many million bytes."""
_TOKENS = {"pro-qkv": (1, 16), "pro-o": (16,)}
_OTHERS = ("pro-draft-kv", "pro-draft-up", "flash-qkv", "flash-o", "nano-up")


def jobs(check: bool, time: bool) -> list[Job]:
    """All of them, in the order in which they run."""
    found: list[Job] = []
    for shape, t, others, norm, cuts in _CHECKS if check else ():
        job = {"job": "linear-check", "shape": shape, "t": t, "norm": norm}
        found += [{**job, "cut": cut, "others": others if cut is None else ()} for cut in cuts]
    if not time:
        return found

    def add(shape, t=8, **job):
        found.append({"job": "linear-time", "shape": shape, "t": t, **job})

    for shape, cuts in _CUTS.items():
        for cut in cuts:
            add(shape, cut=cut, profile=cut is None)
        for way in _WAYS.get(shape, ()):
            add(shape, way=way, profile=way == "norm")
        for t in _TOKENS.get(shape, ()):
            add(shape, t=t)
    for shape in _OTHERS:
        add(shape)
    return found


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_weights(key, shape: Shape, layers: int):
    """Weights and scales (None for bfloat16) of layers, made on the device."""
    if not shape.unit:
        make = functools.partial(jax.random.normal, shape=(shape.n, shape.d), dtype=jnp.bfloat16)
        return [
            (make(k) * jnp.bfloat16(shape.d**-0.5), None) for k in jax.random.split(key, layers)
        ]
    found = []
    for k in jax.random.split(key, layers):
        bits = jax.random.bits(k, (shape.n, shape.d), jnp.uint8)
        # No NaN.
        bits = jnp.where((bits & 127) == 127, bits & 0xBF, bits)
        codes = lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
        tiles = (shape.n // shape.unit, shape.d // 128)
        found.append((codes, jax.random.uniform(k, tiles, minval=1e-5, maxval=3e-4)))
    return found


def make_plan(shape: Shape, cut) -> Plan:
    """The plan of a job."""
    if cut is None:
        return plan_for(shape.n, shape.d, shape.itemsize)
    return Plan(shape.n, shape.d, shape.itemsize, *cut)


def check(rng, job: Job):
    """Distance to the reference, equal bits over runs, rows that mind their own business."""
    shape, t = SHAPES[job["shape"]], job["t"]
    key = jax.random.key(int(rng.integers(1 << 30)))
    ((weight, scale),) = random_weights(key, shape, 1)
    x = jnp.asarray(rng.normal(size=(t, shape.d)), jnp.bfloat16)
    norm = None
    if job["norm"]:
        norm = jnp.asarray(rng.normal(size=shape.d), jnp.bfloat16)
    plan = make_plan(shape, job["cut"])

    def run(x):
        return linear_mosaic(x, weight, scale, norm, _EPSILON, plan=plan)

    ref = jax.jit(linear_reference)(x, weight, scale, norm, _EPSILON)
    poison()
    first = np.asarray(run(x))
    moved = [int((first != np.asarray(run(x))).sum()) for _ in range(_RUNS)]
    own, draws = 0, 0
    for other in (t, *job["others"]):
        noise = jax.random.normal(key, (other + 9, shape.d)).astype(jnp.bfloat16)
        for _ in range(_DRAWS):
            row, slot, start = rng.integers(t), rng.integers(other), rng.integers(8)
            block = place_other(noise, x, start, slot, row, other)
            own += np.array_equal(np.asarray(run(block))[slot], first[row])
            draws += 1
    yield {
        **{k: job[k] for k in ("shape", "t", "norm", "cut")},
        "distance": distance(first, ref), "same_bits": not any(moved),
        "runs_that_moved": sum(map(bool, moved)), "most_elements_moved": max(moved),
        "independent": f"{own}/{draws}",
    }  # fmt: skip


@functools.partial(jax.jit, static_argnums=5)
def place_other(noise, x, start, slot, row, t):
    """Row `row` of x as row `slot` of t rows of noise."""
    return lax.dynamic_slice_in_dim(noise, start, t).at[slot].set(x[row])


def product(x, weight, scale, norm, way, plan, following):
    """One layer's product; `following` are the next layer's weights."""
    if way in ("xla", "xla-norm"):
        x = rms_norm(x, norm, _EPSILON) if way == "xla-norm" else x
        if scale is not None:
            weight, scale, _ = lax.optimization_barrier((weight, scale, x))
            weight = fp8.decode(weight, scale, weight.shape[0] // scale.shape[0], x.dtype)
        y = jnp.einsum("td,nd->tn", x, weight, preferred_element_type=jnp.float32)
        return y.astype(jnp.bfloat16)
    if way == "norm-apart":
        x = rms_norm(x, norm, _EPSILON)
    norm = norm if way == "norm" else None
    ahead = {}
    if way.startswith("ahead-"):
        ahead = {"ahead": following, "ahead_bytes": 10**6 * int(way.split("-")[1])}
    return linear_mosaic(
        x, weight, scale, norm, _EPSILON, out_dtype=jnp.bfloat16, plan=plan, **ahead
    )


@functools.partial(
    jax.jit, static_argnames=("way", "plan", "repeats"), compiler_options=GPU_OPTIONS
)
def layers(x, weights, norm, way, plan, repeats=_REPEATS):
    """Layers in a row, each on the stream of the one before, over and over: one CUDA graph."""
    t, d = x.shape

    def all_layers(_, x):
        for i, (weight, scale) in enumerate(weights):
            n, following = weight.shape[0], weights[(i + 1) % len(weights)][0]
            if way == "glue":
                y = lax.optimization_barrier(jnp.zeros((t, n), jnp.bfloat16) + x[0, 0])
            else:
                y = product(x, weight, scale, norm, way, plan, following)
            y = y[:, :d] if n >= d else jnp.pad(y, ((0, 0), (0, d - n)))
            x = lax.optimization_barrier(x + jnp.bfloat16(1e-3) * y)
        return x

    return lax.fori_loop(0, repeats, all_layers, x)


def time_layers(rng, job: Job, held: dict):
    """Microseconds a layer and GB/s of weights."""
    shape, way = SHAPES[job["shape"]], job.get("way", "kernel")
    if held.get("linear") != job["shape"]:
        held.clear()
        held["weights"] = random_weights(jax.random.key(0), shape, _LAYERS)
        held["linear"] = job["shape"]
    plan = make_plan(shape, job.get("cut"))
    x = jnp.asarray(rng.normal(size=(job["t"], shape.d)), jnp.bfloat16)
    norm = jnp.ones(shape.d, jnp.bfloat16)
    one = functools.partial(layers, way=way, plan=plan)
    took = seconds(one, x, held["weights"], norm, queue=1) / (_LAYERS * _REPEATS)
    result = {
        "shape": job["shape"],
        "t": job["t"],
        "way": way,
        "cut": job.get("cut"),
        "us": took * 1e6,
    }
    if way != "glue":
        result["GB/s"] = shape.bytes / took / 1e9
    if job.get("profile"):
        found = kernel_times(one, x, held["weights"], norm)
        result["kernels_us"] = found
        own = [us for name, us in found.items() if "linear" in name]
        if own:
            result |= {"kernel_us": max(own), "kernel_GB/s": shape.bytes / max(own) / 1e3}
    yield result


def do(rng, job: Job, held: dict):
    """Yields the results of a job."""
    if job["job"] == "linear-check":
        held.clear()
        yield from check(rng, job)
    elif job["job"] == "linear-time":
        yield from time_layers(rng, job, held)
