"""What the loop carries: tokens, caches, counters; a frozen pytree, divided by one table."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mimo_jax.cache import LayerCache, cache_spec, init_cache
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import AnyDrafterConfig
from mimo_jax.model.drafters import drafter_class
from mimo_jax.sharding import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A batch of sequences in the middle of being decoded.

    Between rounds, `cached == length - 1`: the newest token, the anchor of the next block, has been
    chosen and not yet run through the target.
    """

    tokens: Leaf  # int32 [b, l]
    length: Leaf  # int32 [b]
    """Tokens present, prompt included."""
    cached: Leaf  # int32 [b]
    """Positions whose rows are in the caches."""
    done: Leaf  # bool [b]
    """Whether an end-of-sequence token was emitted."""
    round_of: Leaf  # int32 [b, l]
    """The round that emitted each token, from 0 on; -1 for the prompt."""
    histogram: Leaf  # int32 [b, block + 1]
    """Rounds by the number of tokens that they emitted, 0 to the block's size."""
    caches: tuple[LayerCache, ...]
    contexts: Any
    """The drafter's: what its kind keeps; empty without a drafter."""


def init_state(
    config: ModelConfig,
    drafter: AnyDrafterConfig | None,
    *,
    batch: int,
    max_len: int,
    block: int,
    shards: int,
    dtype,
) -> State:
    """An empty state, to be created inside jit on its mesh.

    Args:
      config: of the target.
      drafter: of the drafter, or None.
      batch: sequences.
      max_len: tokens that a sequence may have; arrays have a block of slack behind them.
      block: rows of a verified block.
      shards: devices that key/value heads are spread over.
      dtype: of keys and values.

    Raises:
      MimoError: if the drafter cannot draft for a block of that size.
    """
    layers = [config.attention(layer) for layer in range(config.num_hidden_layers)]
    sizes = {"batch": batch, "max_len": max_len, "block": block, "shards": shards, "dtype": dtype}

    return State(
        tokens=jnp.zeros((batch, max_len + block), jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        cached=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        round_of=jnp.full((batch, max_len + block), -1, jnp.int32),
        histogram=jnp.zeros((batch, block + 1), jnp.int32),
        caches=tuple(
            init_cache(a, max(shards, a.num_kv_heads), batch, max_len, block, dtype) for a in layers
        ),
        contexts=() if drafter is None else drafter_class(drafter).init_contexts(drafter, **sizes),
    )


def state_specs(state: State, rules: dict[str, str | None]) -> State:
    """PartitionSpecs of a state: caches over key/value heads, all else on every device."""

    def is_cache(leaf: Any) -> bool:
        return isinstance(leaf, LayerCache)

    return jax.tree.map(
        lambda leaf: cache_spec(rules) if is_cache(leaf) else PartitionSpec(),
        state,
        is_leaf=is_cache,
    )
