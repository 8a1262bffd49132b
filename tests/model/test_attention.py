"""Attention against loops in numpy: sinks, windows, blocks of long sequences, regrouping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import assert_close, relative_norm

from mimo_jax.config import AttentionConfig
from mimo_jax.model.attention import Attention, attend, causal, regroup
from mimo_jax.model.layers import rms_norm, rope
from mimo_jax.model.sequence import attend_sequence

ATTEND = jax.jit(attend)
ROPE = jax.jit(rope, static_argnums=(2, 3))
SEQUENCE = jax.jit(attend_sequence, static_argnums=(3, 5))


def attend_slowly(q, keys, values, visible, sink):
    """One query, one head at a time; a query without any key or sink gives zeros."""
    b, t, n, h = q.shape
    out = np.zeros((b, t, n, values.shape[-1]))
    for i, j, head in np.ndindex(b, t, n):
        group = head // (n // keys.shape[1])
        rows = [s for s in range(keys.shape[2]) if visible[i, j, s]]
        scores = [q[i, j, head] @ keys[i, group, s] / np.sqrt(h) for s in rows]
        extra = [] if sink is None else [sink[head]]
        if not scores + extra:
            continue
        top = max(scores + extra)
        weights = [np.exp(score - top) for score in scores]
        total = sum(weights) + sum(np.exp(e - top) for e in extra)
        for weight, s in zip(weights, rows, strict=True):
            out[i, j, head] += weight / total * values[i, group, s]
    return out


def draw(rng, b, t, s, n, k, h, v):
    return (
        rng.standard_normal((b, t, n, h)),
        rng.standard_normal((b, k, s, h)),
        rng.standard_normal((b, k, s, v)),
    )


def single(*arrays):
    return [None if x is None else jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(("n", "k"), [(6, 2), (4, 4), (5, 1)])
def test_attend(n, k, with_sink, rng):
    b, t, s, h, v = 2, 3, 11, 7, 5
    q, keys, values = draw(rng, b, t, s, n, k, h, v)
    visible = rng.random((b, t, s)) < 0.6
    visible[0, 0] = False
    sink = 2 * rng.standard_normal(n) if with_sink else None
    out = ATTEND(*single(q, keys, values), jnp.asarray(visible), *single(sink))
    assert_close(out, attend_slowly(q, keys, values, visible, sink), "float32")
    assert not np.asarray(out)[0, 0].any()


def test_masked_rows_weigh_exactly_nothing(rng):
    q, keys, values = draw(rng, 1, 2, 9, 4, 2, 6, 3)
    visible = jnp.asarray(np.arange(9) < 5)[None, None].repeat(2, axis=1)
    out = ATTEND(*single(q, keys, values), visible, None)
    keys[:, :, 5:], values[:, :, 5:] = 1e8, -1e8
    again = ATTEND(*single(q, keys, values), visible, None)
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_causal(window, rng):
    positions = jnp.asarray(rng.integers(0, 20, (2, 5)), jnp.int32)
    places = jnp.asarray(rng.integers(-3, 20, (2, 8)), jnp.int32)
    got = np.asarray(causal(positions, places, window))
    for b, t, s in np.ndindex(got.shape):
        p, place = int(positions[b, t]), int(places[b, s])
        fits = 0 <= place <= p and (window is None or p - place < window)
        assert got[b, t, s] == fits


@pytest.mark.parametrize(
    ("t", "window", "chunk"),
    [(9, None, 4), (8, 4, 8), (12, 4, 3), (13, 4, 5), (20, 5, 99), (21, 3, 2), (6, 6, 4), (5, 9, 2),
     (7, 1, 7)],
)  # fmt: skip
def test_attend_sequence_in_blocks_and_whole(t, window, chunk, rng):
    b, n, k, h, v = 2, 4, 2, 6, 5
    q, keys, values = draw(rng, b, t, t, n, k, h, v)
    sink = rng.standard_normal(n)
    i, j = np.arange(t)[:, None], np.arange(t)
    visible = (j <= i) & ((window is None) | (j > i - (window or 0)))
    expected = attend_slowly(q, keys, values, np.stack([visible] * b), sink)
    swap = (keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3))
    out = SEQUENCE(*single(q, *swap), window, *single(sink), chunk)
    assert_close(out, expected, "float32")


@pytest.mark.parametrize(("t", "window", "chunk"), [(11, None, 4), (12, 3, 2), (10, 4, 3)])
@pytest.mark.parametrize("with_sink", [True, False])
def test_gradients_of_sequences_are_those_of_attend(t, window, chunk, with_sink, rng):
    """Against what JAX makes of the plain function by itself."""
    b, n, k, h, v = 2, 6, 3, 5, 4
    q, keys, values = single(*draw(rng, b, t, t, n, k, h, v))
    keys, values = keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)
    sink = jnp.asarray(rng.standard_normal(n), jnp.float32)
    aim = jnp.asarray(rng.standard_normal((b, t, n, v)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))

    def plain(q, keys, values, sink):
        swap = (keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3))
        visible = causal(positions, positions, window)
        return (attend(q, *swap, visible, sink if with_sink else None) * aim).sum()

    def blocks(q, keys, values, sink):
        sink = sink if with_sink else None
        return (attend_sequence(q, keys, values, window, sink, chunk) * aim).sum()

    given = (q, keys, values, sink)
    found, expected = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(*given) for f in (blocks, plain))
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_norm(mine, theirs) < 1e-5
    assert np.any(found[3]) == with_sink


def make_attention(rng, groups, n, k):
    config = AttentionConfig(
        hidden_size=12,
        num_heads=n,
        num_kv_heads=k,
        head_dim=6,
        v_head_dim=5,
        rotary_dim=4,
        rope_theta=100.0,
        window=None,
        value_scale=0.707,
        sink=True,
    )
    attention = nnx.jit(lambda: Attention(config, groups, jnp.float32, nnx.Rngs(0)))()
    attention.qkv[...] = jnp.asarray(rng.standard_normal(attention.qkv.shape), jnp.float32)
    return attention


@pytest.mark.parametrize(("n", "k", "groups"), [(8, 2, 4), (8, 2, 8), (6, 1, 3), (4, 4, 4)])
def test_regrouped_heads_are_the_same_attention(n, k, groups, rng):
    stored = make_attention(rng, k, n, k)
    repeated = make_attention(rng, groups, n, k)
    repeated.qkv[...] = jax.jit(regroup, static_argnums=(1, 2, 3))(stored.qkv[...], groups, 6, 5)
    b, t = 2, 7
    x = jnp.asarray(rng.standard_normal((b, t, 12)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    outputs = []
    for attention in (stored, repeated):
        q, keys, values = nnx.jit(Attention.project)(attention, x, positions)
        assert keys.shape[2] == attention.qkv.shape[0]
        outputs.append(SEQUENCE(q, keys, values, None, stored.sink[...]))
    assert_close(outputs[1], outputs[0], "float32")


def test_projection_reads_heads_then_key_then_value(rng):
    n, k, d, h, v, t = 6, 2, 12, 6, 5, 4
    attention = make_attention(rng, k, n, k)
    weight = np.asarray(attention.qkv[...], np.float64)
    x, positions = rng.standard_normal((1, t, d)), rng.integers(0, 50, (1, t))
    q, keys, values = nnx.jit(Attention.project)(
        attention, *single(x), jnp.asarray(positions, jnp.int32)
    )

    def rotate(vector, position):
        out = vector.copy()
        for i in range(2):
            angle = position * 100.0 ** (-2 * i / 4)
            a, b = vector[i], vector[i + 2]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    expected = [np.zeros((1, t, n, h)), np.zeros((1, t, k, h)), np.zeros((1, t, k, v))]
    for j, group in np.ndindex(t, k):
        rows = weight[group] @ x[0, j]
        for member in range(n // k):
            head = rows[member * h : (member + 1) * h]
            expected[0][0, j, group * (n // k) + member] = rotate(head, positions[0, j])
        key = rows[n // k * h : n // k * h + h]
        expected[1][0, j, group] = rotate(key, positions[0, j])
        expected[2][0, j, group] = 0.707 * rows[n // k * h + h :]
    for got, want in zip((q, keys, values), expected, strict=True):
        assert_close(got, want, "float32")


def test_rope_keeps_relative_positions_and_the_rest(rng):
    x, y = (jnp.asarray(rng.standard_normal((1, 1, 40, 9)), jnp.float32) for _ in range(2))

    def product(i, j):
        at = [ROPE(z, jnp.full((1, 1), p, jnp.int32), 50.0, 6) for z, p in ((x, i), (y, j))]
        np.testing.assert_array_equal(at[0][..., 6:], x[..., 6:])
        return (at[0] * at[1]).sum(axis=-1)

    assert_close(product(3, 10), product(13, 20), "float32")
    assert relative_norm(product(3, 10), product(3, 11)) > 1e-2


def test_rms_norm(rng):
    x, weight = rng.standard_normal((3, 8)), rng.standard_normal(8)
    expected = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-3) * weight
    assert_close(rms_norm(*single(x, weight), 1e-3), expected, "float32")
