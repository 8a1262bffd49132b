"""The programs with sums over devices that test_sums_h200.py compiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from cases import decode_nano, program, wide
from h200 import Case
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mimo_jax.bench import sums_jobs
from mimo_jax.decode.program import GPU_OPTIONS
from mimo_jax.sharding import AXIS, Parallel
from pallas_kernels.all_sum.shapes import SHAPES


def mixed(mesh) -> Case:
    """Sums and a gather, several a round, in a while-loop."""

    def run(x, ids, rounds):
        parallel = Parallel(AXIS).with_mail()

        def one_round(carry):
            left, x, ids = carry
            for _ in range(3):
                x = parallel.sum(x) * jnp.asarray(0.1, x.dtype)
            # XLA would fuse slices with the kernel, and then leave the graph.
            parts = parallel.gather(ids[2:4], -1).max(axis=-1, keepdims=True)
            return left - 1, x, lax.dynamic_update_slice_in_dim(ids, parts, left % 4, 0)

        return lax.while_loop(lambda carry: carry[0] > 0, one_round, (rounds, x, ids))[1:]

    sharded = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    arrays = [jax.ShapeDtypeStruct(SHAPES[k].shape, SHAPES[k].dtype) for k in ("pro", "ids")]
    return Case(jax.jit(sharded), (*arrays, jax.ShapeDtypeStruct((), jnp.int32)), GPU_OPTIONS)


def _argument(mesh, dtype, *shape):
    sharding = NamedSharding(mesh, P(AXIS))
    return jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=sharding)


def exact(mesh) -> Case:
    """The benchmark's check."""
    numbers = _argument(mesh, jnp.int32, 8, 512), _argument(mesh, jnp.int32, 100)
    return Case(sums_jobs.exact_program(mesh), numbers)


def timed(mesh, way: str) -> Case:
    """The benchmark's loop."""
    arguments = _argument(mesh, jnp.bfloat16, 8, 6144), _argument(mesh, jnp.int32)
    return Case(sums_jobs.sums_in_a_loop(mesh, way), arguments)


mail = functools.partial(timed, way="mail")
psum = functools.partial(timed, way="psum")
nccl = functools.partial(timed, way="nccl")


def nano(mesh) -> Case:
    """The whole decode program of mimo-nano."""
    return decode_nano(mesh)


def pro(mesh) -> Case:
    """Three layers of Pro; the prompt is in the cache."""
    plan, settings = wide(mesh, 4096)
    return program(plan, dataclasses.replace(settings, chunk=0))


def pro_with_prefill(mesh) -> Case:
    """With chunks of a prompt, whose sums are XLA's."""
    return program(*wide(mesh, 4096))
