"""Attention of a prompt's chunk to a cache: scores are never in memory."""

from pallas_kernels.prefill_attention.api import ALIGN, prefill_attention

__all__ = ["ALIGN", "prefill_attention"]
