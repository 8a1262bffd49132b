"""Choosing tokens: arg-max or sampling on vocabulary shards, and the rule that accepts a draft."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Int32, UInt32

from mimo_jax.decode.nucleus import kept
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


def choose(
    logits: Float[Array, "b t w"],
    positions: Int32[Array, "b t"],
    request: Request,
    parallel: Parallel,
) -> Int32[Array, "b t"]:
    """The target's token at each position, from this device's part of the logits before it.

    Only if a sequence of the batch has a temperature does the device do more than an arg-max.
    """
    warm = (request.temperature > 0)[:, None, None]

    def sampled():
        return argmax(
            jnp.where(warm, scores(logits, positions, request, parallel), logits), parallel
        )

    return lax.cond(warm.any(), sampled, lambda: argmax(logits, parallel))


def scores(
    logits: Float[Array, "b t w"],
    positions: Int32[Array, "b t"],
    request: Request,
    parallel: Parallel = Parallel(),
) -> Float[Array, "b t w"]:
    """What the sampled token has most of, by the Gumbel-max rule: logits plus noise.

    A token's noise depends on (seed, sequence, position, token) only. So drafted, plain and
    interrupted decoding draw the same tokens, at any temperature, on any number of devices.
    """
    temperature = jnp.where(request.temperature > 0, request.temperature, 1.0)
    scaled = logits / temperature[:, None, None]
    stays = kept(scaled, request.top_p, request.top_k, parallel)
    root = jax.random.key(request.seed, impl="threefry2x32")
    # Equals jax.random.bits for the whole vocabulary, of which this is a part.
    token = (parallel.index * logits.shape[-1]).astype(jnp.uint32)
    token = token + jnp.arange(logits.shape[-1], dtype=jnp.uint32)

    def bits(sequence, position):
        key = jax.random.fold_in(jax.random.fold_in(root, sequence), position)
        first, second = jax.random.key_data(key)
        return jnp.bitwise_xor(*threefry2x32_p.bind(first, second, jnp.zeros_like(token), token))

    drawn = jax.vmap(jax.vmap(bits, (None, 0)), (0, 0))(request.sequence, positions)
    return jnp.where(stays, scaled + _gumbel(drawn), -jnp.inf)


def _gumbel(bits: UInt32[Array, "*rows w"]) -> Float[Array, "*rows w"]:
    """Gumbel noise from 23 of 32 random bits, as jax.random.gumbel makes it."""
    mantissa = (bits >> 9) | jnp.uint32(0x3F800000)
    uniform = lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))


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
