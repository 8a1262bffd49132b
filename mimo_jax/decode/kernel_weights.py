"""Experts in the kernel's order: the plan and the parameters of a loaded model, repacked once."""

import dataclasses
from typing import Any

from mimo_jax.decode.program import Plan
from mimo_jax.decode.rewriting import rewrite_params, rewrite_plan
from mimo_jax.model.mimo import MiMo
from pallas_kernels.expert_ffn import ExpertWeights, pack_experts

FIELDS = tuple(field.name for field in dataclasses.fields(ExpertWeights))
PACKED = ("gate_up", "down", "barrier")
"""The fields of `ExpertWeights`, and those of `KernelWeights` that hold arrays."""


def kernel_plan(plan: Plan) -> Plan:
    """The plan whose experts are `KernelWeights`, each device's share packed for itself.

    Raises:
      ValueError: if the kernel cannot take such shapes.
    """

    def pack(model: MiMo) -> None:
        for layer in model.layers:
            if layer.sparse:
                layer.ffn.experts.pack()

    return rewrite_plan(plan, pack)


def pack_params(plan: Plan, packed: Plan, params: tuple[Any, Any]) -> tuple[Any, Any]:
    """Repacks loaded parameters layer by layer, so that memory holds one layer's experts twice.

    Args:
      plan: of `params`.
      packed: from `kernel_plan`.
      params: target and drafter; the arrays of the target's experts are deleted.
    """

    def pack(*arrays):
        weights = pack_experts(ExpertWeights(**dict(zip(FIELDS, arrays, strict=True))))
        return tuple(getattr(weights, name) for name in PACKED)

    change = dict(module="experts", taken=FIELDS, given=PACKED, function=pack)
    return rewrite_params(plan, packed, params, **change)
