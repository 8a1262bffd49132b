"""The router of a mixture of experts for a few tokens: norm, scores and choice in one launch."""

from pallas_kernels.router.api import MOST_TOKENS, Routed, misfit, new_counter, route

__all__ = ["MOST_TOKENS", "Routed", "misfit", "new_counter", "route"]
