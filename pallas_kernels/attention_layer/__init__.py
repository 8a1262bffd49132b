"""A window layer's attention in one launch: norm, projection, rotation, ring, output projection."""

from pallas_kernels.attention_layer.api import attention_layer
from pallas_kernels.attention_layer.exchange import flag_words

__all__ = ["attention_layer", "flag_words"]
