"""A linear layer for a few tokens, bfloat16 or FP8 weights: reading weights at memory's speed."""

from pallas_kernels.linear.api import MOST_TOKENS, UNITS, linear, misfit
from pallas_kernels.linear.plan import Plan, plan_for

__all__ = ["MOST_TOKENS", "UNITS", "Plan", "linear", "misfit", "plan_for"]
