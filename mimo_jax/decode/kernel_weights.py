"""Experts in the kernel's order: the plan and the parameters of a loaded model, repacked once."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from mimo_jax.decode.program import Plan
from mimo_jax.sharding import param_specs
from pallas_kernels.expert_ffn import ExpertWeights, pack_experts

FIELDS = tuple(field.name for field in dataclasses.fields(ExpertWeights))
PACKED = ("gate_up", "down", "barrier")
"""The fields of `ExpertWeights`, and those of `KernelWeights` that hold arrays."""


def kernel_plan(plan: Plan) -> Plan:
    """The plan whose experts are `KernelWeights`, each device's share packed for itself.

    Raises:
      ValueError: if the kernel cannot take such shapes.
    """
    target, drafter = plan.params
    graph, _ = plan.graphs
    local = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype),
        target,
        plan.param_shardings[0],
    )

    def pack(values):
        model = nnx.merge(graph, values)
        for layer in model.layers:
            if layer.sparse:
                layer.ffn.experts.pack()
        return model

    packed_graph, packed = nnx.split(nnx.eval_shape(pack, local))
    specs = param_specs(packed, plan.rules)

    def whole(leaf, spec):
        sizes = [1 if axis is None else plan.mesh.shape[axis] for axis in spec]
        sizes += [1] * (len(leaf.shape) - len(sizes))
        shape = tuple(n * size for n, size in zip(leaf.shape, sizes, strict=True))
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    packed = jax.tree.map(whole, packed, specs)
    return dataclasses.replace(
        plan, graphs=(packed_graph, plan.graphs[1]), params=(packed, drafter)
    )


def pack_params(plan: Plan, packed: Plan, params: tuple[Any, Any]) -> tuple[Any, Any]:
    """Repacks loaded parameters layer by layer, so that memory holds one layer's experts twice.

    Args:
      plan: of `params`.
      packed: from `kernel_plan`.
      params: target and drafter; the arrays of the target's experts are deleted.
    """
    old = dict(nnx.to_flat_state(params[0]))
    new = dict(nnx.to_flat_state(packed.params[0]))
    specs = dict(nnx.to_flat_state(plan.param_specs[0]))
    new_specs = dict(nnx.to_flat_state(packed.param_specs[0]))

    def pack(*arrays):
        weights = pack_experts(ExpertWeights(**dict(zip(FIELDS, arrays, strict=True))))
        return tuple(getattr(weights, name) for name in PACKED)

    @functools.cache
    def packer(in_specs, out_specs):
        """Compiled once for all layers: they have the same shapes and specs."""
        return jax.jit(
            jax.shard_map(
                pack, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
        )

    for path in [path for path in new if path[-2:] == ("experts", PACKED[0])]:
        place = path[:-1]
        arrays = [old.pop((*place, name))[...] for name in FIELDS]
        run = packer(
            tuple(specs[*place, name].get_value() for name in FIELDS),
            tuple(new_specs[*place, name].get_value() for name in PACKED),
        )
        words = jax.block_until_ready(run(*arrays))
        for array in arrays:
            array.delete()
        for name, array in zip(PACKED, words, strict=True):
            old[*place, name] = new[*place, name].replace(array)
    state = nnx.from_flat_state([(path, old[path]) for path in new])
    return state, params[1]
