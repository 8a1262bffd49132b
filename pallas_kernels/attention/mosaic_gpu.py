"""Which of the kernels a call takes: a ring is read at once, a long cache in chunks."""

import functools

import jax

from pallas_kernels.attention import chunked, context, draft, ring, ring_block, turn


def shape_of(
    q, keys, values, window, sink, launch: chunked.Launch | None = None
) -> ring.Ring | chunked.Chunked:
    """The call's shapes, with the work of a thread block."""
    if window is not None:
        return ring.shape_of(q, keys, values, window, sink)
    return chunked.shape_of(q, keys, values, launch)


@functools.partial(jax.jit, static_argnames=("window", "launch"))
def decode_attention_mosaic(q, keys, values, start, live, sink, *, window, launch=None):
    """See `api.decode_attention`; `launch` is for long caches."""
    shape = shape_of(q, keys, values, window, sink, launch)
    attend = chunked.chunked_attention if window is None else ring.ring_attention
    return attend(shape, q, keys, values, start, live, sink)


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
    shape = block_shape_of(qkv, cos, keys, values, window, sink, value_scale)
    attend = turn.turned_block if window is None else ring_block.ring_block
    return attend(shape, qkv, cos, sin, keys, values, start, live, sink)


context_shape_of, write_context_mosaic = context.shape_of, context.write_context_mosaic
draft_shape_of = draft.shape_of


@functools.partial(jax.jit, static_argnames=("window", "value_scale", "epsilon", "causal"))
def draft_attention_mosaic(
    qkv, query_norm, key_norm, cos, sin, keys, values, start, sink,
    *, window, value_scale, epsilon, causal,
):  # fmt: skip
    """See `api.draft_attention`."""
    shape = draft_shape_of(qkv, cos, keys, values, window, sink, value_scale, epsilon, causal)
    arrays = qkv, query_norm, key_norm, cos, sin, keys, values, start
    return draft.draft_ring(shape, *arrays, sink)
