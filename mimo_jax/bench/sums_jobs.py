"""Jobs of `mimo bench sums`: sums over GPUs by mail and by XLA, right in every bit, and timed."""

import functools
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mimo_jax.decode.program import GPU_OPTIONS
from mimo_jax.sharding import AXIS, Parallel, make_mesh
from pallas_kernels.all_sum import all_sum, open_mail
from pallas_kernels.all_sum.shapes import SHAPES

# NVLink multicast can put a host that others share out of service.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

UNROLLED = 8
"""Exchanges in a round of a timed loop."""
ROUNDS = (100, 600)
"""Of two runs, whose difference is timed."""
PRIME = 31
"""Values of whole numbers below it, added over 8 devices, are exact in bfloat16."""
EXCHANGES = 4
"""In a round of `exact_rounds`."""
OPTIONS: dict[str, dict[str, Any]] = {
    "mail": GPU_OPTIONS,
    "mail-host": {},
    "psum": GPU_OPTIONS,
    "nccl": GPU_OPTIONS
    | {
        "xla_gpu_enable_command_buffer": (
            GPU_OPTIONS["xla_gpu_enable_command_buffer"] + ",COLLECTIVES"
        ),
        "xla_gpu_unsupported_use_all_reduce_one_shot_kernel": False,
        "xla_gpu_experimental_use_collective_kernels": "",
    },
}
"""Ways to add: by mail; so in a loop that the host runs; XLA's choice, which the host launches;
NCCL in the graph."""


def jobs(check: bool, timed: bool, counts: list[int] | None = None) -> list[dict[str, Any]]:
    """What to do on so many devices each; the riskiest last."""
    counts = counts or [n for n in (2, 4, 8) if n <= jax.device_count()]
    found = []
    if check:
        # Without a graph first: what fails there is not the graph's fault.
        found += [
            {"job": "sums-check", "devices": n, "way": way}
            for n in counts
            for way in ("mail-host", "mail")
        ]
    if timed:
        few = ["pro", "pro-1", "nano"]
        ways = {"mail": SHAPES, "psum": few, "mail-host": ["pro"], "nccl": ["pro", "nano"]}
        found += [
            {"job": "sums-time", "devices": n, "shape": name, "way": way}
            for way, names in ways.items()
            for n in counts
            for name in names
            if SHAPES[name].total and jnp.issubdtype(SHAPES[name].dtype, jnp.floating)
        ]
    return found


def do(rng: np.random.Generator, job: dict[str, Any], held: dict) -> Iterator[dict[str, Any]]:
    """Does a job, a result at a time; after an error of the GPUs the process is of no more use."""
    del held
    try:
        yield from _do(rng, job)
    except jax.errors.JaxRuntimeError as error:
        yield {**job, "error": repr(error)[:400]}
        os._exit(1)


