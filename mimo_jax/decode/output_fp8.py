"""Attention's output projections in FP8: half of the bytes that most checkpoints store them in.

Released checkpoints have them in bfloat16, which at batch 1 outweighs the experts' 4 bits. FP8 is
another model: weights change by up to a sixteenth, a tile's smallest by more. So it is an option,
never a default.
"""

from typing import Any

from mimo_jax.decode.program import Plan
from mimo_jax.decode.rewriting import rewrite_params, rewrite_plan
from mimo_jax.errors import MimoError
from mimo_jax.model.mimo import MiMo
from mimo_jax.quant import fp8


def output_fp8_plan(plan: Plan) -> Plan:
    """The plan whose target has its output projections in FP8.

    Raises:
      MimoError: if a device's part of one is not whole tiles.
    """

    def quantize(model: MiMo) -> None:
        for layer in model.layers:
            layer.attention.quantize_output()

    for layer in range(plan.config.num_hidden_layers):
        attention = plan.config.attention(layer)
        columns = attention.num_heads * attention.v_head_dim // plan.shards
        if plan.shards > 1 and columns % fp8.TILE:
            raise MimoError(
                f"o_proj='fp8': each of {plan.shards} devices has {columns} columns of layer "
                f"{layer}'s output projection, which are not whole tiles of {fp8.TILE}: use fewer "
                "devices, or o_proj='stored'."
            )
    return rewrite_plan(plan, quantize)


def quantize_output_params(plan: Plan, rewritten: Plan, params: tuple[Any, Any]):
    """Quantises loaded parameters, layer by layer.

    Args:
      plan: of `params`.
      rewritten: from `output_fp8_plan`.
      params: target and drafter; the arrays that are quantised are deleted.
    """
    names = dict(module="attention", taken=("output",), given=("output", "output_scale"))
    return rewrite_params(plan, rewritten, params, **names, function=fp8.quantize_on_device)
