"""What prefill attention means, in plain jnp and float32: all scores at once."""

import jax.numpy as jnp

from pallas_kernels.softmax import MASKED


def prefill_attention_reference(q, keys, values, start, live, first, window, sink):
    """See `prefill_attention`; `first` and `sink` may be None."""
    b, t, n, h = q.shape
    groups, rows = keys.shape[1:3]
    place = jnp.zeros_like(start) if first is None else first
    place = place[:, None, None] + jnp.arange(rows, dtype=jnp.int32)
    query = start[:, None, None] + jnp.arange(t, dtype=jnp.int32)[None, :, None]
    seen = (place >= 0) & (place <= query) & (place < (start + live)[:, None, None])
    if window is not None:
        seen &= place > query - window
    # [b, 1, 1, t, s]. What no row of the chunk sees may be NaN, and 0 times NaN is not 0.
    used, seen = seen.any(axis=1)[:, None, :, None], seen[:, None, None]
    grouped = q.astype(jnp.float32).reshape(b, t, groups, n // groups, h)
    exact = dict(precision="highest")
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, keys.astype(jnp.float32), **exact)
    scores = jnp.where(seen, scores * jnp.float32(h**-0.5), MASKED)
    top = scores.max(axis=-1, keepdims=True)
    if sink is not None:
        logits = sink.astype(jnp.float32).reshape(1, groups, n // groups, 1, 1)
        top = jnp.maximum(top, logits)
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(logits - top)
    values = jnp.where(used, values.astype(jnp.float32), 0.0)
    mixed = jnp.einsum("bkgts,bksv->bkgtv", weights, values, **exact)
    mixed = (mixed / jnp.maximum(total, 1e-30)).astype(q.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)
