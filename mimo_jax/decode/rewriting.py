"""Rewrites loaded parameters for their programs: on each device its shards, by module."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mimo_jax.decode.program import Plan
from mimo_jax.sharding import param_specs


def rewrite_plan(plan: Plan, change: Callable[[Any], None], part: int = 0) -> Plan:
    """The plan after a change of the modules of target (part 0) or drafter (1).

    Args:
      plan: before.
      change: of a model that holds one device's shards.
      part: which one.
    """
    graph = plan.graphs[part]
    local = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype),
        plan.params[part],
        plan.param_shardings[part],
    )

    def changed(values):
        model = nnx.merge(graph, values)
        change(model)
        return model

    new_graph, new = nnx.split(nnx.eval_shape(changed, local))
    specs = param_specs(new, plan.rules)

    def whole(leaf, spec):
        sizes = [1 if axis is None else plan.mesh.shape[axis] for axis in spec]
        sizes += [1] * (len(leaf.shape) - len(sizes))
        shape = tuple(n * size for n, size in zip(leaf.shape, sizes, strict=True))
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    new = jax.tree.map(whole, new, specs)
    graphs, params = list(plan.graphs), list(plan.params)
    graphs[part], params[part] = new_graph, new
    return dataclasses.replace(plan, graphs=tuple(graphs), params=tuple(params))


def rewrite_params(
    plan: Plan,
    rewritten: Plan,
    params: tuple[Any, Any],
    *,
    module: str,
    taken: tuple[str, ...],
    given: tuple[str, ...],
    function: Callable[..., tuple],
) -> tuple[Any, Any]:
    """Parameters for a rewritten plan; memory holds what changes of one module twice, not of all.

    Args:
      plan: of `params`.
      rewritten: from `rewrite_plan`.
      params: target and drafter; the arrays that are taken are deleted.
      module: the name of the modules that change, such as "experts".
      taken: names of their parameters that go.
      given: names of those that come; the last of them is new.
      function: makes the one of the other, on one device's shards.
    """
    old = dict(nnx.to_flat_state(params[0]))
    new = dict(nnx.to_flat_state(rewritten.params[0]))
    specs = dict(nnx.to_flat_state(plan.param_specs[0]))
    new_specs = dict(nnx.to_flat_state(rewritten.param_specs[0]))

    @functools.cache
    def compiled(in_specs, out_specs):
        """Once for all layers: most have the same shapes and specs."""
        options = dict(in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(jax.shard_map(function, mesh=plan.mesh, **options))

    for place in [path[:-1] for path in new if path[-2:] == (module, given[-1])]:
        arrays = [old.pop((*place, name))[...] for name in taken]
        run = compiled(
            tuple(specs[*place, name].get_value() for name in taken),
            tuple(new_specs[*place, name].get_value() for name in given),
        )
        results = jax.block_until_ready(run(*arrays))
        for array in arrays:
            array.delete()
        for name, array in zip(given, results, strict=True):
            old[*place, name] = new[*place, name].replace(array)
    return nnx.from_flat_state([(path, old[path]) for path in new]), params[1]
