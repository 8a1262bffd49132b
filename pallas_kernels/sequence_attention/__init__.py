"""Causal attention of whole sequences, forwards and backwards, for training."""

from pallas_kernels.sequence_attention.api import sequence_attention
from pallas_kernels.sequence_attention.triton import BLOCK as TILE

__all__ = ["TILE", "sequence_attention"]