def _do(rng: np.random.Generator, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    mesh = make_mesh(job["devices"])
    if job["job"] == "sums-check":
        way, rounds = job["way"], 2500 if job["way"] == "mail" else 250
        known = {"devices": job["devices"], "way": way}
        yield {**known, "same_bits": same_bits(rng, mesh, way)}
        seconds = exact_rounds(rng, mesh, rounds, way=way)
        yield {**known, "exchanges": EXCHANGES * rounds, "s": round(seconds, 2)}
    else:
        yield {**{k: job[k] for k in ("devices", "shape", "way")}, **timed(rng, mesh, job)}


def over(mesh: Mesh, function, way: str):
    """Jits function(a device's parts) over a mesh; parts and results have the devices in front."""

    def part(*arguments):
        return jax.tree.map(lambda y: y[None], function(*(x[0] for x in arguments)))

    sharded = jax.shard_map(part, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    on_gpu = mesh.devices.flat[0].platform == "gpu"
    return jax.jit(sharded, compiler_options=OPTIONS[way] if on_gpu else None)


def same_bits(rng: np.random.Generator, mesh: Mesh, way: str = "mail") -> int:
    """Compares sums of random floats of all shapes, with residuals too, with numpy's, rank by rank.

    Returns:
      how many shapes.

    Raises:
      AssertionError: if a bit differs, on any device.
    """
    floats = {k: s for k, s in SHAPES.items() if jnp.issubdtype(s.dtype, jnp.floating)}

    def draw(count, shape):
        return rng.standard_normal((count, *shape.shape)).astype(jnp.dtype(shape.dtype))

    arrays = [draw(mesh.size, shape) for shape in floats.values()]
    residuals = [draw(1, shape)[0] for shape in floats.values()]

    def run(*arrays):
        mail, sums = open_mail(AXIS), []
        for x, residual in zip(arrays, residuals, strict=True):
            y, mail = all_sum(x, mail, AXIS)
            z, mail = all_sum(x, mail, AXIS, residual=jnp.asarray(residual))
            sums.append((y, z))
        return sums

    found = over(mesh, run, way)(*arrays)
    for name, x, residual, sums in zip(floats, arrays, residuals, found, strict=True):
        wide = [part.astype(np.float32) for part in (*x, residual)]
        totals = (functools.reduce(np.add, parts).astype(x.dtype) for parts in (wide[:-1], wide))
        for y, total in zip(sums, totals, strict=True):
            for rank in range(mesh.size):
                np.testing.assert_array_equal(np.asarray(y[rank]), total, f"{name}, rank {rank}")
    return len(floats)


def exact_rounds(
    rng: np.random.Generator, mesh: Mesh, rounds: int, d: int = 512, way: str = "mail"
) -> float:
    """Many exchanges in a loop, each of the result of the last, while devices idle at random.

    Returns:
      the seconds that the loop took.

    Raises:
      AssertionError: if one number is wrong, on any device, in the end.
    """
    start = rng.integers(0, PRIME, (mesh.size, 8, d)).astype(np.int32)
    # Mostly none, sometimes long; each device its own.
    idle = (rng.random((mesh.size, rounds)) < 0.3) * rng.integers(0, 40, (mesh.size, rounds))
    program = exact_program(mesh, way).lower(start, idle.astype(np.int32)).compile()
    begun = time.perf_counter()
    found = np.asarray(jax.block_until_ready(program(start, idle.astype(np.int32))))
    seconds = time.perf_counter() - begun
    np.testing.assert_array_equal(found, expected(start, rounds))
    return seconds


def exact_program(mesh: Mesh, way: str = "mail"):
    """A jitted function of whole numbers, and of how long each device idles in each round."""

    def run(x, delays):
        parallel, own = Parallel(AXIS).with_mail(), lax.axis_index(AXIS)

        def add(x, dtype):
            return parallel.sum(x.astype(dtype)).astype(jnp.int32)

        def body(number, carry):
            x, idle = carry
            # Not delays[number], for which XLA would leave the graph.
            times = jnp.where(jnp.arange(delays.size) == number, delays, 0).sum()
            idle = lax.fori_loop(0, times, lambda _, z: z * 1.0001 + 1e-3, idle)
            x = _mix(x + (idle.sum() < 0).astype(jnp.int32), own, add, parallel.gather)
            return x, jnp.minimum(idle, 2.0)

        return lax.fori_loop(0, delays.size, body, (x, jnp.ones(256)))[0]

    return over(mesh, run, way)


def _mix(x, own, add, gather):
    """One round: x is whole numbers below PRIME, other ones on each device."""
    x = (3 * add(x, jnp.bfloat16) + own + x) % PRIME
    x = (add(x[:1], jnp.bfloat16) + own + x) % PRIME
    parts = gather(x[:, :1], -1)
    shares = jnp.arange(1, parts.shape[1] + 1, dtype=jnp.int32)
    x = (x + (parts * shares).sum(axis=1, keepdims=True)) % PRIME
    return (5 * add(x, jnp.float32) + own + x) % PRIME


def expected(x: np.ndarray, rounds: int) -> np.ndarray:
    """The same by numpy, for all devices."""
    own, shares = (np.arange(len(x)) + first for first in (0, 1))
    own = own[:, None, None]
    for _ in range(rounds):
        x = (3 * x.sum(0) + own + x) % PRIME
        x = (x[:, :1].sum(0) + own + x) % PRIME
        x = (x + np.tensordot(shares, x[:, :, :1], 1)) % PRIME
        x = (5 * x.sum(0) + own + x) % PRIME
    return x


def timed(rng: np.random.Generator, mesh: Mesh, job: dict[str, Any]) -> dict[str, Any]:
    """Microseconds a sum, of the result of the last one, in a loop."""
    shape = SHAPES[job["shape"]]
    x = rng.random((mesh.size, *shape.shape)).astype(jnp.dtype(shape.dtype))
    few, many = (np.full(mesh.size, rounds, np.int32) for rounds in ROUNDS)
    program = sums_in_a_loop(mesh, job["way"]).lower(x, few).compile()
    best = [min(_seconds(program, x, rounds) for _ in range(4)) for rounds in (few, many)]
    return {"us": 1e6 * (best[1] - best[0]) / (UNROLLED * (ROUNDS[1] - ROUNDS[0]))}


def sums_in_a_loop(mesh: Mesh, way: str):
    """A jitted function of arrays and numbers of rounds, whose numbers grow beyond all bounds."""

    def run(x, rounds):
        parallel = Parallel(AXIS).with_mail() if way.startswith("mail") else Parallel(AXIS)

        def body(_, x):
            for _ in range(UNROLLED):
                x = parallel.sum(x)
            return x

        return lax.fori_loop(0, rounds, body, x)

    return over(mesh, run, way)


def _seconds(program, x, rounds) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(program(x, rounds))
    return time.perf_counter() - begun
