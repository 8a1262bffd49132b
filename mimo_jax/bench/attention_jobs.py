"""Jobs of `mimo bench kernels --only attention`: decode attention on a GPU, XLA's `attend` beside.

Times are of one program of many layers, each with a cache of its own and depending on the last, so
that launches are a CUDA graph's. What the program takes without attention is measured too and taken
off. "cold" programs also read 128 MB before a layer's turn comes again, so that L2 holds no cache.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.bench import attention_block_jobs
from mimo_jax.bench.kernel_cases import Job
from mimo_jax.bench.kernel_jobs import distance, poison, seconds
from mimo_jax.decode.program import GPU_OPTIONS
from mimo_jax.model.attention import attend, causal
from pallas_kernels.attention.chunked import Launch
from pallas_kernels.attention.mosaic_gpu import decode_attention_mosaic
from pallas_kernels.attention.reference import decode_attention_reference, positions
from pallas_kernels.attention.shapes import SHAPES, Shape

LAUNCHES: dict[str, Launch] = {
    "chunks": Launch(),
    "chunks-128": Launch(ratio=128),
    "chunks-3": Launch(stages=3),
}
"""Ways to run long caches. The ratio changes bits, nothing else does."""
_RUNS = 50
_DRAWS = 60
_REPEATS = 20
_MEGA = 1 << 20
_READ_GB_S = 4480.0
"""Measured bandwidth of a read-only reduction on an H200."""


def jobs(check: bool, time: bool) -> list[Job]:
    """From safe to risky: rings, then long caches; checks before times; fused launches last."""
    found = (checks() if check else []) + (attention_block_jobs.checks() if check else [])
    return found + (times() + attention_block_jobs.times() if time else [])


def checks() -> list[Job]:
    """Lengths at which blocks lie across the end of a chunk and of a tile."""
    return [
        {"job": "attention-check", "shape": shape, "length": length, "slack": slack}
        for shape, length, slack in (
            ("pro-tp8-window", 700, 16),
            ("nano-window", 300, 16),
            ("flash-window", 60, 8),
            ("pro-tp8-full", 3104, 64),
            ("nano-full", 1568, 64),
            ("flash-full", 800, 64),
            ("pro-tp8-full", 40480, 64),
        )
    ]


def times() -> list[Job]:
    """Rings warm and cold, long caches at many lengths, XLA at some."""
    known = {"job": "attention-time", "shape": "pro-tp8-window"}
    found: list[Job] = [
        {**known, "t": t, "way": way, "cold": cold}
        for t, cold in ((8, False), (8, True), (1, False), (16, False))
        for way in ("kernel", "xla")
    ]
    known = {"job": "attention-long", "shape": "pro-tp8-full"}
    found += [{**known, "t": 8, "launch": launch} for launch in LAUNCHES]
    found += [{**known, "t": t, "launch": "chunks"} for t in (1, 16)]
    known = {"job": "attention-time", "shape": "pro-tp8-full", "t": 8, "way": "xla"}
    found += [{**known, "length": n, "cold": n == 1024} for n in (1024, 32768, 262144)]
    return found


def do(rng, job: Job, held: dict):
    """Yields the results of a job."""
    held.clear()
    if job["job"] == "attention-check":
        yield from check(rng, job)
    elif job["job"] == "attention-time":
        yield from time_layers(rng, job)
    elif job["job"] == "attention-long":
        yield from time_lengths(rng, job)
    elif job["job"] == "attention-block-check":
        yield from attention_block_jobs.check(rng, job)
    elif job["job"] == "attention-block-time":
        yield from attention_block_jobs.time_layers(rng, job)


# --- correctness ----------------------------------------------------------------------------------


def history(key, shape: Shape, length: int):
    """Keys [1, k, length, h] and values of all positions."""
    keys = jax.random.split(key)
    return tuple(
        jax.random.normal(k, (1, shape.k, length, d)).astype(jnp.bfloat16)
        for k, d in zip(keys, (shape.h, shape.v), strict=True)
    )


@functools.partial(jax.jit, static_argnums=2)
def cache_of(past, end, rows: int):
    """The cache after all positions before `end`; rows that hold none are NaN."""
    place = positions(end[None], rows)[0]
    there = ((place >= 0) & (place < end))[:, None]
    place = jnp.clip(place, 0, past[0].shape[2] - 1)
    return tuple(jnp.where(there, x[:, :, place], jnp.nan) for x in past)


def check(rng, job: Job):
    """Distance to the reference, equal bits over runs, rows that mind their own business.

    Yields:
      a result for each t: `independent` counts blocks in which a position's row, in any slot, with
      any other queries beside it and NaN after it, had the bits of the first block's.
    """
    shape, length = SHAPES[job["shape"]], job["length"]
    rows = shape.rows(length, job["slack"])
    past = history(jax.random.key(int(rng.integers(1 << 30))), shape, length + 32)
    queries = jnp.asarray(rng.normal(size=(length + 32, shape.n, shape.h)), jnp.bfloat16)
    sink = jnp.asarray(rng.normal(size=shape.n), jnp.float32) if shape.sink else None
    run = functools.partial(decode_attention_mosaic, window=shape.window)
    known: dict[int, np.ndarray] = {}
    for t in (8, 1, 3, 16):
        if shape.window is not None and rows < shape.window + t - 1:
            continue
        start = int(rng.integers(length - 40, length - 16))
        first, moved, far = None, 0, 0.0
        arguments = block(past, queries, start, t, t, rows)
        poison(1)
        first = np.asarray(run(*arguments, sink))
        wanted = decode_attention_reference(*arguments, shape.window, sink)
        far = distance(first.astype(np.float32), np.asarray(wanted, np.float32))
        for _ in range(_RUNS):
            moved += not np.array_equal(first, np.asarray(run(*arguments, sink)))
        for slot in range(t):
            known.setdefault(start + slot, first[0, slot])
        same, drawn = independence(rng, run, known, past, queries, sink, t, rows)
        yield {
            "shape": job["shape"], "length": length, "t": t, "distance": far,
            "finite": bool(np.isfinite(first.astype(np.float32)).all()),
            "same_bits": not moved, "runs_that_moved": moved, "independent": f"{same}/{drawn}",
        }  # fmt: skip


def block(past, queries, start: int, t: int, live: int, rows: int):
    """Arguments for the block of positions start ... start + t - 1, of which `live` are cached."""
    keys, values = cache_of(past, jnp.int32(start + live), rows)
    number = functools.partial(jnp.asarray, dtype=jnp.int32)
    return queries[None, start : start + t], keys, values, number([start]), number([live])


def independence(rng, run, known, past, queries, sink, t: int, rows: int):
    """How many rows of known positions keep their bits in other slots of other blocks."""
    same = drawn = 0
    for _ in range(_DRAWS):
        position = int(rng.choice(list(known)))
        slot = int(rng.integers(t))
        live = int(rng.integers(slot + 1, t + 1))
        start = position - slot
        q, keys, values, begin, count = block(past, queries, start, t, live, rows)
        noise = jax.random.normal(jax.random.key(int(rng.integers(1 << 30))), q.shape)
        q = noise.astype(q.dtype).at[:, slot].set(q[:, slot])
        out = np.asarray(run(q, keys, values, begin, count, sink))[0, slot]
        same, drawn = same + np.array_equal(out, known[position]), drawn + 1
    return same, drawn


# --- time -----------------------------------------------------------------------------------------


def xla_attention(q, keys, values, start, live, sink, window):
    """What the model runs without kernels: masks and `attend`."""
    row = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
    visible = causal(row, positions(start + live, keys.shape[2]), window)
    return attend(q, keys, values, visible, sink)


@functools.partial(
    jax.jit, static_argnames=("way", "window", "launch", "repeats"), compiler_options=GPU_OPTIONS
)
def layers(q, caches, start, live, sink, flush, way, window, launch=None, repeats=_REPEATS):
    """Many layers in a row, each on the output of the one before, over and over: one CUDA graph."""

    def one(q, keys, values):
        if way == "kernel":
            arguments = q, keys, values, start, live, sink
            return decode_attention_mosaic(*arguments, window=window, launch=launch)
        if way == "xla":
            return xla_attention(q, keys, values, start, live, sink, window)
        return q[..., : values.shape[-1]]

    def all_layers(_, q):
        for keys, values in caches:
            mixed = one(q, keys, values)
            wide = jnp.pad(mixed, ((0, 0),) * 3 + ((0, q.shape[-1] - mixed.shape[-1]),))
            q = jax.lax.optimization_barrier((q * 0.5 + wide).astype(q.dtype))
        if flush is not None:
            # Depends on q, so that it is not moved out of the loop.
            read = jnp.max(flush + q[0, 0, 0, 0].astype(flush.dtype))
            q = jnp.where(read < 0, jnp.zeros_like(q), q)
        return q

    return jax.lax.fori_loop(0, repeats, all_layers, q)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def make_caches(key, shape: Shape, rows: int, count: int):
    """Random caches of layers."""

    def one(key, d):
        return jax.random.normal(key, (1, shape.k, rows, d), jnp.bfloat16)

    keys = jax.random.split(key, (count, 2))
    return [(one(a, shape.h), one(b, shape.v)) for a, b in keys]


def net(q, caches, start, t, sink, flush, way, window, launch=None) -> dict:
    """Microseconds a layer, with and without what the program takes without attention."""
    number = functools.partial(jnp.asarray, dtype=jnp.int32)
    arguments = q, caches, number([start]), number([t]), sink, flush
    known = dict(window=window, launch=launch)
    took, empty = (
        seconds(functools.partial(layers, way=w, **known), *arguments, queue=1, rounds=5)
        / (len(caches) * _REPEATS)
        for w in (way, "none")
    )
    return {"us": (took - empty) * 1e6, "us_with_glue": took * 1e6}


def flush_data(cold: bool):
    """128 MB to read."""
    return jnp.ones((64 * _MEGA,), jnp.bfloat16) if cold else None


def random_inputs(rng, shape: Shape, t: int):
    """Queries and sinks."""
    q = jnp.asarray(rng.normal(size=(1, t, shape.n, shape.h)), jnp.bfloat16)
    return q, jnp.asarray(rng.normal(size=shape.n), jnp.float32) if shape.sink else None


def time_layers(rng, job: Job):
    """One way at one length, its caches no longer than that."""
    shape, t = SHAPES[job["shape"]], job["t"]
    length = job.get("length", 1024)
    rows, start = shape.rows(length, max(t, 8)), length - t
    count = 16 if rows < 2048 else 8
    caches = make_caches(jax.random.key(0), shape, rows, count)
    q, sink = random_inputs(rng, shape, t)
    found = net(q, caches, start, t, sink, flush_data(job["cold"]), job["way"], shape.window)
    known = {k: job[k] for k in ("shape", "t", "way", "cold", "length") if k in job}
    yield {**known, **found, **rate(shape, min(rows, start + t), found["us"])}


def rate(shape: Shape, rows: int, us: float) -> dict:
    """GB/s of the cache's bytes that must be read, and their share of the read bandwidth."""
    speed = rows * shape.k * (shape.h + shape.v) * 2 / max(us, 1e-3) / 1e3
    return {"GB/s": speed, "share": speed / _READ_GB_S}


def time_lengths(rng, job: Job):
    """One launch at many lengths of caches of 1 M positions: one compilation."""
    shape, t, launch = SHAPES[job["shape"]], job["t"], LAUNCHES[job["launch"]]
    rows = shape.rows(_MEGA, 64)
    caches = make_caches(jax.random.key(0), shape, rows, 8)
    q, sink = random_inputs(rng, shape, t)
    for length in (1024, 4096, 32768, 131072, 200000, 262144, _MEGA):
        flush = flush_data(length <= 32768)
        found = net(q, caches, length - t, t, sink, flush, "kernel", shape.window, launch)
        yield {
            **{k: job[k] for k in ("shape", "t", "launch")}, "length": length, **found,
            **rate(shape, length, found["us"]),
        }  # fmt: skip
