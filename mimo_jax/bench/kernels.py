"""Benchmark of the expert kernel on a GPU: correctness, times of shapes and variants, XLA beside.

Times are of one program of many layers in a row, each depending on the last (its residual sum is
fused with the kernel's own sum over choices), so that launches are a CUDA graph's and the host
plays no part. Expert ids differ from layer to layer, so that L2 does not help. The bandwidth of a
read-only reduction is measured in the same run.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.bench.card import environment, print_json, print_table
from mimo_jax.decode.program import GPU_OPTIONS
from mimo_jax.errors import MimoError
from pallas_kernels.expert_ffn import ExpertWeights, kernel_absence
from pallas_kernels.expert_ffn.layout import KernelWeights, Plan, pack_experts, plan_for
from pallas_kernels.expert_ffn.mosaic_gpu import (
    expert_ffn_mosaic,
    make_slots,
    run_slots,
    sum_choices,
)
from pallas_kernels.expert_ffn.reference import expert_ffn_reference
from pallas_kernels.expert_ffn.shapes import SHAPES, Shape
from pallas_kernels.mxfp4 import decode

_LAYERS = 16
_REPEATS = 10
_ROUNDS = 7


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
        up,
        down,
    )


def routings(rng, shape: Shape, t: int, active: int | None, zipf: float = 0.0):
    """Ids [layers, t, c] and shares; with `active`, exactly so many distinct experts a layer."""
    weight = 1.0 / np.arange(1, shape.e + 1) ** zipf
    ids = []
    while len(ids) < _LAYERS:
        score = np.log(weight[rng.permutation(shape.e)]) + rng.gumbel(size=(t, shape.e))
        layer = np.argsort(-score, axis=1)[:, : shape.c]
        if active is None or len(np.unique(layer)) == active:
            ids.append(layer)
    ids = np.asarray(ids, np.int32)
    return ids, rng.dirichlet(np.ones(shape.c), (_LAYERS, t)).astype(np.float32)


# --- correctness ----------------------------------------------------------------------------------


def random_checkpoint(rng, shape: Shape, experts: int, scales=(118, 122)) -> ExpertWeights:
    """MXFP4 experts in the checkpoint's order."""

    def matrix(*dims):
        codes = rng.integers(0, 256, (*dims[:-1], dims[-1] // 2), dtype=np.uint8)
        return jnp.asarray(codes), jnp.asarray(
            rng.integers(*scales, (*dims[:-1], dims[-1] // 32), dtype=np.uint8)
        )

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


def check(
    rng, name: str, t: int, options: dict, scales=(118, 122), experts: int = 24, draws: int = 20
) -> dict:
    """Distance to the reference, equal bits over runs, rows that mind their own business."""
    shape = SHAPES[name]
    weights = random_checkpoint(rng, shape, experts, scales)
    packed = jax.jit(pack_experts)(weights)
    hooks = {"hooks": hooks_named(options["hooks"])} if options else {}
    run = jax.jit(functools.partial(expert_ffn_mosaic, **hooks))
    shape = dataclasses.replace(shape, e=experts)
    x = jnp.asarray(rng.normal(size=(t, shape.d)), jnp.bfloat16)
    ids, shares = (a[0] for a in routings(rng, shape, t, None))
    if t > 1:
        ids[0, 0], ids[1, 1] = experts, ids[1, 2]  # a dead choice and a double one
    with jax.default_matmul_precision("highest"):
        ref = jax.jit(expert_ffn_reference)(x, weights, jnp.asarray(ids), jnp.asarray(shares))
    poison()
    first = np.asarray(run(x, packed, ids, shares))
    same = all(np.array_equal(first, run(x, packed, ids, shares)) for _ in range(50))
    own = 0
    for _ in range(draws if t > 1 else 0):
        row, slot = rng.integers(t), rng.integers(t)
        others, other_shares = (a[0] for a in routings(rng, shape, t, None))
        new_x = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16).at[slot].set(x[row])
        others[slot], other_shares[slot] = ids[row], shares[row]
        own += np.array_equal(run(new_x, packed, others, other_shares)[slot], first[row])
    return {
        "check": name, "t": t, "experts": experts, **options,
        "scales": scales, "distance": distance(first, ref),
        "same_bits": same, "independent": f"{own}/{draws if t > 1 else 0}",
    }  # fmt: skip


# --- time -----------------------------------------------------------------------------------------


def read_bandwidth(gib: int = 4) -> float:
    """GB/s of a max-reduction over random data."""
    data = jax.jit(lambda k: jax.random.bits(k, (gib << 28,), jnp.uint32))(jax.random.key(1))
    return data.nbytes / seconds(jax.jit(jnp.max), data) / 1e9


@functools.partial(jax.jit, static_argnames="options", compiler_options=GPU_OPTIONS)
def layers(x, weights, slots, options):
    """Many layers in a row, each on the stream of the one before, over and over: one CUDA graph."""

    def once(_, x):
        for layer_slots in slots:
            results = run_slots(x, weights, layer_slots, **dict(options))
            total = sum_choices(results, layer_slots.live)
            x = (x.astype(jnp.float32) + 1e-3 * total).astype(jnp.bfloat16)
        return x

    return jax.lax.fori_loop(0, _REPEATS, once, x)


_make_slots = jax.jit(make_slots, static_argnums=2)


def time_variant(
    rng, shape: Shape, t: int, weights, active=None, zipf=0.0, profile=False, **options
) -> dict:
    """Microseconds a layer and GB/s of packed weights."""
    ids, shares = (list(map(jnp.asarray, a)) for a in routings(rng, shape, t, active, zipf))
    slots = [_make_slots(a, b, shape.e) for a, b in zip(ids, shares, strict=True)]
    count = sum(int(s.count[-1]) for s in slots) / _LAYERS
    x = jnp.asarray(rng.normal(size=(t, shape.d)), jnp.bfloat16)
    one = functools.partial(layers, options=tuple(sorted(options.items())))
    took = seconds(one, x, weights, slots, queue=1) / (_LAYERS * _REPEATS)
    packed = [int(np.prod(p.packed_shape)) * 4 for p in (weights.gate_up_plan, weights.down_plan)]
    result = {"t": t, "slots": count, "us": took * 1e6, "GB/s": count * sum(packed) / took / 1e9}
    if profile:
        result["kernels_us"] = kernel_times(one, x, weights, slots)
    return result


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
    weights = random_checkpoint(rng, shape, experts)
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
    weights = random_checkpoint(rng, shape, shape.e)
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
    """Mean device microseconds of each kernel by name, from the profiler."""
    import glob
    import tempfile

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


# --- the runs -------------------------------------------------------------------------------------

CHECKS = (
    ("pro-tp8", 8, {}, (118, 122)),
    ("pro-tp8", 1, {}, (118, 122)),
    ("pro-tp8", 11, {}, (118, 122)),
    ("pro-tp8", 8, {}, (107, 138)),
    ("pro-tp8", 8, {"hooks": "folded"}, (118, 122)),
    ("flash-tp8", 8, {}, (118, 122)),
    ("nano", 8, {}, (118, 122)),
    ("pro", 4, {}, (118, 122)),
    ("pro-tp8", 70, {}, (118, 122)),
    ("pro-tp8", 16, {}, (118, 122), 160),
)
VARIANTS = {
    "pro-tp8": (
        {"profile": True},
        {"hooks": "folded", "profile": True},
        {"hooks": "stream", "profile": True},
        {"up": (1, 12, 1)},
        {"up": (1, 12, 4)},
        {"down": (12, 1, 2)},
        {"up": (1, 16, 1), "down": (16, 1, 1)},
        {"up": (1, 16, 2), "down": (16, 1, 2)},
        {"up": (1, 8, 1), "down": (8, 1, 1)},
        {"up": (1, 8, 2), "down": (8, 1, 1)},
        {"stages": 3},
        {"stages": 5},
        {"ctas": 128},
        {"t": 1, "active": None, "profile": True},
        {"t": 1, "active": None, "up": (1, 12, 4), "down": (12, 1, 2)},
        {"t": 1, "active": None, "hooks": "stream", "profile": True},
        {"t": 2, "active": None},
        {"t": 4, "active": None},
        {"t": 16, "active": None},
        {"active": None, "zipf": 1.0},
        {"t": 64, "active": None},
        {"t": 256, "active": None, "profile": True},
        {"t": 1024, "active": None},
    ),
    "pro": (
        {"profile": True},
        {"hooks": "folded"},
        {"hooks": "stream"},
        {"up": (1, 16, 1), "down": (4, 4, 1)},
        {"up": (1, 12, 1), "down": (3, 4, 1)},
        {"t": 1, "active": None},
    ),
    "flash-tp8": ({"active": None}, {"t": 1, "active": None}),
    "flash": ({"active": None},),
    "nano": ({"active": None, "profile": True}, {"t": 1, "active": None}),
}


def hooks_named(name: str):
    """The kernel's hooks, or variants of them that only a benchmark wants."""
    from pallas_kernels.expert_ffn import bench_lanes

    return {"folded": bench_lanes.folded, "stream": bench_lanes.Stream}[name]


def time_shape(rng, name: str) -> list[dict]:
    """All variants of a shape; one that fails is reported and does not end the run."""
    shape, results, held = SHAPES[name], [], {}
    for variant in VARIANTS[name]:
        options = {"t": 8, "active": 59, **variant}
        plans = (
            _plan(2 * shape.f, shape.d, options.pop("up", None)),
            _plan(shape.d, shape.f, options.pop("down", None)),
        )
        if "hooks" in options:
            options["hooks"] = hooks_named(options["hooks"])
        if held.get("plans") != plans:
            held.clear()
            weights = random_kernel_weights(jax.random.key(0), shape.e, *plans)
            held = {"plans": plans, "weights": weights}
        try:
            found = time_variant(rng, shape, weights=held["weights"], **options)
        except Exception as error:  # a variant may not compile; the others still count
            found = {"error": repr(error)[:300]}
        results.append({"shape": name, "variant": {k: str(v) for k, v in variant.items()}, **found})
        print(results[-1], file=sys.stderr, flush=True)
    return results


def _plan(rows: int, columns: int, cut: tuple[int, int, int] | None) -> Plan:
    return Plan(rows, columns, *cut) if cut else plan_for(rows, columns)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo bench kernels`."""
    parser.add_argument("--check", action="store_true", help="compare with the float32 reference")
    parser.add_argument("--time", action="store_true", help="time shapes and variants")
    parser.add_argument("--shapes", default=",".join(VARIANTS), help="comma-separated (--time)")
    parser.add_argument("--prefill", action="store_true", help="time XLA's ragged_dot too (--time)")
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs what was asked for; returns what the JSON line holds."""
    rng = np.random.default_rng(options.seed)
    result: dict[str, Any] = {"benchmark": "kernels", **environment(), "checks": [], "times": []}
    for case in CHECKS if options.check else ():
        result["checks"].append(check(rng, *case))
        print(result["checks"][-1], file=sys.stderr, flush=True)
    if not options.time:
        return result
    shape = SHAPES["pro-tp8"]
    result["read_GB/s"] = read_bandwidth()
    result["list_us"] = {t: time_list(rng, shape, t) for t in (1, 8)}
    result["xla_us"] = time_xla(rng, shape, 8)
    for name in options.shapes.split(","):
        result["times"] += time_shape(rng, name)
    for row in result["times"]:
        if "GB/s" in row:
            row["share"] = row["GB/s"] / result["read_GB/s"]
    if options.prefill:
        result["ragged_us"] = {t: time_ragged(rng, shape, t) for t in (64, 256)}
    return result


def main(options: argparse.Namespace) -> None:
    """Runs the benchmark and prints its table and its JSON line."""
    reason = kernel_absence()
    if reason is None and jax.default_backend() != "gpu":
        reason = f"jax's default platform is {jax.default_backend()}, not gpu."
    if reason:
        raise MimoError(f"The expert kernel cannot be measured here: {reason}")
    result = run(options)
    columns = ("slots", "us", "GB/s", "share")
    rows = [
        [r["shape"], str(r["variant"]), *(r.get(k, 0.0) for k in columns)] for r in result["times"]
    ]
    if rows:
        print_table("Expert FFN", ["shape", "variant", *columns], rows)
    print_json(result)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(_parser)
    main(_parser.parse_args())
