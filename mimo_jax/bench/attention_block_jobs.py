"""Jobs of `mimo bench kernels --only attention`: a layer's block, from its projection to its heads.

The fused launches against the reference, and in time beside the same with XLA's rotation and write
before the kernel ("apart"), and XLA alone ("xla").
"""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.bench.kernel_cases import Job
from mimo_jax.bench.kernel_jobs import distance, poison
from mimo_jax.cache import LayerCache
from mimo_jax.decode.program import GPU_OPTIONS
from mimo_jax.model.attention import attend, causal
from mimo_jax.model.layers import rope
from pallas_kernels.attention.mosaic_gpu import block_attention_mosaic, decode_attention_mosaic
from pallas_kernels.attention.reference import block_attention_reference, positions
from pallas_kernels.attention.shapes import SHAPES, Shape

SCALE, THETA = 0.707, 10000.0
_RUNS, _DRAWS, _REPEATS, _ROUNDS = 50, 60, 20, 7


def checks() -> list[Job]:
    """Lengths at which blocks lie across the end of a ring, or of a chunk."""
    return [
        {"job": "attention-block-check", "shape": shape, "length": length}
        for shape, length in (
            ("pro-tp8-window", 300),
            ("nano-window", 300),
            ("flash-window", 60),
            ("pro-tp8-full", 420),
            ("nano-full", 420),
            ("flash-full", 100),
        )
    ]


def times() -> list[Job]:
    """Rings, then long caches."""
    return [
        {"job": "attention-block-time", "shape": shape, "t": t, "length": length, "way": way}
        for shape, t, length in (
            ("pro-tp8-window", 8, 1024),
            ("pro-tp8-window", 1, 1024),
            ("pro-tp8-window", 16, 1024),
            ("pro-tp8-full", 8, 1024),
            ("pro-tp8-full", 8, 32768),
        )
        for way in ("kernel", "apart", "xla")
    ]


def half_of(shape: Shape) -> int:
    """Half of the columns that are rotated: as MiMo's partial_rotary_factor has it."""
    return int(shape.h * 0.334) // 2


