"""Attention of a block of tokens to a cache of past tokens: rings for windows, and long caches."""

from pallas_kernels.attention.api import decode_attention

__all__ = ["decode_attention"]
