"""The experts' feed-forward network over MXFP4 or dense weights, for a few tokens or many."""

from pallas_kernels.expert_ffn.api import ExpertWeights, expert_ffn
from pallas_kernels.expert_ffn.layout import (
    BARRIER_WORDS,
    KernelWeights,
    pack_experts,
    unpack_experts,
)

__all__ = [
    "BARRIER_WORDS",
    "ExpertWeights",
    "KernelWeights",
    "expert_ffn",
    "pack_experts",
    "unpack_experts",
]
