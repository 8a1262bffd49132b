"""Random matrices and a slow oracle for the few-token linear's tests."""

import ml_dtypes
import numpy as np

from pallas_kernels.linear.plan import Plan

BF16, CODES = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def random_case(rng, plan: Plan, t: int, unit: int = 64):
    """x, weight, scale (None for bfloat16) and the weight of a norm, in numpy."""
    x = rng.normal(size=(t, plan.columns)).astype(BF16)
    norm = rng.normal(size=plan.columns).astype(BF16)
    if plan.itemsize == 2:
        return x, rng.normal(size=(plan.rows, plan.columns)).astype(BF16), None, norm
    codes = rng.integers(0, 256, (plan.rows, plan.columns), dtype=np.uint8)
    codes[codes & 127 == 127] = 3
    # Of many sizes, but none that hides the others.
    scale = np.exp2(rng.uniform(-3, 3, (plan.rows // unit, -(-plan.columns // 128))))
    return x, codes.view(CODES), scale.astype(np.float32), norm


def oracle(x, weight, scale=None, norm=None, epsilon=0.0):
    """In float64, but for the roundings of the norm."""
    weight = weight.astype(np.float64)
    if scale is not None:
        unit = weight.shape[0] // scale.shape[0]
        weight = weight * scale.repeat(unit, 0).repeat(128, 1)[:, : weight.shape[1]]
    if norm is not None:
        wide = x.astype(np.float64)
        wide = wide / np.sqrt((wide**2).mean(1, keepdims=True) + epsilon)
        x = (wide.astype(BF16).astype(np.float32) * norm.astype(np.float32)).astype(BF16)
    return x.astype(np.float64) @ weight.T
