"""The work of `mimo bench kernels` on a GPU: one function for each kind of job, JSON out.

Times are of one program of many layers in a row, each depending on the last (its residual sum is
fused with the kernel's own sum over choices), so that launches are a CUDA graph's and the host
plays no part. Expert ids differ from layer to layer, so that L2 does not help. The bandwidth of a
read-only reduction is measured in the same run.
"""

import dataclasses
import functools
import glob
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.bench.kernel_cases import LAUNCHES, Job
from mimo_jax.bench.kernel_lines import read_stamps
from mimo_jax.decode.program import GPU_OPTIONS
from pallas_kernels.expert_ffn import ExpertWeights
from pallas_kernels.expert_ffn.layout import (
    BARRIER_WORDS,
    KernelWeights,
    Plan,
    pack_experts,
    plan_for,
)
from pallas_kernels.expert_ffn.mosaic_gpu import (
    Launch,
    expert_ffn_mosaic,
    run_flow,
    run_ids,
    run_slots,
)
from pallas_kernels.expert_ffn.reference import expert_ffn_reference
from pallas_kernels.expert_ffn.shapes import SHAPES, Shape
from pallas_kernels.expert_ffn.slots import make_slots, sum_choices
from pallas_kernels.mxfp4 import decode

_LAYERS = 8
_PASSES = 6
"""Over the layers in one iteration of a loop, so that its own cost is spread over many launches."""
_REPEATS = 4, 24
"""Iterations of a short and of a long call."""
_ROUNDS = 7
_RUNS = 50
_DRAWS = 200


def seconds(function, *args, rounds: int = _ROUNDS, queue: int = 4) -> float:
    """Median time of a call when several are queued, so that the host's share is hidden."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(queue):
            out = function(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / queue)
    return statistics.median(times)


def seconds_each(function, *args, count: int) -> float:
    """Time of one of `count` layers in an iteration of function(*args, repeats=n).

    It is the difference of a long and a short call, in which what the host does for a call has no
    part. Short calls had taken 4 to 9 us a layer more than the profiler gave their kernels.
    """
    short, long = (
        seconds(functools.partial(function, repeats=n), *args, queue=1) for n in _REPEATS
    )
    return (long - short) / (count * (_REPEATS[1] - _REPEATS[0]))


def random_words(key, shape: tuple[int, ...], plan: Plan):
    """Random codes, and scales between 2^-9 and 2^-6, in the kernel's order."""
    words = jax.random.bits(key, shape, jnp.uint32)
    flat = (
        jnp.arange(plan.stage_words, dtype=jnp.uint32).reshape(plan.stage_shape) >= plan.code_words
    )
    return jnp.where(flat, (words & jnp.uint32(0x03030303)) + jnp.uint32(0x76767676), words)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_kernel_weights(key, experts, up: Plan, down: Plan) -> KernelWeights:
    """One layer's experts, made on the device."""
    keys = jax.random.split(key)
    return KernelWeights(
        random_words(keys[0], (experts, *up.packed_shape), up),
        random_words(keys[1], (experts, *down.packed_shape), down),
        jnp.zeros(BARRIER_WORDS, jnp.uint32),
        up,
        down,
    )


def routings(rng, shape: Shape, t: int, active: int | None, zipf: float = 0.0, layers=_LAYERS):
    """Ids [layers, t, c] and shares; with `active`, exactly so many distinct experts a layer."""
    weight = 1.0 / np.arange(1, shape.e + 1) ** zipf
    ids = []
    while len(ids) < layers:
        score = np.log(weight[rng.permutation(shape.e)]) + rng.gumbel(size=(t, shape.e))
        layer = np.argsort(-score, axis=1)[:, : shape.c]
        if active is None or len(np.unique(layer)) == active:
            ids.append(layer)
    ids = np.asarray(ids, np.int32)
    return ids, rng.dirichlet(np.ones(shape.c), (layers, t)).astype(np.float32)


