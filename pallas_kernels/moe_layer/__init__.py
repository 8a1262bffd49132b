"""A mixture of experts from the residual stream to the residual stream, for a few tokens."""

from pallas_kernels.moe_layer.api import MOST_TOKENS, moe_layer

__all__ = ["MOST_TOKENS", "moe_layer"]
