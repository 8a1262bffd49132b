"""Random routers, and what they mean in plain numpy."""

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16


def normal(rng, *shape):
    return rng.normal(size=shape).astype(BF16)


def random_case(rng, t, d, e, wide):
    """h, norm, weight, bias, live."""
    weight = rng.normal(size=(e, d)) * d**-0.5
    return (
        (normal(rng, t, d) * BF16(rng.uniform(0.1, 30))).astype(BF16),
        normal(rng, d),
        weight.astype(np.float32 if wide else BF16),
        (rng.normal(size=e) * 0.1).astype(np.float32),
        rng.random(t) < 0.7,
    )


def normed(h, norm, epsilon):
    """The norm of rows, rounded to bfloat16 twice, its mean in float64."""
    wide = h.astype(np.float64)
    scale = 1 / np.sqrt((wide * wide).mean(-1, keepdims=True) + epsilon)
    rounded = (wide.astype(np.float32) * scale.astype(np.float32)).astype(BF16)
    return (rounded.astype(np.float32) * norm.astype(np.float32)).astype(BF16)


def scores(x, weight):
    """Sigmoids in float64."""
    return 1 / (1 + np.exp(-(x.astype(np.float64) @ weight.astype(np.float64).T)))


def choose(found, bias, c, normalise, scale):
    """Ids and weights of rows of scores; ties go to the lowest id."""
    ids = np.argsort(-(found + bias.astype(np.float64)), axis=1, kind="stable")[:, :c]
    weights = np.take_along_axis(found, ids, axis=1)
    if normalise:
        weights = weights / weights.sum(1, keepdims=True)
    return ids, weights * scale


def close_calls(found, bias, ids, margin):
    """Rows and places where another choice than `ids` is as good, but for `margin`."""
    total = found + bias.astype(np.float64)
    best = -np.sort(-total, axis=1)[:, : ids.shape[1]]
    return np.abs(np.take_along_axis(total, ids, axis=1) - best) <= margin
