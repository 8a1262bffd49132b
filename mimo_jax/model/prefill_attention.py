"""Attention of a prompt's chunk to a layer's cache: no matrix of scores where it is large."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax.cache import LayerCache, extend
from mimo_jax.model.attention import attend, causal
from pallas_kernels.prefill_attention import ALIGN, prefill_attention

MOST_DECODED = 16
"""Rows of a block of decoding, at most; what has more is a prompt's chunk."""
SMALL = 1 << 24
"""Scores, 4 bytes each, up to which `attend` keeps them all where there is no kernel."""


@jax.named_scope("attend_chunk")
def attend_chunk(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k v"],
    cache: LayerCache,
    start: Int32[Array, "b"],
    live: Bool[Array, "b t"],
    window: int | None,
    sink: Float[Array, "n"] | None,
) -> tuple[LayerCache, Float[Array, "b t n v"]]:
    """Adds a chunk's rows to the cache; its queries attend to them and to those before.

    In programs for a GPU that is the kernel, or blocks where it cannot run; elsewhere `attend`
    while the scores are few, then blocks. Which one depends on shapes and platform alone.

    Args:
      q: rotated queries.
      k: rotated keys.
      v: values.
      cache: of the layer, before the chunk.
      start: positions of the chunk's first rows; the others follow.
      live: rows that count, first in the chunk.
      window: as in `causal`.
      sink: as in `attend`.
    """
    written, *found = extend(cache, k, v, start, live, window)
    count = live.sum(axis=-1, dtype=jnp.int32)
    if window is None:
        rows, first = (written.keys, written.values), None
    else:
        rows, first = in_order(cache, k, v, start, window)
    flash = partial(_flash, window=window)
    arguments = q, *rows, start, count, first, sink, *found
    if q.shape[0] * q.shape[1] * q.shape[2] * found[0].shape[2] > SMALL:
        return written, flash(*arguments)
    whole = partial(_whole, window=window)
    return written, jax.lax.platform_dependent(*arguments, cuda=flash, default=whole)


def _flash(q, keys, values, start, live, first, sink, *_, window):
    """The kernel, or blocks."""
    options = {"first": first, "window": window, "sink": sink}
    return prefill_attention(q, keys, values, start, live, **options)


def _whole(q, _keys, _values, start, _live, _first, sink, keys, values, places, *, window):
    """All scores at once, of the rows as `extend` has them."""
    positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
    return attend(q, keys, values, causal(positions, places, window), sink)


def in_order(
    cache: LayerCache,
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k v"],
    start: Int32[Array, "b"],
    window: int,
) -> tuple[tuple[Array, Array], Int32[Array, "b"]]:
    """A ring's rows before a chunk, then the chunk's own, by position.

    Returns:
      keys [b, k, s, h] and values [b, k, s, v]; the position of their first row, a multiple of
      `ALIGN`, at most that of the first row which the chunk sees.
    """
    size, t = cache.size, k.shape[1]
    first = (start - window + 1) // ALIGN * ALIGN
    rows = -(-(ALIGN - 1 + window - 1 + t) // ALIGN) * ALIGN
    place = first[:, None] + jnp.arange(rows, dtype=jnp.int32)
    own = size + jnp.minimum(place - start[:, None], t - 1)
    index = jnp.where(place < start[:, None], place % size, own)

    def sort(held, added):
        both = jnp.concatenate([held, added.transpose(0, 2, 1, 3).astype(held.dtype)], axis=2)
        return jax.vmap(lambda x, i: jnp.take(x, i, axis=1, mode="clip"))(both, index)

    return (sort(cache.keys, k), sort(cache.values, v)), first
