"""Weights as the kernels want them: the plan and the parameters of a loaded model, repacked once.

Experts in their kernel's order; a DFlash drafter's projections side by side, for fewer products.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.decode.program import Plan
from mimo_jax.decode.rewriting import rewrite_params, rewrite_plan
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.model.dflash import fused_weight
from mimo_jax.model.mimo import MiMo
from pallas_kernels.expert_ffn import BARRIER_WORDS, ExpertWeights, pack_experts

FIELDS = tuple(field.name for field in dataclasses.fields(ExpertWeights))
PACKED = ("gate_up", "down", "barrier")
"""The fields of `ExpertWeights`, and those of `KernelWeights` that hold arrays."""


def kernel_plan(plan: Plan) -> Plan:
    """The plan whose experts are `KernelWeights`, and whose drafter is packed, each device's share.

    Raises:
      ValueError: if the kernel cannot take such shapes.
    """

    def pack(model: MiMo) -> None:
        words = max(layer.attention.flag_words for layer in model.layers)
        for layer in model.layers:
            if layer.sparse:
                layer.ffn.experts.pack(words)

    packed = rewrite_plan(plan, pack)
    if not isinstance(plan.drafter, DrafterConfig):
        return packed
    return rewrite_plan(packed, lambda drafter: drafter.pack(), part=1)


def pack_params(plan: Plan, packed: Plan, params: tuple[Any, Any]) -> tuple[Any, Any]:
    """Repacks loaded parameters: memory holds one layer's experts twice, then the drafter's qkv.

    Args:
      plan: of `params`.
      packed: from `kernel_plan`.
      params: target and drafter; the arrays that are repacked are deleted.
    """
    barriers = (
        leaf.shape[0]
        for path, leaf in nnx.to_flat_state(packed.params[0])
        if path[-2:] == ("experts", "barrier")
    )
    # All layers' are alike.
    more_words = next(barriers, BARRIER_WORDS) - BARRIER_WORDS

    def pack(*arrays):
        given = ExpertWeights(**dict(zip(FIELDS, arrays, strict=True)))
        weights = pack_experts(given, more_words=more_words)
        return tuple(getattr(weights, name) for name in PACKED)

    change = dict(module="experts", taken=FIELDS, given=PACKED, function=pack)
    target, drafter = rewrite_params(plan, packed, params, **change)
    if isinstance(plan.drafter, DrafterConfig):
        drafter = _pack_drafter(plan, packed, drafter)
    return target, drafter


def _pack_drafter(plan: Plan, packed: Plan, drafter):
    """What `Drafter.pack` does, of loaded parameters."""
    old, new = dict(nnx.to_flat_state(drafter)), dict(nnx.to_flat_state(packed.params[1]))
    specs = dict(nnx.to_flat_state(plan.param_specs[1]))
    new_specs = dict(nnx.to_flat_state(packed.param_specs[1]))
    places = sorted(path[:-1] for path in new if path[-1] == "qkv")
    taken = [[(*place, name) for place in places] for name in ("query", "kv")]
    given = [[(*place, "qkv") for place in places], ("context_kv",)]
    norms = jnp.stack([old[*place, "key_norm", "weight"][...] for place in places])
    old["context_norms",] = new["context_norms",].replace(norms)

    def pack(queries, kvs):
        return [fused_weight(*pair) for pair in zip(queries, kvs, strict=True)], jnp.stack(kvs)

    run = jax.shard_map(
        pack,
        mesh=plan.mesh,
        in_specs=tuple([specs[path].get_value() for path in paths] for paths in taken),
        out_specs=(
            [new_specs[path].get_value() for path in given[0]],
            new_specs[given[1]].get_value(),
        ),
        check_vma=False,
    )
    arrays = [[old.pop(path)[...] for path in paths] for paths in taken]
    fused, stack = jax.block_until_ready(jax.jit(run)(*arrays))
    jax.tree.map(lambda array: array.delete(), arrays)
    for path, array in [*zip(given[0], fused, strict=True), (given[1], stack)]:
        old[path] = new[path].replace(array)
    return nnx.from_flat_state([(path, old[path]) for path in new])
