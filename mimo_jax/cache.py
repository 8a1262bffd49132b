"""Keys and values of past tokens, written by position: full arrays, and rings for windows."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax.config import AttentionConfig
from mimo_jax.sharding import Leaf, spec

ROWS = 8
"""A full cache's rows are a multiple of it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's rows. The row of position p is p % s: in a full cache, s is past every position.

    A ring holds window + block - 1 rows: a block of which only a part is kept must not have
    overwritten a row that the next block's first query still sees.
    """

    keys: Leaf  # [b, k, s, h]
    values: Leaf  # [b, k, s, v]

    @property
    def size(self) -> int:
        """Rows."""
        return self.keys.shape[2]

    def positions(self, end: Int32[Array, "b"]) -> Int32[Array, "b s"]:
        """Position that each row holds once all before `end` are written; negative: none yet."""
        last = end[:, None] - 1
        row = jnp.arange(self.size, dtype=jnp.int32)
        return last - (last - row) % self.size

    def write(
        self,
        keys: Float[Array, "b t k h"],
        values: Float[Array, "b t k v"],
        start: Int32[Array, "b"],
        keep: Bool[Array, "b t"],
    ) -> "LayerCache":
        """Writes rows at positions start, start + 1, ...; rows that are not kept are dropped.

        At most `size` consecutive rows may be kept, or two would meet in one place.
        """
        b, t, k = keys.shape[:3]
        place = (start[:, None] + jnp.arange(t, dtype=jnp.int32)) % self.size
        # Each dropped row has a place of its own past the end: the indices stay unique.
        place = jnp.where(keep, place, self.size + jnp.arange(t, dtype=jnp.int32))
        # All of b, k and s are scatter dimensions, in the array's order: XLA then updates the
        # loop's carry in place and needs no transpose, which would copy the cache every round.
        where = (
            jnp.arange(b)[:, None, None],
            jnp.arange(k)[None, None, :],
            place[:, :, None],
        )
        options = {"mode": "drop", "unique_indices": True}
        return LayerCache(
            self.keys.at[where].set(keys.astype(self.keys.dtype), **options),
            self.values.at[where].set(values.astype(self.values.dtype), **options),
        )


def last_rows(live: Bool[Array, "b t"], count: int) -> Bool[Array, "b t"]:
    """The last `count` live rows of each sequence; live rows come first."""
    total = live.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return live & (jnp.arange(live.shape[1], dtype=jnp.int32) >= total - count)


@jax.named_scope("attention_cache")
def extend(
    cache: LayerCache,
    keys: Float[Array, "b t k h"],
    values: Float[Array, "b t k v"],
    start: Int32[Array, "b"],
    live: Bool[Array, "b t"],
    window: int | None,
) -> tuple[LayerCache, Array, Array, Array]:
    """Adds a block's rows and returns what its queries attend to.

    A block that fits beside the window is written first and attends to the cache alone, so that
    sums run by position. A longer one (a prompt's chunk) would overwrite rows that it needs: it
    attends to the ring and to itself, and its last rows are written afterwards.

    Returns:
      the cache, keys [b, k, s, h], values [b, k, s, v] and the positions [b, s] of their rows.
    """
    t = keys.shape[1]
    written = cache.write(keys, values, start, last_rows(live, cache.size))
    if window is None or t <= cache.size - window + 1:
        end = start + live.sum(axis=-1, dtype=jnp.int32)
        return written, written.keys, written.values, written.positions(end)
    own = start[:, None] + jnp.arange(t, dtype=jnp.int32)
    return (
        written,
        jnp.concatenate([cache.keys, keys.transpose(0, 2, 1, 3)], axis=2),
        jnp.concatenate([cache.values, values.transpose(0, 2, 1, 3)], axis=2),
        jnp.concatenate([cache.positions(start), own], axis=1),
    )


def cache_rows(config: AttentionConfig, max_len: int, block: int) -> int:
    """Rows of a layer's cache: with a block of slack at the end, or a ring."""
    if config.window is not None:
        return config.window + block - 1
    # The copy engine of a GPU takes whole groups of rows.
    return -(-(max_len + block) // ROWS) * ROWS


def init_cache(
    config: AttentionConfig, groups: int, batch: int, max_len: int, block: int, dtype
) -> LayerCache:
    """An empty cache of a layer whose key/value heads were regrouped into `groups`."""
    shape = (batch, groups, cache_rows(config, max_len, block))
    return LayerCache(
        jnp.zeros((*shape, config.head_dim), dtype), jnp.zeros((*shape, config.v_head_dim), dtype)
    )


def cache_spec(rules: dict[str, str | None]) -> LayerCache:
    """PartitionSpecs of a layer's cache."""
    axes: PartitionSpec = spec((None, "kv_heads", None, None), rules)
    return LayerCache(axes, axes)
