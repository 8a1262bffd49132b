"""Jobs of `mimo bench kernels --only prefill`: attention of a prompt's chunk, other ways beside.

Times are of one program of layers in a row, each depending on the last; what it takes without
attention is measured too and taken off. FLOPs are those that are needed: of keys that a query sees.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.bench.kernel_cases import Job
from mimo_jax.bench.kernel_jobs import distance, poison, seconds
from mimo_jax.cache import ROWS
from mimo_jax.decode.program import GPU_OPTIONS
from mimo_jax.model.attention import attend, causal
from pallas_kernels.attention.shapes import SHAPES, Shape
from pallas_kernels.prefill_attention import ALIGN
from pallas_kernels.prefill_attention.blocks import prefill_attention_blocks
from pallas_kernels.prefill_attention.mosaic_gpu import Launch, prefill_attention_mosaic
from pallas_kernels.prefill_attention.reference import prefill_attention_reference

LAUNCHES: dict[str, Launch] = {
    "kernel": Launch(),
    "kernel-no-turns": Launch(turns=False),
    "kernel-64": Launch(tile=64),
    "kernel-64-no-turns": Launch(tile=64, turns=False),
    "kernel-64-3": Launch(tile=64, turns=False, warpgroups=3),
}
"""Ways to run the kernel. The tile changes bits, nothing else does."""
_RUNS = 20
_CUTS = 12
_MOST_SCORES = 2 << 30
"""Of XLA's `attend`: four bytes each, twice."""
_LONG = 1 << 18


def jobs(check: bool, time: bool) -> list[Job]:
    """From safe to risky: windows, then long caches; checks before times."""
    return (checks() if check else []) + (times() if time else [])


def checks() -> list[Job]:
    """Chunks at the beginning, across a tile's end, late; ragged ones."""
    return [
        {"job": "prefill-check", "shape": shape, "t": t, "start": start, "live": live}
        for shape, t, start, live in (
            ("pro-tp8-window", 256, 0, 256),
            ("pro-tp8-window", 256, 1000, 201),
            ("nano-window", 64, 300, 64),
            ("pro-tp8-full", 64, 0, 64),
            ("pro-tp8-full", 256, 1000, 201),
            ("nano-full", 64, 1504, 60),
            ("flash-full", 128, 777, 128),
            ("pro-tp8-full", 1024, 7168, 1024),
        )
    ]


def times() -> list[Job]:
    """Chunks of 64 to 2,048 rows, prompts up to 256 K; other ways where they can run."""

    def job(shape, t, start, way):
        return {"job": "prefill-time", "shape": shape, "t": t, "start": start, "way": way}

    found = [job("pro-tp8-window", t, 1 << 13, "kernel") for t in (256, 2048)]
    found += [job("pro-tp8-window", 2048, 1 << 13, way) for way in ("blocks", "xla")]
    places = [(256, 0), (1024, 0), (2048, 0), (2048, 30720), (1024, _LONG - 1024)]
    places += [(512, _LONG - 512), (2048, _LONG - 2048)]
    found += [job("pro-tp8-full", t, start, "kernel") for t, start in places]
    found += [job("pro-tp8-full", 2048, 30720, way) for way in (*LAUNCHES, "blocks", "xla")]
    found += [job("pro-tp8-full", 1024, 0, way) for way in ("blocks", "xla")]
    found += [job("pro-full", 1024, 31744, "kernel"), job("nano-full", 256, 1792, "kernel")]
    return found


def do(rng, job: Job, held: dict):
    """Yields the results of a job."""
    held.clear()
    yield (check if job["job"] == "prefill-check" else time_layers)(rng, job)


def first_row(shape: Shape, start: int) -> int:
    """Position of the keys' first row, as the model has them."""
    return 0 if shape.window is None else (start - shape.window + 1) // ALIGN * ALIGN


