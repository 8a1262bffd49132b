"""Choosing tokens: arg-max or sampling on vocabulary shards, and the rule that accepts a draft."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax.model.mimo import argmax
from mimo_jax.sharding import Leaf, Parallel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What a caller may change without compiling anew; all of it is traced."""

    limit: Leaf  # int32 [b]
    """Length, prompt included, at which each sequence stops."""
    pause: Leaf  # int32 [b]
    """Length that the caller waits for: the program hands over after the round in which all have
    theirs. No round is cut, so that pauses change neither tokens nor rounds.
    """
    eos: Leaf  # int32 [any number]
    """Tokens that end a sequence; -1 fills unused places."""
    temperature: Leaf  # float32 [b]
    """0 is greedy."""
    top_p: Leaf  # float32 [b]
    """Smallest set of likeliest tokens of this mass; 1 is all."""
    top_k: Leaf  # int32 [b]
    """Likeliest tokens to choose from; 0 is all."""
    seed: Leaf  # uint32 scalar
    sequence: Leaf  # int32 [b]
    """Names the sequence in its noise, so that equal prompts of a batch get different samples."""
    max_draft: Leaf  # int32 scalar
    """Drafted tokens to verify a round; 0 is plain decoding."""


def truncate(
    logits: Float[Array, "b t w"], top_p: Float[Array, "b"], top_k: Int32[Array, "b"]
) -> Float[Array, "b t w"]:
    """Sets tokens outside top-k, and then outside top-p of what is left, to -inf; ties stay."""
    width = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, width), width)[:, None, None]
    kept = jnp.where(jnp.arange(width) < count, descending, -jnp.inf)
    mass = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    inside = (before < top_p[:, None, None]) | (top_p >= 1.0)[:, None, None]
    inside = inside & jnp.isfinite(kept)
    # The likeliest token always stays, whatever top_p is.
    inside = inside.at[..., 0].set(True)
    lowest = jnp.where(inside, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def sample(
    logits: Float[Array, "b t w"], positions: Int32[Array, "b t"], request: Request
) -> Int32[Array, "b t"]:
    """Samples by the Gumbel-max rule; a token's noise depends on (seed, sequence, position) only.

    So drafted, plain and interrupted decoding draw the same tokens, at any temperature.
    """
    temperature = jnp.where(request.temperature > 0, request.temperature, 1.0)
    scaled = truncate(logits / temperature[:, None, None], request.top_p, request.top_k)
    root = jax.random.key(request.seed, impl="threefry2x32")

    def noise(sequence, position):
        key = jax.random.fold_in(jax.random.fold_in(root, sequence), position)
        return jax.random.gumbel(key, (logits.shape[-1],), jnp.float32)

    gumbel = jax.vmap(jax.vmap(noise, (None, 0)), (0, 0))(request.sequence, positions)
    return jnp.argmax(scaled + gumbel, axis=-1).astype(jnp.int32)


def choose(
    logits: Float[Array, "b t w"],
    positions: Int32[Array, "b t"],
    request: Request,
    parallel: Parallel,
) -> Int32[Array, "b t"]:
    """The target's token at each position, from this device's part of the logits before it."""
    greedy = argmax(logits, parallel)

    def sampled():
        drawn = sample(parallel.gather(logits, -1), positions, request)
        return jnp.where((request.temperature > 0)[:, None], drawn, greedy)

    return lax.cond((request.temperature > 0).any(), sampled, lambda: greedy)


def accept(
    block: Int32[Array, "b t"],
    chosen: Int32[Array, "b t"],
    room: Int32[Array, "b"],
    request: Request,
) -> tuple[Int32[Array, "b"], Bool[Array, "b"]]:
    """How many of the chosen tokens are emitted, and whether the sequence ends with them.

    The target chose a token after every slot. A draft is kept while it equals the target's choice
    after the slot before it; one more choice, the correction or the bonus, comes for free. As
    drafts are kept only where they equal samples of the target, the output is exactly the target's.

    Args:
      block: the anchor and the drafts.
      chosen: the target's token after each slot.
      room: tokens that may still be emitted; 0 for a sequence that is over.
      request: for max_draft and the end-of-sequence ids.
    """
    slots = jnp.arange(1, block.shape[1], dtype=jnp.int32)
    agrees = (block[:, 1:] == chosen[:, :-1]) & (slots <= request.max_draft)
    count = 1 + jnp.cumprod(agrees.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
    ends = (chosen[:, :, None] == request.eos).any(axis=-1)
    first_end = jnp.where(
        ends.any(axis=1), jnp.argmax(ends, axis=1).astype(jnp.int32), block.shape[1]
    )
    count = jnp.minimum(jnp.minimum(count, first_end + 1), room)
    return count, first_end < count
