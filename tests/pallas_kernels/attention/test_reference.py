"""The package's reference and checks: against the model's own attention, on any jax."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import cache, distance, history, normal, reference

from mimo_jax.cache import LayerCache
from mimo_jax.model.attention import attend, causal
from mimo_jax.model.dflash import seen_rows
from mimo_jax.model.layers import rms_norm, rope, rotary_angles
from pallas_kernels.attention import block_attention, checks, decode_attention, draft_attention
from pallas_kernels.attention.chunks import SMALLEST, Chunks
from pallas_kernels.attention.shapes import SHAPES


def make(rng, b=2, t=3, n=6, h=16, v=32, k=2, s=29, end=(40, 2)):
    q = normal(rng, b, t, n, h)
    held = [cache(history(rng, k, h, v, e), s, e, garbage=0.0) for e in end]
    keys, values = (np.stack(x) for x in zip(*held, strict=True))
    live = np.asarray([t, 1], np.int32)[:b]
    return q, keys, values, np.asarray(end, np.int32) - live, live


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("with_sink", [True, False])
def test_reference_is_what_the_model_does(window, with_sink, rng):
    end = (40, 2) if window else (27, 2)
    q, keys, values, start, live = make(rng, end=end)
    sink = rng.normal(size=6).astype(np.float32) if with_sink else None
    out = reference(q, keys, values, start, live, window, sink)
    row = jnp.asarray(start)[:, None] + jnp.arange(3, dtype=jnp.int32)
    places = LayerCache(jnp.asarray(keys), jnp.asarray(values)).positions(jnp.asarray(start + live))
    visible = causal(row, places, window)
    arrays = (jnp.asarray(x) for x in (q, keys, values))
    wanted = attend(*arrays, visible, None if sink is None else jnp.asarray(sink))
    assert distance(out[0], wanted[0]) < 5e-3
    assert distance(out[1, :1], wanted[1, :1]) < 5e-3


def test_rows_that_nobody_sees_may_hold_anything(rng):
    q, keys, values, start, live = make(rng)
    clean = reference(q, keys, values, start, live, 20, None)
    from pallas_kernels.attention.reference import positions

    place = np.asarray(positions(jnp.asarray(start + live), 29))
    hidden = (place < 0) | (place <= start[:, None] - 20)
    keys, values = (np.where(hidden[:, None, :, None], np.nan, x) for x in (keys, values))
    dirty = reference(q, keys.astype(q.dtype), values.astype(q.dtype), start, live, 20, None)
    assert hidden.any(axis=1).all()
    np.testing.assert_array_equal(clean, dirty)


def model_block(fused, start, live, cache, window, sink, scale, theta=500.0, rotary=8):
    """What the model does without the kernel, in steps."""
    (b, t, _, rows), h, v = fused.shape, cache.keys.shape[3], cache.values.shape[3]
    place = start[:, None] + jnp.arange(t, dtype=jnp.int32)
    split = rows - h - v
    q = rope(fused[..., :split].reshape(b, t, -1, h), place, theta, rotary)
    k = rope(fused[..., split : split + h], place, theta, rotary)
    v = fused[..., split + h :] * jnp.asarray(scale, fused.dtype)
    cache = cache.write(k, v, start, jnp.arange(t, dtype=jnp.int32) < live[:, None])
    visible = causal(place, cache.positions(start + live), window)
    heads = attend(q, cache.keys, cache.values, visible, sink)
    return heads, cache.keys, cache.values, rotary_angles(place, theta, rotary)


@pytest.mark.parametrize("window", [None, 20])
def test_a_blocks_reference_is_what_the_model_does(window, rng):
    q, keys, values, start, live = (jnp.asarray(x) for x in make(rng, end=(27, 2)))
    fused = jnp.asarray(normal(rng, 2, 3, 2, 4 * 16 + 32))
    sink = jnp.asarray(rng.normal(size=6).astype(np.float32))
    *wanted, angles = model_block(fused, start, live, LayerCache(keys, values), window, sink, 0.6)
    options = dict(window=window, sink=sink, value_scale=0.6)
    found = block_attention(fused, *angles, keys, values, start, live, **options)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert distance(found[0][0], wanted[0][0]) < 5e-3
    assert distance(found[0][1, :1], wanted[0][1, :1]) < 5e-3


def model_draft(qkv, norms, start, keys, values, sink, window, scale, epsilon, theta=500.0):
    """What a drafter does without the kernel, in steps: heads [b, t, n, v]."""
    (b, t, _, rows), h, v = qkv.shape, keys.shape[3], values.shape[3]
    place = start[:, None] + jnp.arange(t, dtype=jnp.int32)
    q, k, own = jnp.split(qkv, [rows - h - v, rows - v], axis=-1)
    q = rope(rms_norm(q.reshape(b, t, -1, h), norms[0], epsilon), place, theta, 8)
    k = rope(rms_norm(k, norms[1], epsilon), place, theta, 8)
    at = LayerCache(keys, values).positions(start)
    seen = seen_rows(at, start, place, window)
    seen = jnp.concatenate([seen, jnp.ones((b, t, t), bool)], axis=2)
    own = own * jnp.asarray(scale, own.dtype)
    both = (jnp.concatenate([x, y.swapaxes(1, 2)], axis=2) for x, y in ((keys, k), (values, own)))
    return attend(q, *both, seen, sink), rotary_angles(place, theta, 8)


def test_a_drafts_reference_is_what_the_model_does(rng):
    _, keys, values, start, _ = (jnp.asarray(x) for x in make(rng, end=(43, 6)))
    qkv = jnp.asarray(normal(rng, 2, 3, 2, 4 * 16 + 32)) * 3
    norms = [jnp.asarray(normal(rng, 16)) for _ in range(2)]
    sink = jnp.asarray(rng.normal(size=6).astype(np.float32))
    options = dict(window=21, value_scale=0.6, epsilon=0.5, sink=sink)
    given = start, keys, values, sink, 21, 0.6
    wanted, angles = model_draft(qkv, norms, *given, 0.5)
    found = draft_attention(qkv, *norms, *angles, keys, values, start, **options)
    assert distance(found, wanted) < 5e-3
    for wrong in (
        model_draft(qkv, norms[::-1], *given, 0.5),
        model_draft(qkv, norms, *given, 1e-6),
        model_draft(qkv, norms, *given[:-2], 20, 0.6, 0.5),
        model_draft(qkv, norms, *given[:-1], 0.7, 0.5),
    ):
        assert not distance(found, wrong[0]) < 1e-2


def test_auto_takes_what_the_caller_has_instead_on_a_cpu(rng):
    _, keys, values, start, live = (jnp.asarray(x) for x in make(rng))
    fused, angles = jnp.zeros((2, 3, 2, 96), keys.dtype), jnp.zeros((2, 3, 4))
    arguments = fused, angles, angles, keys, values, start, live

    def elsewhere(fused, cos, sin, keys, values, start, live, sink):
        return jnp.ones((2, 3, 4, 32), fused.dtype), keys, values

    heads, *_ = block_attention(*arguments, elsewhere=elsewhere)
    assert (heads == 1).all()
    heads, *_ = block_attention(*arguments, elsewhere=elsewhere, implementation="reference")
    # One of random numbers may be 1 by chance.
    assert not (heads == 1).all()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(qkv=(2, 3, 2, 95)), "whole queries"),
        (dict(qkv=(2, 3, 2, 48)), "whole queries"),
        (dict(qkv=(2, 3, 1, 96)), "1 key/value heads, the cache 2"),
        (dict(cos=(2, 3, 9)), "at most 8"),
        (dict(sin=(2, 1, 4)), "at most 8"),
        (dict(sink=(5,)), "must be"),
        (dict(window=28), "a block of 3 needs 30 rows or more; this has 29"),
    ],
)
def test_what_does_not_fit_a_block_is_refused(change, what):
    shapes = dict(
        qkv=(2, 3, 2, 96), cos=(2, 3, 4), sin=(2, 3, 4), keys=(2, 2, 29, 16), start=(2,), live=(2,),
        values=(2, 2, 29, 32),
    ) | change  # fmt: skip
    if "cos" in change:
        shapes["sin"] = shapes["cos"]
    arrays = {k: v if k == "window" else jnp.zeros(v) for k, v in shapes.items()}
    with pytest.raises(ValueError, match=what):
        checks.check_block(**{"sink": None, "window": None, **arrays})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(query_norm=(17,)), r"query_norm \(17,\) and key_norm \(16,\) must be \[16\]"),
        (dict(key_norm=(1, 16)), "must be"),
        (dict(qkv=(2, 3, 2, 95)), "whole queries"),
        (dict(window=2), "window=2 must be at least t=3"),
        (dict(window=28), "a block of 3 needs 30 rows or more; this has 29"),
    ],
)
def test_what_does_not_fit_a_draft_is_refused(change, what):
    shapes = dict(
        qkv=(2, 3, 2, 96), query_norm=(16,), key_norm=(16,), cos=(2, 3, 4), sin=(2, 3, 4),
        keys=(2, 2, 29, 16), values=(2, 2, 29, 32), start=(2,),
    ) | change  # fmt: skip
    window = shapes.pop("window", 20)
    arrays = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=what):
        checks.check_draft(**arrays, window=window, sink=None)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            dict(window=28),
            "a block of 3 needs 30 rows or more; this has 29",
        ),
        (dict(q=(2, 3, 5, 16)), "5 heads, the cache 2"),
        (dict(keys=(2, 2, 29, 24)), "must be"),
        (dict(values=(2, 2, 28, 32)), "must be"),
        (dict(start=(3,)), "must be"),
        (dict(sink=(5,)), "must be"),
        (dict(q=(2, 30, 6, 16)), "a cache and a block of 30 needs 30 rows"),
    ],
)
def test_what_does_not_fit_is_refused(change, what):
    shapes = dict(
        q=(2, 3, 6, 16), keys=(2, 2, 29, 16), values=(2, 2, 29, 32), start=(2,), live=(2,)
    )
    arrays = {
        name: value if name == "window" else jnp.zeros(value)
        for name, value in (shapes | change).items()
    }
    with pytest.raises(ValueError, match=what):
        checks.check_decode(**{"sink": None, "window": None, **arrays})


def test_an_unknown_implementation_is_refused(rng):
    arguments = [jnp.asarray(x) for x in make(rng)]
    with pytest.raises(ValueError, match="'fast' is not one of"):
        decode_attention(*arguments, implementation="fast")


def test_auto_is_the_reference_on_a_cpu(rng):
    arguments = [jnp.asarray(x) for x in make(rng)]
    np.testing.assert_array_equal(
        decode_attention(*arguments, window=20),
        decode_attention(*arguments, window=20, implementation="reference"),
    )


@pytest.mark.parametrize("ratio", [4, 64])
def test_chunks_are_counted_and_placed_as_they_are_laid(ratio, rng):
    rows = 1 << 20
    chunks, starts = Chunks(rows, ratio), [0]
    while starts[-1] < rows:
        size = SMALLEST
        while 2 * size * ratio <= starts[-1]:
            size *= 2
        starts.append(starts[-1] + size)
    assert chunks.most == len(starts) - 1
    for chunk in {0, chunks.most - 1, *rng.integers(0, chunks.most, 50)}:
        low, size = chunks.place(np.int32(chunk), np.where)
        assert (low, low + size) == tuple(starts[chunk : chunk + 2])
        for end in (low, low + 1, low + size):
            assert chunks.count(end, np.maximum) == np.searchsorted(starts, end)


def test_real_shapes_have_caches_that_the_copy_engine_takes():
    for shape in SHAPES.values():
        rows = shape.rows(1000, 8)
        assert rows == 135 if shape.window else rows % 64 == 0 and rows >= 1008
