"""Attention of a block of tokens to a cache of past tokens: rings for windows, and long caches."""

from pallas_kernels.attention.api import (
    MOST_TOKENS,
    block_attention,
    decode_attention,
    draft_attention,
    write_context,
)

__all__ = [
    "MOST_TOKENS",
    "block_attention",
    "decode_attention",
    "draft_attention",
    "write_context",
]
