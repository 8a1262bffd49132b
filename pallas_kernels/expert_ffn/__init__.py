"""The experts' feed-forward network over MXFP4 or dense weights, for a few tokens or many."""

from pallas_kernels.expert_ffn.api import ExpertWeights, expert_ffn
from pallas_kernels.expert_ffn.layout import KernelWeights, pack_experts, unpack_experts

__all__ = [
    "ExpertWeights",
    "KernelWeights",
    "expert_ffn",
    "pack_experts",
    "unpack_experts",
]
