"""A chunk's attention in the model: the same as `attend`'s, whichever way it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.cache import LayerCache, extend
from mimo_jax.model import prefill_attention
from mimo_jax.model.attention import attend, causal
from mimo_jax.model.prefill_attention import attend_chunk, in_order

B, K, N, H, V, BLOCK = 2, 2, 6, 12, 8, 5


def chunk(rng, t):
    q, k, v = (
        rng.normal(size=(B, t, heads, d)).astype(np.float32)
        for heads, d in ((N, H), (K, H), (K, V))
    )
    return tuple(map(jnp.asarray, (q, k, v)))


def empty(rows):
    return LayerCache(jnp.zeros((B, K, rows, H)), jnp.zeros((B, K, rows, V)))


def plain(q, k, v, cache, start, live, window, sink):
    """What the model does with a block."""
    cache, keys, values, places = extend(cache, k, v, start, live, window)
    positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
    return cache, attend(q, keys, values, causal(positions, places, window), sink)


@pytest.mark.parametrize("window", [None, 7, 40])
def test_a_prompt_in_chunks_is_what_attend_gives(window, rng, monkeypatch):
    monkeypatch.setattr(prefill_attention, "SMALL", 0)
    rows = 160 if window is None else window + BLOCK - 1
    mine = yours = empty(rows)
    sink = jnp.asarray(rng.normal(size=N).astype(np.float32))
    start = jnp.zeros(B, jnp.int32)
    for count in ((30, 17), (30, 30), (1, 29), (30, 0)):
        live = jnp.arange(30)[None] < jnp.asarray(count)[:, None]
        given = chunk(rng, 30)
        mine, heads = jax.jit(attend_chunk, static_argnums=6)(
            *given, mine, start, live, window, sink
        )
        yours, wanted = plain(*given, yours, start, live, window, sink)
        for i, n in enumerate(count):
            np.testing.assert_allclose(heads[i, :n], wanted[i, :n], rtol=0, atol=3e-6)
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(yours), strict=True):
            np.testing.assert_array_equal(a, b)
        start = start + jnp.asarray(count, jnp.int32)


def test_few_scores_are_attends_to_the_bit(rng):
    given, start = chunk(rng, 20), jnp.asarray([0, 3], jnp.int32)
    live = jnp.ones((B, 20), bool)
    for window, rows in ((None, 50), (7, 11)):
        arguments = *given, empty(rows), start, live, window, None
        out, wanted = (jax.jit(f, static_argnums=6)(*arguments)[1] for f in (attend_chunk, plain))
        np.testing.assert_array_equal(out, wanted)


def test_a_ring_and_a_chunk_lie_by_position(rng):
    window, t, past = 9, 18, 131
    size = window + BLOCK - 1
    ring = empty(size)
    for p in range(past):
        held = jnp.full((B, K, H), p, jnp.float32), jnp.full((B, K, V), p, jnp.float32)
        ring = LayerCache(
            ring.keys.at[:, :, p % size].set(held[0]), ring.values.at[:, :, p % size].set(held[1])
        )
    own = past + jnp.arange(t, dtype=jnp.float32)[None, :, None, None]
    k, v = (jnp.broadcast_to(own, (B, t, K, d)) for d in (H, V))
    (keys, values), first = in_order(ring, k, v, jnp.asarray([past, past], jnp.int32), window)
    assert int(first[0]) == 0 and keys.shape[2] == 256
    for p in range(past - window + 1, past + t):
        assert float(keys[0, 0, p, 0]) == float(values[1, 1, p, 0]) == p


def test_a_prompt_cut_differently_gives_the_same(rng, monkeypatch):
    """To rounding: that the kernel's bits are the same is for a GPU to show."""
    monkeypatch.setattr(prefill_attention, "SMALL", 0)
    q, k, v = chunk(rng, 60)
    live = jnp.ones((B, 60), bool)
    for window in (None, 13):
        rows = 80 if window is None else window + BLOCK - 1
        _, whole = attend_chunk(q, k, v, empty(rows), jnp.zeros(B, jnp.int32), live, window, None)
        for cut in (17, 31):
            cache, parts = empty(rows), []
            for low, high in ((0, cut), (cut, 60)):
                part = (x[:, low:high] for x in (q, k, v))
                start = jnp.full(B, low, jnp.int32)
                cache, heads = attend_chunk(*part, cache, start, live[:, low:high], window, None)
                parts.append(heads)
            np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=3e-6)
