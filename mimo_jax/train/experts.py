"""The mixture of experts over many tokens: sorted into fixed places by expert, for training.

Decoding reads each active expert once for a few tokens; training has thousands of tokens for each,
so they are gathered into [experts, capacity] places and multiplied in one batched product. A choice
that finds its expert full is left out, and counted.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mimo_jax.model.moe import MoE
from mimo_jax.sharding import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """What a layer's router did to a batch."""

    chosen: Leaf  # int32 [e]
    """Choices of each expert."""
    dropped: Leaf  # float32 []
    """Share of the choices that found no place."""


def capacity(tokens: int, experts: int, choices: int, factor: float) -> int:
    """Places for each expert: `factor` times the mean load, in eights, at most one for each token.

    With an infinite factor every choice finds a place.
    """
    if math.isinf(factor):
        return tokens
    return min(tokens, 8 * math.ceil(tokens * choices * factor / experts / 8))


def grouped_moe(
    ffn: MoE, x: Float[Array, "b t d"], factor: float
) -> tuple[Float[Array, "b t d"], Load]:
    """The MoE's output and the load; differentiable in x, the experts and the routing weights."""
    rows = x.reshape(-1, x.shape[-1])
    weights = ffn.experts.weights
    experts = weights.gate_up.shape[0]
    ids, routing = ffn.router(rows)
    places = capacity(len(rows), experts, ids.shape[1], factor)
    token_of, choice_of, place_of, chosen = _assign(ids, experts, places)
    grouped = _spread(rows, token_of, place_of).reshape(experts, places, -1)
    # Gate and up in one product: places are read once, and their gradient is one sum.
    both = weights.gate_up.reshape(experts, -1, grouped.shape[-1])
    hidden = _swiglu(jnp.einsum("ecd,efd->ecf", grouped, both))
    outputs = jnp.einsum("ecf,edf->ecd", hidden, weights.down)
    collected = _collect(outputs.reshape(experts * places, -1), place_of, choice_of)
    mixed = jnp.einsum("tcd,tc->td", collected, routing.astype(x.dtype))
    dropped = (place_of >= experts * places).mean(dtype=jnp.float32)
    return mixed.reshape(x.shape), Load(chosen, dropped)


def _assign(ids, experts: int, places: int):
    """Gives choices their places, expert by expert, earlier tokens first.

    Returns token_of [e * places] and choice_of [e * places] (their counts where a place is empty),
    place_of [t, c] (e * places where a choice was dropped), and each expert's choices [e].
    """
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    # Counted by comparing: a scatter would have all tokens wait for a few counters.
    chosen = (flat[:, None] == jnp.arange(experts)).sum(axis=0, dtype=jnp.int32)
    first = jnp.cumsum(chosen) - chosen
    ranks = jnp.arange(flat.size, dtype=jnp.int32) - first[flat[order]]
    place = jnp.where(ranks < places, flat[order] * places + ranks, experts * places)
    empty = jnp.full(experts * places, flat.size, jnp.int32)
    choice_of = empty.at[place].set(order, mode="drop")
    place_of = jnp.zeros(flat.size, jnp.int32).at[order].set(place, unique_indices=True)
    token_of = choice_of // ids.shape[1]
    return token_of, choice_of, place_of.reshape(ids.shape), chosen


@jax.custom_vjp
def _swiglu(both):
    """silu(gate) * up, side by side in `both`; its gradient is written in one pass."""
    gate, up = jnp.split(both, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _swiglu_forward(both):
    return _swiglu(both), both


def _swiglu_backward(both, gradient):
    # Each place finds its partner itself: a concatenation would be written twice.
    mine = both.reshape(*both.shape[:-1], 2, -1).astype(jnp.float32)
    other, is_gate = jnp.flip(mine, axis=-2), jnp.arange(2)[:, None] == 0
    gate, up = jnp.where(is_gate, mine, other), jnp.where(is_gate, other, mine)
    share = jax.nn.sigmoid(gate)
    slope = jnp.where(is_gate, up * share * (1 + gate * (1 - share)), gate * share)
    found = gradient[..., None, :].astype(jnp.float32) * slope
    return (found.reshape(both.shape).astype(both.dtype),)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _at(x, rows):
    """Rows of x; zeros for places out of range."""
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _spread(x, token_of, place_of):
    """Rows of tokens in their places. Both directions are gathers: scatters would need atomics."""
    return _at(x, token_of)


def _spread_forward(x, token_of, place_of):
    return _spread(x, token_of, place_of), (token_of, place_of)


def _spread_backward(saved, gradient):
    token_of, place_of = saved
    return _at(gradient, place_of).sum(axis=1), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(outputs, place_of, choice_of):
    """Each token's choices [t, c, d] out of their places; zeros where a choice was dropped."""
    return _at(outputs, place_of)


def _collect_forward(outputs, place_of, choice_of):
    return _collect(outputs, place_of, choice_of), (place_of, choice_of)


def _collect_backward(saved, gradient):
    place_of, choice_of = saved
    return _at(gradient.reshape(place_of.size, -1), choice_of), None, None


_collect.defvjp(_collect_forward, _collect_backward)
