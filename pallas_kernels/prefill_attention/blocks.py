"""Prefill attention in plain jnp, for any platform: tiles of keys one after the other.

A block of queries walks over the tiles of keys that any of its rows sees, with a running maximum
and sum (as in FlashAttention, arXiv 2205.14135). What lies beyond the last position, or before the
window, is not read, so that a long cache with little in it costs little.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.softmax import LOG2E, MASKED

QUERIES = 256
"""Tokens of a block."""
TILE = 512
"""Keys of a step; tiles begin at multiples of it."""


@functools.partial(jax.jit, static_argnames=("window", "queries", "tile"))
def prefill_attention_blocks(
    q, keys, values, start, live, first, sink, *, window, queries=QUERIES, tile=TILE
):
    """See `prefill_attention`; `first` and `sink` may be None."""
    b, t, n, h = q.shape
    groups, rows = keys.shape[1:3]
    queries, tile = min(queries, t), min(tile, rows)
    count = -(-t // queries)
    q = jnp.pad(q, ((0, 0), (0, count * queries - t), (0, 0), (0, 0)))
    q = q.reshape(b, count, queries, groups, n // groups, h).transpose(1, 0, 3, 4, 2, 5)
    first = jnp.zeros_like(start) if first is None else first
    sink = jnp.full(n, MASKED, jnp.float32) if sink is None else sink.astype(jnp.float32) * LOG2E
    sink = sink.reshape(1, groups, n // groups, 1)

    def block(index_and_q):
        index, q = index_and_q
        # Relative to the first row of keys.
        query = (start - first + index * queries)[:, None] + jnp.arange(queries, dtype=jnp.int32)
        span = _span(query, start + live - first, first, window, tile)
        walk = functools.partial(_tile, q, keys, values, query, *span[2:], window, tile)
        shape = q.shape[:-1]
        begin = (
            jnp.full(shape, MASKED, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, values.shape[3]), jnp.float32),
        )
        top, total, sums = lax.fori_loop(span[0], span[1], walk, begin)
        new = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - new)
        total = jnp.maximum(total * shrink + jnp.exp2(sink - new), 1e-30)
        return (sums * (shrink / total)[..., None]).astype(q.dtype)

    out = lax.map(block, (jnp.arange(count, dtype=jnp.int32), q))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(b, count * queries, n, -1)
    return out[:, :t]


def _span(query, end, first, window, tile):
    """First and last tile (not included) that any row sees; lowest row used, and end, by sequence.

    Args:
      query: [b, t], each query's row among the keys.
      end: [b], rows written.
      first: [b], position of row 0.
      window: as in the api.
      tile: rows of a tile.
    """
    low = -first if window is None else jnp.maximum(query[:, 0] - window + 1, -first)
    low = jnp.maximum(low, 0)
    last = jnp.minimum(query[:, -1] + 1, end)
    return low.min() // tile, (last.max() + tile - 1) // tile, low, end


def _tile(q, keys, values, query, low, end, window, tile, step, carry):
    """One tile of keys."""
    top, total, sums = carry
    # The last tile may reach past the keys: it is taken from further before, without what was seen.
    begin = jnp.minimum(step * tile, keys.shape[2] - tile)
    row = begin + jnp.arange(tile, dtype=jnp.int32)
    fresh = (row >= step * tile) & (row >= low[:, None]) & (row < end[:, None])
    seen = fresh[:, None] & (row <= query[..., None])
    if window is not None:
        seen &= row > query[..., None] - window
    seen = seen[:, None, None]
    near, mixed = (lax.dynamic_slice_in_dim(x, begin, tile, axis=2) for x in (keys, values))
    # What no row sees may be NaN, and 0 times NaN is not 0.
    mixed = jnp.where(fresh[:, None, :, None], mixed, jnp.zeros_like(mixed))
    scores = jnp.einsum("bkgth,bksh->bkgts", q, near, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores * jnp.float32(q.shape[-1] ** -0.5 * LOG2E), MASKED)
    # Whole: see `pallas_kernels.softmax`.
    new = jnp.maximum(top, jnp.round(scores.max(axis=-1)))
    shrink = jnp.exp2(top - new)
    weights = jnp.where(seen, jnp.exp2(scores - new[..., None]), 0.0)
    total = total * shrink + weights.sum(axis=-1)
    part = jnp.einsum(
        "bkgts,bksv->bkgtv",
        weights.astype(mixed.dtype),
        mixed,
        preferred_element_type=jnp.float32,
    )
    return new, total, sums * shrink[..., None] + part
