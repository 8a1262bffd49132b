"""One rank of a model that is divided over several devices, alone on one: to measure what it does.

The plan that comes out runs the very program of the whole mesh, on one device's shards of the
parameters and of the state. What the absent ranks would send stands in (`sharding.Parallel.ranks`),
so that its tokens mean nothing, and its work is that of each device but for the collectives.
"""

import dataclasses

import jax

from mimo_jax.decode.program import Plan
from mimo_jax.errors import MimoError
from mimo_jax.sharding import AnyMesh


def rank_plan(whole: Plan, mesh: AnyMesh) -> Plan:
    """One rank of a plan.

    Args:
      whole: of the model on all devices, whose mesh may be abstract; of `make_plan`, or of
        `kernel_plan` for experts in the kernel's order.
      mesh: of the one device that is there.

    Raises:
      MimoError: if the mesh has more than one device.

    Example:
      plan = rank_plan(make_plan(config, drafter, abstract_mesh(8), dtype=dtype), make_mesh(1))
    """
    if mesh.size != 1:
        raise MimoError(f"A rank runs on a mesh of one device; this one has {mesh.size}.")
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype),
        whole.params,
        whole.param_shardings,
    )
    return dataclasses.replace(whole, mesh=mesh, params=params, ranks=whole.shards)
