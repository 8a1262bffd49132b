"""Some ranks of a model that is divided over several devices, without the others: to measure them.

The plan that comes out runs the very program of the whole mesh, on as many shards of the parameters
and of the state as there are devices. What the absent ranks would send stands in
(`sharding.Parallel.ranks`), so that its tokens mean nothing. A rank alone does the work of each
device but for the collectives; two or more also exchange what they would, among themselves.
"""

import dataclasses
from functools import partial

import jax

from mimo_jax.decode.program import Plan
from mimo_jax.errors import MimoError
from mimo_jax.sharding import AnyMesh, first_part


def rank_plan(whole: Plan, mesh: AnyMesh) -> Plan:
    """As many ranks of a plan as there are devices.

    Args:
      whole: of the model on all devices, whose mesh may be abstract; of `make_plan`, or of
        `kernel_plan` for experts in the kernel's order.
      mesh: of the devices that are there, one or more.

    Raises:
      MimoError: if the devices are not a whole part of the plan's.

    Example:
      plan = rank_plan(make_plan(config, drafter, abstract_mesh(8), dtype=dtype), make_mesh(1))
    """
    parts, rest = divmod(whole.shards, mesh.size)
    if rest:
        raise MimoError(
            f"A model divided over {whole.shards} devices cannot run some of its ranks on "
            f"{mesh.size}: the number must divide {whole.shards}."
        )
    params = jax.tree.map(
        lambda leaf, spec: jax.eval_shape(partial(first_part, axes=spec, parts=parts), leaf),
        whole.params,
        whole.param_specs,
    )
    return dataclasses.replace(whole, mesh=mesh, params=params, ranks=parts)
