"""Caches against a plain list of rows: full ones and rings, written in blocks and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.cache import cache_rows, extend, init_cache, last_rows
from mimo_jax.config import AttentionConfig

HEADS, HEAD, VALUE = 3, 5, 4
EXTEND = jax.jit(extend, static_argnums=5)


def attention(window) -> AttentionConfig:
    return AttentionConfig(
        hidden_size=8,
        num_heads=6,
        num_kv_heads=HEADS,
        head_dim=HEAD,
        v_head_dim=VALUE,
        rotary_dim=2,
        rope_theta=1e4,
        window=window,
        value_scale=1.0,
        sink=False,
    )


def rows_of(tag: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys [.., k, h] and values [.., k, v] that carry a unique tag in every element."""
    keys = tag[..., None, None] + np.arange(HEADS * HEAD).reshape(HEADS, HEAD) / 64
    values = tag[..., None, None] + np.arange(HEADS * VALUE).reshape(HEADS, VALUE) / 64 + 0.5
    return keys.astype(np.float32), values.astype(np.float32)


def seen(keys, values, places, sequence, query, window) -> dict[int, float]:
    """Position -> tag of the rows that a query sees; fails if one position is there twice."""
    found = {}
    for row in range(places.shape[1]):
        position = int(places[sequence, row])
        if position < 0 or position > query or (window and position <= query - window):
            continue
        tag = float(keys[sequence, 0, row, 0])
        expected_keys, expected_values = rows_of(np.array(tag))
        np.testing.assert_array_equal(keys[sequence, :, row], expected_keys)
        np.testing.assert_array_equal(values[sequence, :, row], expected_values)
        assert position not in found, "a position is cached twice"
        found[position] = tag
    return found


@pytest.mark.parametrize("window", [None, 3, 7])
@pytest.mark.parametrize("chunk", [1, 4, 19])
def test_extend_shows_each_query_its_window(window, chunk, rng):
    """Blocks of `block` rows of which a part is kept, and chunks, in any order."""
    batch, block, max_len = 2, 4, 70
    config = attention(window)
    for _ in range(4):
        cache = init_cache(config, HEADS, batch, max_len, block, jnp.float32)
        oracle: list[list[float]] = [[] for _ in range(batch)]
        number = 0
        while min(map(len, oracle)) < max_len - chunk - block:
            width = int(rng.choice([block, chunk]))
            live = rng.integers(0 if number else 1, width + 1, batch)
            start = np.array([len(rows) for rows in oracle], np.int32)
            live = np.minimum(live, max_len - start)
            # Only blocks are taken back: a prompt's chunk is kept whole.
            kept = rng.integers(0, live + 1) if width == block else live
            number += 1
            tags = 1.0 + number * 64 + np.arange(batch * width).reshape(batch, width)
            keys, values = rows_of(tags)
            mask = jnp.asarray(np.arange(width) < live[:, None])
            cache, all_keys, all_values, places = EXTEND(
                cache, jnp.asarray(keys), jnp.asarray(values), jnp.asarray(start), mask, window
            )
            shown = [np.asarray(x) for x in (all_keys, all_values, places)]
            for b in range(batch):
                present = oracle[b] + tags[b, : live[b]].tolist()
                for slot in range(live[b]):
                    query = int(start[b]) + slot
                    first = 0 if window is None else max(0, query - window + 1)
                    expected = {p: present[p] for p in range(first, query + 1)}
                    assert seen(*shown, b, query, window) == expected
                oracle[b] = present[: start[b] + kept[b]]


@pytest.mark.parametrize("size", [1, 5, 11])
def test_positions_of_rows(size):
    config = attention(size)
    cache = init_cache(config, HEADS, 1, 99, 1, jnp.float32)
    assert cache.size == size
    holds = [-1] * size
    for end in range(40):
        if end:
            holds[(end - 1) % size] = end - 1
        got = np.asarray(cache.positions(jnp.asarray([end], jnp.int32)))[0]
        assert [p if p >= 0 else -1 for p in got.tolist()] == holds


def test_write_touches_only_kept_rows(rng):
    batch, size, t = 3, 9, 6
    cache = init_cache(attention(size), HEADS, batch, 99, 1, jnp.float32)
    for _ in range(20):
        start = rng.integers(0, 50, batch).astype(np.int32)
        keep = rng.random((batch, t)) < 0.5
        keys, values = rows_of(rng.integers(1, 1000, (batch, t)).astype(float))
        before = [np.array(cache.keys), np.array(cache.values)]
        cache = cache.write(
            jnp.asarray(keys), jnp.asarray(values), jnp.asarray(start), jnp.asarray(keep)
        )
        for b, slot in np.argwhere(keep):
            place = (start[b] + slot) % size
            before[0][b, :, place] = keys[b, slot]
            before[1][b, :, place] = values[b, slot]
        np.testing.assert_array_equal(cache.keys, before[0])
        np.testing.assert_array_equal(cache.values, before[1])


def test_last_rows(rng):
    run = jax.jit(last_rows, static_argnums=1)
    for _ in range(50):
        t, count = 9, int(rng.integers(1, 12))
        live = np.arange(t) < rng.integers(0, t + 1, 4)[:, None]
        got = np.asarray(run(jnp.asarray(live), count))
        for row, mask in zip(got, live, strict=True):
            total = int(mask.sum())
            assert np.flatnonzero(row).tolist() == list(range(max(0, total - count), total))


def test_rows_of_a_cache():
    assert cache_rows(attention(None), 100, 8) == 112
    assert cache_rows(attention(None), 104, 8) == 112
    assert cache_rows(attention(16), 100, 8) == 16 + 8 - 1
