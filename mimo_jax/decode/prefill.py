"""Prompts into the caches, chunk by chunk, inside the compiled program."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from mimo_jax.decode.state import State
from mimo_jax.sharding import Parallel


def prefill(model, drafter, taps, state: State, chunk: int, parallel: Parallel) -> State:
    """Caches every token but each sequence's newest, which the first round verifies.

    Args:
      model: the target.
      drafter: the drafter, of either kind, which takes in the target's features; or None.
      taps: layers whose outputs are the features.
      state: with `cached` rows done, `length` tokens present.
      chunk: rows a pass.
      parallel: this device's place on the mesh.
    """

    def pending(state: State):
        return (state.cached < state.length - 1).any()

    def one_chunk(state: State) -> State:
        offsets = state.cached[:, None] + jnp.arange(chunk, dtype=jnp.int32)
        live = offsets < state.length[:, None] - 1
        tokens = jnp.take_along_axis(state.tokens, jnp.where(live, offsets, 0), axis=1)
        _, features, caches = model(tokens, state.cached, live, state.caches, taps, parallel)
        contexts = state.contexts
        if drafter is not None:
            contexts = drafter.ingest_prompt(
                model, state.tokens, features, state.cached, live, contexts, parallel
            )
        cached = state.cached + live.sum(axis=1, dtype=jnp.int32)
        return dataclasses.replace(state, cached=cached, caches=caches, contexts=contexts)

    return lax.while_loop(pending, one_chunk, state)