def angles(place, half: int):
    """Cosines and sines [b, t, half] of positions [b, t]."""
    frequencies = THETA ** (-jnp.arange(half, dtype=jnp.float32) / half)
    found = place[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(found), jnp.sin(found)


# --- correctness ----------------------------------------------------------------------------------


class History:
    """All positions of one sequence: what was projected, and what the kernel cached of it."""

    def __init__(self, rng, shape: Shape, length: int, rows: int, run: Callable):
        self.shape, self.rows, self.run = shape, rows, run
        width = (shape.n // shape.k + 1) * shape.h + shape.v
        self.fused = jnp.asarray(rng.normal(size=(length, shape.k, width)), jnp.bfloat16)
        sizes = [(1, shape.k, length, d) for d in (shape.h, shape.v)]
        self.past = [jnp.full(size, jnp.nan, jnp.bfloat16) for size in sizes]
        for start in range(0, length - 7, 8):
            place = np.arange(start, start + 8)
            _, *cache = run(*self.block(start, 8, 8))
            self.past = [
                x.at[:, :, place].set(held[:, :, place % rows])
                for x, held in zip(self.past, cache, strict=True)
            ]

    def block(self, start: int, t: int, live: int, fused=None):
        """Arguments for positions start ... start + t - 1, on the cache before them."""
        place = jnp.arange(start, start + t, dtype=jnp.int32)[None]
        number = functools.partial(jnp.asarray, dtype=jnp.int32)
        cache = cache_before(self.past, jnp.int32(start), self.rows)
        fused = self.fused[None, start : start + t] if fused is None else fused
        return (
            fused, *angles(place, half_of(self.shape)), *cache, number([start]), number([live]),
        )  # fmt: skip


@functools.partial(jax.jit, static_argnums=2)
def cache_before(past, end, rows: int):
    """The cache after all positions before `end`; rows that hold none are NaN."""
    place = positions(end[None], rows)[0]
    there = ((place >= 0) & (place < end))[:, None]
    place = jnp.clip(place, 0, past[0].shape[2] - 1)
    return tuple(jnp.where(there, x[:, :, place], jnp.nan) for x in past)


def bits(arrays) -> list[np.ndarray]:
    """NaNs are equal to themselves."""
    return [np.asarray(x).view(np.uint16) for x in arrays]


def check(rng, job: Job):
    """Distances to the reference, rows written, equal bits over runs and in other blocks.

    Yields:
      a result for each t: `independent` counts blocks in which a position's heads and cached row,
      in any slot, with others beside it and NaN in rows unwritten, had the bits of the first's.
    """
    shape, length = SHAPES[job["shape"]], job["length"]
    rows = shape.rows(length + 48, 16)
    sink = jnp.asarray(rng.normal(size=shape.n), jnp.bfloat16) if shape.sink else None
    options = dict(window=shape.window, value_scale=SCALE)
    kernel = functools.partial(block_attention_mosaic, sink=sink, **options)
    poison(1)
    past = History(rng, shape, length + 32, rows, kernel)
    known: dict[int, np.ndarray] = {}
    for t in (8, 1, 3, 16):
        start = int(rng.integers(length - 40, length - 16))
        arguments = past.block(start, t, t)
        found = kernel(*arguments)
        moved = sum(not same(found, kernel(*arguments)) for _ in range(_RUNS))
        wanted = block_attention_reference(*arguments, sink, **options)
        for slot in range(t):
            known.setdefault(start + slot, bits(found)[0][0, slot])
        counts = independence(rng, past, known, t)
        yield {
            "shape": job["shape"], "length": length, "t": t,
            **compared(arguments, found, wanted, start, t),
            "same_bits": not moved, "runs_that_moved": moved, "independent": counts,
        }  # fmt: skip


def same(found, other) -> bool:
    """Whether all bits are."""
    return all(np.array_equal(*pair) for pair in zip(bits(found), bits(other), strict=True))


def compared(arguments, found, wanted, start: int, t: int) -> dict:
    """Relative distances, and whether other rows of the cache are as they were."""
    rows = (start + np.arange(t)) % arguments[3].shape[2]
    near, kept = [], True
    for before, after, right in zip(arguments[3:5], found[1:], wanted[1:], strict=True):
        near.append(distance(*(np.asarray(x[:, :, rows], np.float32) for x in (after, right))))
        old, new = (np.delete(x, rows, axis=2) for x in bits((before, after)))
        kept &= np.array_equal(old, new)
    heads = distance(*(np.asarray(x[0], np.float32) for x in (found, wanted)))
    finite = bool(np.isfinite(np.asarray(found[0], np.float32)).all())
    return {
        "distance": heads, "keys": near[0], "values": near[1], "kept": kept, "finite": finite,
    }  # fmt: skip


def independence(rng, past: History, known, t: int) -> str:
    """How many rows of known positions keep their bits in other slots of other blocks."""
    good = 0
    queries = past.shape.n // past.shape.k * past.shape.h
    for _ in range(_DRAWS):
        position, slot = int(rng.choice(list(known))), int(rng.integers(t))
        live, start = int(rng.integers(slot + 1, t + 1)), position - slot
        fused = past.fused[None, start : start + t]
        noise = jax.random.normal(jax.random.key(int(rng.integers(1 << 30))), fused.shape)
        noise = noise.astype(fused.dtype).at[:, slot].set(fused[:, slot])
        # Keys and values before the row are its own past.
        noise = noise.at[:, :slot, :, queries:].set(fused[:, :slot, :, queries:])
        heads, *cache = past.run(*past.block(start, t, live, noise))
        own = [x[:, :, position % past.rows] for x in cache]
        first = [x[:, :, position] for x in past.past]
        good += np.array_equal(bits([heads])[0][0, slot], known[position]) and same(own, first)
    return f"{good}/{_DRAWS}"


# --- time -----------------------------------------------------------------------------------------


def xla_block(qkv, keys, values, start, live, sink, window, kernel: bool):
    """What the model runs without fused launches: rotation, write, then a kernel or `attend`."""
    (b, t, _, width), h, v = qkv.shape, keys.shape[3], values.shape[3]
    split, rows = width - h - v, jnp.arange(t, dtype=jnp.int32)
    rotary, place = 2 * (int(h * 0.334) // 2), start[:, None] + rows
    q = rope(qkv[..., :split].reshape(b, t, -1, h), place, THETA, rotary)
    k = rope(qkv[..., split : split + h], place, THETA, rotary)
    new = qkv[..., split + h :] * jnp.asarray(SCALE, qkv.dtype)
    cache = LayerCache(keys, values).write(k, new, start, rows < live[:, None])
    if kernel:
        arguments = q, cache.keys, cache.values, start, live, sink
        return decode_attention_mosaic(*arguments, window=window), cache.keys, cache.values
    visible = causal(place, cache.positions(start + live), window)
    return attend(q, cache.keys, cache.values, visible, sink), cache.keys, cache.values


@functools.partial(
    jax.jit,
    static_argnames=("way", "window", "repeats"),
    donate_argnames=("caches",),
    compiler_options=GPU_OPTIONS,
)
def block_layers(qkv, cos, sin, caches, start, live, sink, way, window, repeats=_REPEATS):
    """Many layers in a row, their caches carried by a loop: one CUDA graph."""

    def one(qkv, keys, values):
        if way == "none":
            return qkv[..., : values.shape[-1]], keys, values
        if way == "kernel":
            options = dict(window=window, value_scale=SCALE)
            arguments = qkv, cos, sin, keys, values, start, live, sink
            return block_attention_mosaic(*arguments, **options)
        return xla_block(qkv, keys, values, start, live, sink, window, way == "apart")

    def all_layers(_, carry):
        qkv, caches = carry
        written = []
        for cache in caches:
            heads, *cache = one(qkv, *cache)
            written.append(tuple(cache))
            heads = heads.reshape(*qkv.shape[:3], -1)
            wide = jnp.pad(heads, ((0, 0),) * 3 + ((0, qkv.shape[3] - heads.shape[3]),))
            qkv = jax.lax.optimization_barrier((qkv * 0.5 + wide).astype(qkv.dtype))
        return qkv, written

    return jax.lax.fori_loop(0, repeats, all_layers, (qkv, caches))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_caches(shape: Shape, rows: int, count: int):
    """Random caches of layers."""
    keys = jax.random.split(jax.random.key(0), (count, 2))
    return [
        tuple(
            jax.random.normal(key, (1, shape.k, rows, d), jnp.bfloat16)
            for key, d in zip(pair, (shape.h, shape.v), strict=True)
        )
        for pair in keys
    ]


def time_layers(rng, job: Job):
    """One way: microseconds a layer, with and without what the program takes without attention."""
    shape, t, length = SHAPES[job["shape"]], job["t"], job["length"]
    rows = shape.rows(length, max(t, 8))
    width = (shape.n // shape.k + 1) * shape.h + shape.v
    qkv = jnp.asarray(rng.normal(size=(1, t, shape.k, width)), jnp.bfloat16)
    sink = jnp.asarray(rng.normal(size=shape.n), jnp.bfloat16) if shape.sink else None
    start = jnp.asarray([length - t], jnp.int32)
    cos, sin = angles(start[:, None] + jnp.arange(t, dtype=jnp.int32), half_of(shape))
    count = 16 if rows < 2048 else 8
    took = {}
    for way in (job["way"], "none"):
        caches, spans = make_caches(shape, rows, count), []
        for _ in range(_ROUNDS + 1):
            jax.block_until_ready(caches)
            begin = time.perf_counter()
            known = start, jnp.asarray([t], jnp.int32), sink, way, shape.window
            out, caches = block_layers(qkv, cos, sin, caches, *known)
            jax.block_until_ready(out)
            spans.append((time.perf_counter() - begin) / (count * _REPEATS))
        took[way] = statistics.median(spans[1:])
    known = {k: job[k] for k in ("shape", "t", "length", "way")}
    us = (took[job["way"]] - took["none"]) * 1e6
    yield {**known, "us": us, "us_with_glue": took[job["way"]] * 1e6}
