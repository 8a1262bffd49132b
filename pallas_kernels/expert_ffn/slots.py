"""The kernel's work list: active experts with the tokens that chose them, made on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

TOKENS = 8
"""Tokens of one tensor-core tile, and of a slot."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The work list: a slot is an active expert and up to 8 tokens that chose it; -1 is no token.

    In a block of at most 8 tokens a token's lane is its row, so that x stays where it is from slot
    to slot.

    Attributes:
      count: its last element is the number of slots in use; they come first, by ascending expert.
      expert: of each slot.
      token: row of x.
      choice: row of the results, c a token: the token's experts in ascending order.
      share: routing weight.
      live: distinct experts of each token, which is how many of its c rows of results are written.
      rows: of the results, t c.
    """

    count: Int32[Array, " n"]
    expert: Int32[Array, " s"]
    token: Int32[Array, "s 8"]
    choice: Int32[Array, "s 8"]
    share: Float[Array, "s 8"]
    live: Int32[Array, " t"]
    rows: int = dataclasses.field(metadata=dict(static=True))


def most_slots(t: int, c: int, experts: int) -> int:
    """Slots that t tokens of c choices can open."""
    if t <= TOKENS:
        return min(experts, t * c)
    return (t * c + (TOKENS - 1) * min(experts, t * c)) // TOKENS


def make_slots(
    expert_ids: Int32[Array, "t c"], routing: Float[Array, "t c"], experts: int
) -> Slots:
    """Lists the distinct active experts with their tokens, on the device.

    An expert that more than 8 tokens chose gets several slots, so that many tokens (a prefill) read
    each expert's weights once for 8 of them. A token that names an expert twice gets one row with
    the sum of its shares; dead ids get none. Compares all pairs of choices instead of sorting: few
    kernels, all of which a CUDA graph takes.
    """
    t, c = expert_ids.shape
    valid = (expert_ids >= 0) & (expert_ids < experts)
    columns = [expert_ids[:, i] for i in range(c)]
    rank, repeated = jnp.zeros((t, c), jnp.int32), jnp.zeros((t, c), bool)
    share, live = jnp.zeros((t, c), jnp.float32), jnp.zeros(t, jnp.int32)
    for i, column in enumerate(columns):
        same = column[:, None] == expert_ids
        share = share + jnp.where(same, routing[:, i, None].astype(jnp.float32), 0.0)
        first = valid[:, i]
        for earlier in columns[:i]:
            first &= earlier != column
        live += first.astype(jnp.int32)
        rank += (first[:, None] & (column[:, None] < expert_ids)).astype(jnp.int32)
        repeated |= same & (i < jnp.arange(c))
    row = valid & ~repeated
    pair_id, pair_row = expert_ids.reshape(-1), row.reshape(-1)
    # A token's place among those that chose the same expert gives its slot and its lane in the
    # slot.
    token = jnp.repeat(jnp.arange(t, dtype=jnp.int32), c)
    chose = functools.reduce(jnp.logical_or, [pair_id[:, None] == column for column in columns])
    place = jnp.sum(chose & (jnp.arange(t) < token[:, None]), 1, dtype=jnp.int32)
    opens = pair_row & (place % TOKENS == 0)
    # The last bound counts all slots.
    bounds = jnp.concatenate([pair_id, jnp.full(1, experts, jnp.int32)])
    below = jnp.sum(opens & (pair_id < bounds[:, None]), 1, dtype=jnp.int32)
    slot = below[:-1] + place // TOKENS
    most = most_slots(t, c, experts)
    lane = token if t <= TOKENS else place % TOKENS
    cell = jnp.where(pair_row, slot * TOKENS + lane, -1)
    cells = jnp.arange(most * TOKENS, dtype=jnp.int32).reshape(most, TOKENS, 1)
    pair = jnp.max(jnp.where(cell == cells, jnp.arange(t * c, dtype=jnp.int32), -1), 2)
    used, at = pair >= 0, jnp.maximum(pair, 0)
    return Slots(
        count=below,
        expert=jnp.max(jnp.where(used, pair_id[at], 0), 1),
        token=jnp.where(used, at // c, -1),
        choice=jnp.where(used, at // c * c + rank.reshape(-1)[at], -1),
        share=jnp.where(used, share.reshape(-1)[at], 0.0),
        live=live,
        rows=t * c,
    )


def live_choices(expert_ids: Int32[Array, "t c"], experts: int) -> Int32[Array, " t"]:
    """Distinct valid experts of each token."""
    valid = (expert_ids >= 0) & (expert_ids < experts)
    count = jnp.zeros(expert_ids.shape[0], jnp.int32)
    for i in range(expert_ids.shape[1]):
        first = valid[:, i]
        for j in range(i):
            first &= expert_ids[:, j] != expert_ids[:, i]
        count += first.astype(jnp.int32)
    return count


def sum_choices(results: Float[Array, "tc d"], live: Int32[Array, " t"]) -> Float[Array, "t d"]:
    """Adds each token's results by ascending expert, without rows that were never written."""
    results = results.reshape(live.shape[0], -1, results.shape[-1])
    total = jnp.zeros_like(results[:, 0])
    for i in range(results.shape[1]):
        total = jnp.where(i < live[:, None], total + results[:, i], total)
    return total


def out_dtype_of(residual, out_dtype: DTypeLike | None):
    """The type of the sums: what is asked for, or the residual's, or float32.

    Raises:
      ValueError: if it is neither float32 nor bfloat16.
    """
    if out_dtype is None:
        return jnp.dtype(jnp.float32 if residual is None else residual.dtype)
    if jnp.dtype(out_dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"out_dtype is {jnp.dtype(out_dtype)}; it must be float32 or bfloat16.")
    return jnp.dtype(out_dtype)
