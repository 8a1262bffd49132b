"""Random blocks as projected, caches before them, and what the reference makes of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import cache, distance, history, normal

from pallas_kernels.attention.reference import block_attention_reference

TOLERANCE = 5e-3


def make(rng, shape, half, starts, lives, sink=True):
    """Arguments of `block_attention`; rows of the caches that hold no position are NaN."""
    width = (shape.group + 1) * shape.h + shape.v
    qkv = normal(rng, shape.b, shape.t, shape.k, width)
    angles = rng.uniform(0, 7, size=(shape.b, shape.t, half))
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    held = [cache(history(rng, shape.k, shape.h, shape.v, e), shape.s, e) for e in starts]
    keys, values = (np.stack(x) for x in zip(*held, strict=True))
    start, live = (np.asarray(x, np.int32) for x in (starts, lives))
    logits = rng.normal(size=shape.n).astype(np.float32) if sink else None
    return qkv, cos, sin, keys, values, start, live, logits


@functools.partial(jax.jit, static_argnames=("window", "value_scale"))
def _reference(arguments, window, value_scale):
    return block_attention_reference(*arguments, window=window, value_scale=value_scale)


def reference(arguments, window, value_scale):
    """Its heads, keys and values."""
    found = _reference(jax.tree.map(jnp.asarray, arguments), window, value_scale)
    return [np.asarray(x) for x in found]


def bits(x):
    """NaNs are equal to themselves."""
    return np.asarray(x).view(np.uint16)


def written(before, after):
    """[b, s]: rows of a cache that changed."""
    return (bits(before) != bits(after)).any(axis=(1, 3))


def wrong(arguments, found, wanted) -> str | None:
    """What is wrong with heads, keys and values."""
    lives, s = arguments[6], arguments[3].shape[2]
    for i, live in enumerate(lives):
        if not live:
            continue
        if not distance(found[0][i, :live], wanted[0][i, :live]) < TOLERANCE:
            return "heads"
    rows = np.zeros((len(lives), s), bool)
    for i, (start, live) in enumerate(zip(arguments[5], lives, strict=True)):
        rows[i, (start + np.arange(live)) % s] = True
    for name, before, after, right in zip(
        ("keys", "values"), arguments[3:5], found[1:], wanted[1:], strict=True
    ):
        if (written(before, after) != rows).any():
            return f"which {name} were written"
        after, right = (x.swapaxes(1, 2)[rows] for x in (after, right))
        if rows.any() and not distance(after, right) < TOLERANCE:
            return name
    if (bits(found[2]) != bits(wanted[2])).any():
        return "values are multiplied and rounded once: their bits"
    return None