# --- correctness ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_checkpoint(key, shape: Shape, experts: int, scales=(118, 122)) -> ExpertWeights:
    """MXFP4 experts in the checkpoint's order, made on the device."""
    keys = iter(jax.random.split(key, 4))

    def matrix(*dims):
        codes = jax.random.bits(next(keys), (*dims[:-1], dims[-1] // 2), jnp.uint8)
        blocks = (*dims[:-1], dims[-1] // 32)
        return codes, jax.random.randint(next(keys), blocks, *scales).astype(jnp.uint8)

    gate_up, gate_up_scale = matrix(experts, 2, shape.f, shape.d)
    down, down_scale = matrix(experts, shape.d, shape.f)
    return ExpertWeights(gate_up, down, gate_up_scale, down_scale)


def distance(out, ref) -> float:
    """Relative norm."""
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    return float(np.linalg.norm(out - ref) / np.linalg.norm(ref))


def poison(gib: int = 2) -> None:
    """Fills memory that the next programs get with NaN, so that what they leave unwritten shows."""
    jax.block_until_ready(jnp.full(gib << 28, jnp.nan, jnp.float32)).delete()


def check(rng, job: Job):
    """Distance to the reference, equal bits over runs, rows that mind their own business.

    Yields:
      a result for each launch; `like_first` says whether its bits are those of the job's first.
    """
    shape = dataclasses.replace(SHAPES[job["shape"]], e=job["experts"])
    t, experts = job["t"], job["experts"]
    key = jax.random.key(int(rng.integers(1 << 30)))
    weights = random_checkpoint(key, shape, experts, tuple(job["scales"]))
    packed = jax.jit(pack_experts)(weights)
    x = jnp.asarray(rng.normal(size=(t, shape.d)), jnp.bfloat16)
    ids, shares = (a[0] for a in routings(rng, shape, t, None))
    if t > 1:
        ids[0, 0], ids[1, 1] = experts, ids[1, 2]  # a dead choice and a double one
    with jax.default_matmul_precision("highest"):
        wide = x.astype(jnp.float32)  # Nothing is rounded, not hidden values either.
        ref = jax.jit(expert_ffn_reference)(wide, weights, jnp.asarray(ids), jnp.asarray(shares))
    others = other_blocks(rng, shape, x, ids, shares) if t > 1 else []
    firsts = []
    for name in job["launches"]:
        run = jax.jit(functools.partial(expert_ffn_mosaic, launch=LAUNCHES[name]))
        poison(job.get("poison_gib", 2))
        first = np.asarray(run(x, packed, ids, shares))
        firsts.append(first)
        moved = [
            int((first != np.asarray(run(x, packed, ids, shares))).sum()) for _ in range(_RUNS)
        ]
        own = sum(
            np.array_equal(
                np.asarray(run(block, packed, block_ids, block_shares))[slot], first[row]
            )
            for block, block_ids, block_shares, slot, row in others
        )
        yield {
            **{k: job[k] for k in ("shape", "t", "experts", "scales")}, "launch": name,
            "distance": distance(first, ref), "same_bits": not any(moved),
            "runs_that_moved": sum(map(bool, moved)), "most_elements_moved": max(moved),
            "independent": f"{own}/{len(others)}",
            "like_first": bool(np.array_equal(first, firsts[0])),
        }  # fmt: skip


def other_blocks(rng, shape: Shape, x, ids, shares) -> list[tuple]:
    """Blocks that hold one of x's rows, with its routing, among others: arguments, slot and row."""
    t, blocks = x.shape[0], []
    all_ids, all_shares = routings(rng, shape, t, None, layers=_DRAWS)
    noise = jax.random.normal(jax.random.key(int(rng.integers(1 << 30))), (t + 7, shape.d))
    noise = noise.astype(jnp.bfloat16)
    for other_ids, other_shares in zip(all_ids, all_shares, strict=True):
        row, slot, start = rng.integers(t), rng.integers(t), rng.integers(8)
        other_ids[slot], other_shares[slot] = ids[row], shares[row]
        block = place_row(noise, x, start, slot, row)
        blocks.append((block, jnp.asarray(other_ids), jnp.asarray(other_shares), slot, row))
    return blocks


@jax.jit
def place_row(noise, x, start, slot, row):
    """Row `row` of x as row `slot` of a block of noise."""
    return jax.lax.dynamic_slice_in_dim(noise, start, x.shape[0]).at[slot].set(x[row])


# --- time -----------------------------------------------------------------------------------------


def read_bandwidth(gib: int = 4) -> float:
    """GB/s of a max-reduction over random data."""
    data = jax.jit(lambda k: jax.random.bits(k, (gib << 28,), jnp.uint32))(jax.random.key(1))
    return data.nbytes / seconds(jax.jit(jnp.max), data) / 1e9


def once(x, weights, ids, shares, slots, launch: Launch, hooks):
    """x and one layer's sum, which one launch adds itself; with a time line, its stamps."""
    if launch.fused:
        out = run_flow(x, weights, ids, shares, x, launch=launch, hooks=hooks)
        return out["y"], out.get("stamps")
    if launch.own_list:
        results = run_ids(x, weights, ids, shares, launch=launch, hooks=hooks)
    else:
        results = run_slots(x, weights, slots, launch=launch, hooks=hooks)
    total = sum_choices(results, slots.live)
    return (x.astype(jnp.float32) + total).astype(jnp.bfloat16), None


@functools.partial(jax.jit, static_argnames=("launch", "hooks"), compiler_options=GPU_OPTIONS)
def layers(x, weights, works, launch, hooks=None, repeats=_REPEATS[0]):
    """Many layers in a row, each on the stream of the one before, over and over: one CUDA graph."""

    def all_layers(_, x):
        for ids, shares, slots in works * _PASSES:
            x, _ = once(x, weights, ids, shares, slots, launch, hooks)
        return x

    return jax.lax.fori_loop(0, repeats, all_layers, x)


def inputs(rng, shape: Shape, t: int, active=None, zipf=0.0):
    """x, and ids, shares and work list of each layer; shares so small that x stays as it is."""
    ids, shares = (list(map(jnp.asarray, a)) for a in routings(rng, shape, t, active, zipf))
    shares = [1e-6 * share for share in shares]
    make = jax.jit(make_slots, static_argnums=2)
    works = [(a, b, make(a, b, shape.e)) for a, b in zip(ids, shares, strict=True)]
    return jnp.asarray(rng.normal(size=(t, shape.d)), jnp.bfloat16), works


def time_launch(rng, job: Job, held: dict):
    """Microseconds a layer, in a graph and of the kernels alone, and GB/s of packed weights."""
    shape, weights = SHAPES[job["shape"]], held_weights(job, held)
    x, works = inputs(rng, shape, job["t"], job.get("active"), job.get("zipf", 0.0))
    count = sum(int(slots.count[-1]) for _, _, slots in works) / len(works)
    launch, hooks = LAUNCHES[job["launch"]], hooks_named(job.get("hooks"))
    one = functools.partial(layers, launch=launch, hooks=hooks)
    took = seconds_each(one, x, weights, works, count=len(works) * _PASSES)
    packed = [int(np.prod(p.packed_shape)) * 4 for p in (weights.gate_up_plan, weights.down_plan)]
    known = {k: job[k] for k in ("shape", "launch", "t", "zipf", "hooks") if k in job}
    result = {**known, "slots": count, "us": took * 1e6, "GB/s": count * sum(packed) / took / 1e9}
    kernels = kernel_times(one, x, weights, works)
    alone = sum(us for name, us in kernels.items() if name.startswith("expert"))
    yield {**result, "kernels_us": kernels, "device_us": alone}


def held_weights(job: Job, held: dict) -> KernelWeights:
    """Weights of all experts of a shape, kept for the next job of the same shape and plans."""
    shape = SHAPES[job["shape"]]
    cuts = job.get("up"), job.get("down")
    plans = _plan(2 * shape.f, shape.d, cuts[0]), _plan(shape.d, shape.f, cuts[1])
    if held.get("plans") != (job["shape"], plans):
        held.clear()
        held["weights"] = random_kernel_weights(jax.random.key(0), shape.e, *plans)
        held["plans"] = job["shape"], plans
    return held["weights"]


def _plan(rows: int, columns: int, cut: tuple[int, int, int] | None) -> Plan:
    return Plan(rows, columns, *cut) if cut else plan_for(rows, columns)


def hooks_named(name: str | None):
    """The kernel's hooks, or variants of them that only a benchmark wants."""
    if name is None:
        return None
    from pallas_kernels.expert_ffn import bench_lanes

    return {"folded": bench_lanes.folded, "stream": bench_lanes.Stream}[name]


def time_line(rng, job: Job, held: dict):
    """When each warpgroup of each block began and ended what: one launch after some others."""
    shape, weights = SHAPES[job["shape"]], held_weights(job, held)
    x, works = inputs(rng, shape, job["t"], job.get("active"))
    launch = dataclasses.replace(LAUNCHES[job["launch"]], time_line=True)

    @functools.partial(jax.jit, compiler_options=GPU_OPTIONS)
    def run(x, weights, works):
        for work in works:
            x, stamps = once(x, weights, *work, launch, None)
        return x, stamps

    run(x, weights, works)
    stamps = np.asarray(run(x, weights, works)[1]).astype(np.int64)
    yield {**{k: job[k] for k in ("shape", "t", "launch")}, **read_stamps(stamps)}


def time_list(rng, shape: Shape, t: int) -> float:
    """Microseconds to make the list of active experts, on the device, in a program of many."""

    @jax.jit
    def run(ids, shares):
        for i in range(_LAYERS):
            slots = make_slots(ids[i], shares[i], shape.e)
            # The next list waits for this one, as a layer's does for the layer before.
            shares = shares + slots.share[0, 0] * 0
            ids = ids + slots.count[-1] * 0
        return ids, shares

    ids, shares = map(jnp.asarray, routings(rng, shape, t, None))
    return seconds(run, ids, shares) / _LAYERS * 1e6


def time_xla(rng, shape: Shape, t: int) -> float:
    """Microseconds of dequantize and dot in plain XLA, over active experts' gathered weights."""
    experts = 64
    weights = random_checkpoint(jax.random.key(2), shape, experts)
    ids, shares = routings(rng, dataclasses.replace(shape, e=experts), t, None)
    slots = [
        make_slots(jnp.asarray(i), jnp.asarray(s), experts)
        for i, s in zip(ids[:4], shares[:4], strict=True)
    ]

    @jax.jit
    def run(x, weights, slots):
        for s in slots:
            take = functools.partial(jnp.take, indices=s.expert, axis=0)
            up = decode(take(weights.gate_up), take(weights.gate_up_scale), jnp.bfloat16)
            down = decode(take(weights.down), take(weights.down_scale), jnp.bfloat16)
            wide = jnp.einsum("td,spfd->sptf", x, up, preferred_element_type=jnp.float32)
            # [slots, t]: a slot's lanes are any tokens, unused ones fall off the end.
            rows = jnp.arange(s.token.shape[0])[:, None], jnp.where(s.token < 0, t, s.token)
            share = jnp.zeros((s.token.shape[0], t)).at[rows].add(s.share, mode="drop")
            hidden = jax.nn.silu(wide[:, 0]) * wide[:, 1] * share[..., None]
            y = jnp.einsum(
                "stf,sdf->td", hidden.astype(jnp.bfloat16), down, preferred_element_type=jnp.float32
            )
            x = (x.astype(jnp.float32) + 1e-3 * y).astype(jnp.bfloat16)
        return x

    x = jnp.asarray(rng.normal(size=(t, shape.d)), jnp.bfloat16)
    return seconds(run, x, weights, slots, rounds=3) / len(slots) * 1e6


def time_ragged(rng, shape: Shape, t: int) -> float:
    """Microseconds of XLA's way for many tokens: all experts dequantized, then `ragged_dot`."""
    weights = random_checkpoint(jax.random.key(2), shape, shape.e)
    ids, shares = (jnp.asarray(a[0]) for a in routings(rng, shape, t, None))

    @jax.jit
    def run(x, weights, ids, shares):
        order = jnp.argsort(ids.reshape(-1))
        sizes = jnp.bincount(ids.reshape(-1), length=shape.e).astype(jnp.int32)
        dot = functools.partial(jax.lax.ragged_dot, preferred_element_type=jnp.float32)
        up = decode(weights.gate_up, weights.gate_up_scale, jnp.bfloat16)
        down = decode(weights.down, weights.down_scale, jnp.bfloat16)
        up = up.reshape(shape.e, 2 * shape.f, shape.d).swapaxes(1, 2)
        wide = dot(x[order // shape.c], up, sizes)
        hidden = jax.nn.silu(wide[:, : shape.f]) * wide[:, shape.f :]
        hidden = hidden * shares.reshape(-1)[order][:, None]
        y = dot(hidden.astype(jnp.bfloat16), down.swapaxes(1, 2), sizes)
        return jnp.zeros((t, shape.d)).at[order // shape.c].add(y)

    x = jnp.asarray(rng.normal(size=(t, shape.d)), jnp.bfloat16)
    return seconds(run, x, weights, ids, shares, rounds=3, queue=2) * 1e6


def kernel_times(function, *args) -> dict[str, float]:
    """Median device microseconds of each kernel by name, from the profiler."""
    folder = tempfile.mkdtemp()
    with jax.profiler.trace(folder):
        jax.block_until_ready(function(*args))
    found: dict[str, list[float]] = {}
    for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        found.setdefault(event.name, []).append(event.duration_ns / 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


# --- jobs -----------------------------------------------------------------------------------------


def do(rng, job: Job, held: dict):
    """Yields the results of a job."""
    kind, shape = job["job"], SHAPES.get(job.get("shape", ""))
    if kind != "time" and kind != "line":
        held.clear()
    if kind == "check":
        yield from check(rng, job)
    elif kind == "time":
        yield from time_launch(rng, job, held)
    elif kind == "line":
        yield from time_line(rng, job, held)
    elif kind == "read":
        yield {"read_GB/s": read_bandwidth(job.get("gib", 4))}
    elif kind != "skip":
        function = {"list": time_list, "xla": time_xla, "ragged": time_ragged}[kind]
        yield {"shape": job["shape"], "t": job["t"], "us": function(rng, shape, job["t"])}
