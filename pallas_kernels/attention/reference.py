"""What attention to a cache means, in plain jnp and float32; also its implementation on CPUs."""

import jax.numpy as jnp

from pallas_kernels.softmax import MASKED


def positions(end, rows: int):
    """[b, s]: the position that each row holds once all before `end` are written.

    The row of position p is p % rows; negative: none yet.
    """
    last = end[:, None] - 1
    return last - (last - jnp.arange(rows, dtype=jnp.int32)) % rows


def decode_attention_reference(q, keys, values, start, live, window, sink):
    """All scores at once; see `decode_attention`."""
    t, rows = q.shape[1], keys.shape[2]
    place = positions(start + live, rows)[:, None, :]
    query = start[:, None, None] + jnp.arange(t, dtype=jnp.int32)[None, :, None]
    seen = (place >= 0) & (place <= query)
    if window is not None:
        seen &= place > query - window
    return attend_reference(q, keys, values, seen, sink)


def attend_reference(q, keys, values, seen, sink):
    """Softmax attention to what is `seen` [b, t, s]."""
    (b, t, n, h), groups = q.shape, keys.shape[1]
    # [b, 1, 1, t, s]. What no row of the block sees may be NaN, and 0 times NaN is not 0.
    used, seen = seen.any(axis=1)[:, None, :, None], seen[:, None, None]
    grouped = q.astype(jnp.float32).reshape(b, t, groups, n // groups, h)
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, keys.astype(jnp.float32))
    scores = jnp.where(seen, scores * jnp.float32(h**-0.5), MASKED)
    top = scores.max(axis=-1, keepdims=True)
    if sink is not None:
        logits = sink.astype(jnp.float32).reshape(1, groups, n // groups, 1, 1)
        top = jnp.maximum(top, logits)
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(logits - top)
    mixed = jnp.einsum(
        "bkgts,bksv->bkgtv", weights, jnp.where(used, values.astype(jnp.float32), 0.0)
    )
    mixed = (mixed / jnp.maximum(total, 1e-30)).astype(q.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)


def block_attention_reference(
    qkv, cos, sin, keys, values, start, live, sink, *, window, value_scale
):
    """Rotates, writes and attends; see `block_attention`."""
    (b, t, _, width), h, s = qkv.shape, keys.shape[3], keys.shape[2]
    split = width - h - values.shape[3]
    q = _rotated(qkv[..., :split].reshape(b, t, -1, h), cos, sin)
    k = _rotated(qkv[..., split : split + h], cos, sin)
    v = qkv[..., split + h :] * jnp.asarray(value_scale, qkv.dtype)
    place = positions(start + live, s)
    token = place - start[:, None]
    new, token = ((place >= 0) & (token >= 0))[:, None, :, None], jnp.clip(token, 0, t - 1)
    keys, values = (
        jnp.where(new, jnp.take_along_axis(x.swapaxes(1, 2), token[:, None, :, None], axis=2), old)
        for x, old in ((k.astype(keys.dtype), keys), (v.astype(values.dtype), values))
    )
    return decode_attention_reference(q, keys, values, start, live, window, sink), keys, values


def draft_attention_reference(
    qkv, query_norm, key_norm, cos, sin, keys, values, start, sink,
    *, window, value_scale, epsilon, causal,
):  # fmt: skip
    """Context and block side by side; see `draft_attention`."""
    (b, t, _, width), s, h = qkv.shape, keys.shape[2], keys.shape[3]
    split = width - h - values.shape[3]
    q = qkv[..., :split].reshape(b, t, -1, h)
    q = _rotated(_normed(q, query_norm, epsilon), cos, sin)
    own_keys = _rotated(_normed(qkv[..., split : split + h], key_norm, epsilon), cos, sin)
    own_values = qkv[..., split + h :] * jnp.asarray(value_scale, qkv.dtype)
    # As a cache that begins with the context's oldest row: its positions ascend.
    first = start[:, None] - s + jnp.arange(s, dtype=jnp.int32)
    sorted_ = (first % s)[:, None, :, None]
    keys, values = (
        jnp.concatenate([jnp.take_along_axis(x, sorted_, axis=2), own.swapaxes(1, 2)], axis=2)
        for x, own in ((keys, own_keys), (values, own_values))
    )
    token = jnp.arange(t, dtype=jnp.int32)[:, None]
    place = jnp.arange(-s, t, dtype=jnp.int32)
    seen = (place <= (token if causal else t - 1)) & (place > token - window)
    seen = seen[None] & (start[:, None, None] + place >= 0)
    return attend_reference(q, keys, values, seen, sink)


def write_context_reference(
    kv, key_norms, cos, sin, keys, values, start, live, *, value_scale, epsilon
):
    """Layer after layer; see `write_context`."""
    (b, t, layers), found = kv.shape[:3], []
    for i in range(layers):
        new, h, s = kv[:, :, i], keys[i].shape[3], keys[i].shape[2]
        own = _rotated(_normed(new[..., :h], key_norms[i], epsilon), cos, sin)
        scaled = new[..., h:] * jnp.asarray(value_scale, new.dtype)
        slots = jnp.arange(t, dtype=jnp.int32)
        # A row that is not live has a place of its own past the end, where nothing is written.
        place = jnp.where(slots < live[:, None], (start[:, None] + slots) % s, s + slots)
        where = jnp.arange(b)[:, None], slice(None), place
        found.append(
            [
                ring.at[where].set(rows.astype(ring.dtype), mode="drop", unique_indices=True)
                for ring, rows in ((keys[i], own), (values[i], scaled))
            ]
        )
    return tuple(zip(*found, strict=True))


def _normed(x, weight, epsilon):
    """x over its root mean square in float32, rounded, times the weight."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide / jnp.sqrt(mean + epsilon)).astype(x.dtype) * weight.astype(x.dtype)


def _rotated(x, cos, sin):
    """x [b, t, n, h] with its pairs (i, i + half) turned; columns past 2 half are as they were."""
    half, cos, sin = cos.shape[2], cos[:, :, None], sin[:, :, None]
    first, second = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in (0, 1))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)