def inputs(rng, shape: Shape, t: int, start: int, live: int, slack: int = 64):
    """Arguments of the kernel; rows of keys that no query sees are NaN."""
    first = first_row(shape, start)
    # Of a full cache whole pieces, as `mimo_jax.cache` has them.
    held, piece = (start + t - first, ALIGN) if shape.window else (start + t + slack, ROWS)
    rows = -(-held // piece) * piece
    keys = jax.random.split(jax.random.key(int(rng.integers(1 << 30))), 3)
    place = first + jnp.arange(rows)
    hidden = (place < 0) | (place >= start + live)
    if shape.window is not None:
        hidden |= place <= start - shape.window

    def cache(key, d):
        found = jax.random.normal(key, (1, shape.k, rows, d), jnp.bfloat16)
        return jnp.where(hidden[:, None], jnp.bfloat16(jnp.nan), found)

    number = functools.partial(jnp.asarray, dtype=jnp.int32)
    return (
        jax.random.normal(keys[0], (1, t, shape.n, shape.h), jnp.bfloat16),
        cache(keys[1], shape.h),
        cache(keys[2], shape.v),
        number([start]),
        number([live]),
        number([first]) if shape.window else None,
        jnp.asarray(rng.normal(size=shape.n), jnp.float32) if shape.sink else None,
    )


def check(rng, job: Job) -> dict:
    """Distance to the reference, equal bits over runs, launches and cuts of the prompt."""
    shape, t, start, live = SHAPES[job["shape"]], job["t"], job["start"], job["live"]
    arguments = inputs(rng, shape, t, start, live)
    wanted = jax.jit(prefill_attention_reference, static_argnums=6)(
        *arguments[:6], shape.window, arguments[6]
    )[:, :live]
    run = functools.partial(prefill_attention_mosaic, window=shape.window)
    poison()
    first = np.asarray(run(*arguments))[:, :live]
    moved = sum(
        not np.array_equal(first, np.asarray(run(*arguments))[:, :live]) for _ in range(_RUNS)
    )
    other = np.asarray(run(*arguments, launch=LAUNCHES["kernel-no-turns"]))[:, :live]
    blocks = prefill_attention_blocks(*arguments, window=shape.window)[:, :live]
    same, drawn = cuts(rng, run, arguments, first, live)
    return {
        **{k: job[k] for k in ("shape", "t", "start", "live")},
        "distance": distance(first, wanted), "blocks_distance": distance(blocks, wanted),
        "same_bits": not moved, "runs_that_moved": moved,
        "turns_same_bits": bool(np.array_equal(first, other)), "independent": f"{same}/{drawn}",
    }  # fmt: skip


def cuts(rng, run, arguments, whole, live: int) -> tuple[int, int]:
    """How many other chunks give the rows that they share with this one the same bits."""
    q, keys, values, start, _, first, sink = arguments
    same = 0
    for _ in range(_CUTS):
        low = int(rng.integers(live - 1))
        size = int(rng.integers(1, live - low + 1))
        size = min(size, 8) if rng.integers(2) else size
        # All sizes in chunks of the same shape: the rows beyond are dead.
        part = jnp.roll(q, -low, axis=1)
        count = jnp.asarray([size], jnp.int32)
        out = np.asarray(run(part, keys, values, start + low, count, first, sink))[:, :size]
        same += np.array_equal(out, whole[:, low : low + size])
    return same, _CUTS


def flops(shape: Shape, t: int, start: int) -> float:
    """Of both products, for keys that a query sees."""
    seen = np.arange(start + 1, start + t + 1, dtype=np.float64)
    if shape.window is not None:
        seen = np.minimum(seen, shape.window)
    return 2.0 * shape.n * (shape.h + shape.v) * float(seen.sum())


def one(way: str, window, q, keys, values, start, live, first, sink):
    """One layer's attention."""
    if way in LAUNCHES:
        arguments = q, keys, values, start, live, first, sink
        return prefill_attention_mosaic(*arguments, window=window, launch=LAUNCHES[way])
    if way == "blocks":
        arguments = q, keys, values, start, live, first, sink
        return prefill_attention_blocks(*arguments, window=window)
    if way == "xla":
        row = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
        place = jnp.arange(keys.shape[2], dtype=jnp.int32)[None]
        place = place if first is None else place + first[:, None]
        return attend(q, keys, values, causal(row, place, window), sink)
    return q[..., : values.shape[-1]]


@functools.partial(
    jax.jit, static_argnames=("way", "window", "repeats"), compiler_options=GPU_OPTIONS
)
def layers(arguments, way: str, window: int | None, repeats: int):
    """Layers in a row, each with the queries that the one before made."""
    q, *rest = arguments

    def step(_, q):
        mixed = one(way, window, q, *rest)
        wide = jnp.pad(mixed, ((0, 0),) * 3 + ((0, q.shape[-1] - mixed.shape[-1]),))
        return jax.lax.optimization_barrier((q * 0.5 + wide).astype(q.dtype))

    return jax.lax.fori_loop(0, repeats, step, q)


def time_layers(rng, job: Job) -> dict:
    """Microseconds of a layer's attention, and its rate."""
    shape, t, start, way = SHAPES[job["shape"]], job["t"], job["start"], job["way"]
    known = {k: job[k] for k in ("shape", "t", "start", "way")}
    arguments = inputs(rng, shape, t, start, t)
    if way == "xla" and shape.n * t * arguments[1].shape[2] > _MOST_SCORES:
        return {**known, "skipped": "its scores would not fit"}
    # What is not seen must be finite for XLA's way, and costs nothing in any.
    arguments = tuple(x if x is None or x.ndim < 4 else jnp.nan_to_num(x) for x in arguments)
    work = flops(shape, t, start)
    # About 20 ms at a good rate.
    repeats = int(np.clip(20e-3 * 400e12 / work, 2, 50))
    took, empty = (
        seconds(functools.partial(layers, way=w, window=shape.window, repeats=repeats), arguments,
                queue=1, rounds=5) / repeats
        for w in (way, "none")
    )  # fmt: skip
    us = (took - empty) * 1e6
    return {**known, "us": us, "us_with_glue": took * 1e6, "TFLOP/s": work / max(us, 1e-3) / 1e6}
