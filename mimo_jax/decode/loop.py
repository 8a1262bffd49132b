"""Draft, verify, accept, commit: the whole answer in one `lax.while_loop`."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mimo_jax.decode.sampling import Request, accept, choose
from mimo_jax.decode.state import State
from mimo_jax.sharding import Parallel


def decode(
    model, drafter, taps, state: State, request: Request, block: int, parallel: Parallel
) -> State:
    """Runs rounds until every sequence is over, at its limit, or past its pause.

    Args:
      model: the target.
      drafter: the drafter, of either kind (see `mimo_jax.model.drafters`), or None for plain
        decoding at the block's width.
      taps: layers whose outputs are the drafter's features.
      state: prefilled.
      request: limits and sampling.
      block: rows of a verified block, the anchor included.
      parallel: this device's place on the mesh. All devices take the same number of rounds: what
        decides it comes out of collectives, or is computed from equal bits on each.
    """

    def active(state: State):
        return ~state.done & (state.length < request.limit)

    def one_round(state: State) -> State:
        live_sequences = active(state)
        tokens, contexts = draft_block(model, drafter, state, request, block, parallel)
        slots = jnp.arange(block, dtype=jnp.int32)
        live = live_sequences[:, None] & (slots <= request.max_draft)
        h, features, caches = model(tokens, state.cached, live, state.caches, taps, parallel)
        following = state.length[:, None] + slots
        logits = model.logits(h)
        with jax.named_scope("accept"):
            chosen = choose(logits, following, request, parallel)
            room = jnp.where(live_sequences, request.limit - state.length, 0)
            count, ended = accept(tokens, chosen, room, request)
        if drafter is not None:
            # Features of rejected rows go in too: they lie past `cached`, where nothing looks.
            contexts = drafter.ingest(features, state.cached, live, contexts, parallel)
        return dataclasses.replace(
            _commit(state, chosen, count, ended, live_sequences), caches=caches, contexts=contexts
        )

    def waited_for(state: State):
        return (active(state) & (state.length < request.pause)).any()

    return lax.while_loop(waited_for, one_round, state)


def draft_block(model, drafter, state: State, request: Request, block: int, parallel: Parallel):
    """The block [b, block], the newest token and the drafts after it; and the contexts."""
    anchor = jnp.take_along_axis(state.tokens, state.cached[:, None], axis=1)
    if drafter is None or block == 1:
        return jnp.pad(anchor, ((0, 0), (0, block - 1))), state.contexts
    drafts, contexts = drafter.draft(
        model, state.tokens, state.cached, state.contexts, request.max_draft, block, parallel
    )
    return jnp.concatenate([anchor, drafts], axis=1), contexts


@jax.named_scope("commit")
def _commit(state: State, chosen, count, ended, counted) -> State:
    """Appends the emitted tokens; everything past them is left to be overwritten."""
    block = chosen.shape[1]
    slots = jnp.arange(block, dtype=jnp.int32)
    place = state.length[:, None] + slots
    # A dropped token has a place of its own past the end: the indices stay unique.
    place = jnp.where(slots < count[:, None], place, state.tokens.shape[1] + slots)
    sequence = jnp.arange(chosen.shape[0])
    where = (sequence[:, None], place)
    options = {"mode": "drop", "unique_indices": True}
    number = jnp.broadcast_to(state.histogram.sum(axis=1, keepdims=True), chosen.shape)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[where].set(chosen, **options),
        round_of=state.round_of.at[where].set(number, **options),
        length=state.length + count,
        cached=state.cached + count,
        done=state.done | (ended & counted),
        histogram=state.histogram.at[sequence, count].add(counted.astype(jnp.int32)),
    )
