"""Which of the kernels a call takes: a ring is read at once, a long cache in chunks."""

import functools

import jax

from pallas_kernels.attention import draft, ring_block, turn
from pallas_kernels.attention.chunked import Chunked, Launch, chunked_attention
from pallas_kernels.attention.ring import Ring, ring_attention


def shape_of(q, keys, values, window, sink: bool, launch: Launch | None = None) -> Ring | Chunked:
    """The call's shapes, with the work of a thread block."""
    b, t, n, h = q.shape
    k, s = keys.shape[1:3]
    if window is not None:
        return Ring(b, t, n, h, values.shape[3], k, s, window, sink)
    return Chunked(b, t, n, h, values.shape[3], k, s, launch or Launch())


@functools.partial(jax.jit, static_argnames=("window", "launch"))
def decode_attention_mosaic(q, keys, values, start, live, sink, *, window, launch=None):
    """See `api.decode_attention`; `launch` is for long caches."""
    if window is not None:
        return ring_attention(q, keys, values, start, live, sink, window)
    return chunked_attention(q, keys, values, start, live, sink, launch)


def block_shape_of(
    qkv, cos, keys, values, window, sink, value_scale: float
) -> ring_block.RingBlock | turn.Turn:
    """The same for a block as it was projected."""
    if window is not None:
        return ring_block.shape_of(qkv, cos, keys, values, window, sink, value_scale)
    return turn.shape_of(qkv, cos, keys, values, value_scale)


@functools.partial(jax.jit, static_argnames=("window", "value_scale"))
def block_attention_mosaic(qkv, cos, sin, keys, values, start, live, sink, *, window, value_scale):
    """See `api.block_attention`."""
    arguments = qkv, cos, sin, keys, values, start, live, sink
    if window is not None:
        return ring_block.ring_block(*arguments, window, value_scale)
    return turn.turned_block(*arguments, value_scale)


draft_shape_of = draft.shape_of


@functools.partial(jax.jit, static_argnames=("window", "causal"))
def draft_attention_mosaic(q, own_keys, own_values, keys, values, start, sink, *, window, causal):
    """See `api.draft_attention`."""
    return draft.draft_ring(q, own_keys, own_values, keys, values, start, sink, window, causal)
