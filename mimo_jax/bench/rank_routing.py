"""How a rank's tokens choose experts: uniformly or by Zipf's law, and counted where they do."""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from mimo_jax.decode.loop import draft_block
from mimo_jax.decode.program import Plan, Settings, state_maker
from mimo_jax.decode.state import state_specs
from mimo_jax.planning.routing import distinct_experts

TOLERANCE = 2.0
"""Experts a layer that the measured mean may differ from the expected one."""


def shares(experts: int, choices: int, exponent: float) -> np.ndarray:
    """The probability that a token chooses each expert, likeliest first; their sum is `choices`.

    Experts are drawn without replacement, in proportion to rank^-exponent. Of as many independent
    clocks that ring at these rates, those have rung that are chosen; at a time at which `choices`
    have rung on average, the probabilities are 1 - exp(-rate * time).
    """
    rates = np.arange(1, experts + 1) ** -float(exponent)
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        few = (1 - np.exp(-rates * middle)).sum() < choices
        low, high = (middle, high) if few else (low, middle)
    return 1 - np.exp(-rates * low)


def bias_for(chances: np.ndarray) -> np.ndarray:
    """Correction biases with which experts are chosen with these chances.

    A router's logits are standard normal here. An expert is chosen where its score plus its bias is
    above a bar: where its score is above the quantile of its chance.
    """
    normal = statistics.NormalDist()
    quantile = np.array([normal.inv_cdf(1 - float(p)) for p in np.clip(chances, 1e-9, 1 - 1e-9)])
    return (-1 / (1 + np.exp(-quantile))).astype(np.float32)


def expected(experts: int, choices: int, tokens: int, exponent: float) -> float:
    """Distinct experts that so many independent tokens choose, on average."""
    if exponent == 0:
        return distinct_experts(experts, choices, tokens)
    return float((1 - (1 - shares(experts, choices, exponent)) ** tokens).sum())


def set_bias(plan: Plan, params: tuple[Any, Any], exponent: float, seed: int) -> tuple[Any, Any]:
    """The parameters with routers that choose by that law; 0 is uniform.

    Which expert is the likeliest differs from layer to layer.
    """
    config, rng = plan.config, np.random.default_rng(seed)
    chances = shares(config.n_routed_experts, config.num_experts_per_tok, exponent)
    bias, leaves = bias_for(chances), []
    for path, leaf in nnx.to_flat_state(params[0]):
        if path[-2:] == ("router", "bias"):
            values = rng.permutation(bias) if exponent else np.zeros_like(bias)
            leaf = leaf.replace(jax.device_put(values, leaf[...].sharding))
        leaves.append((path, leaf))
    return nnx.from_flat_state(leaves), params[1]


def _recorded(route: Callable, found: list) -> Callable:
    """Stands for a layer's `route`, and remembers the experts that it chose."""

    def run(*arguments):
        routed = route(*arguments)
        found.append(routed[1])
        return routed

    return run


def make_probe(plan: Plan, settings: Settings):
    """A jitted `probe(params, state, request)`: what the next round will draft and choose.

    It runs the drafter and the target as the round does, and leaves the state alone.

    Returns:
      ids: int32 [sparse layers, b t, c], chosen by each row.
      tokens: int32 [b, t], the block.
      size: float32 scalar, root mean square of the residual stream after all layers.
    """
    specs = state_specs(jax.eval_shape(state_maker(plan, settings)), plan.rules)

    def body(params, state, request):
        model, drafter = plan.modules(params)
        found: list[Any] = []
        for layer in model.layers:
            if layer.sparse:
                layer.ffn.route = _recorded(layer.ffn.route, found)
        block, parallel = settings.block, plan.parallel
        tokens, _ = draft_block(model, drafter, state, request, block, parallel)
        live = jnp.ones(tokens.shape, bool)
        h, *_ = model(tokens, state.cached, live, state.caches, plan.taps, parallel)
        size = jnp.sqrt(jnp.mean(jnp.square(h.astype(jnp.float32))))
        return jnp.stack(found), tokens, size

    everywhere = PartitionSpec()
    sharded = jax.shard_map(
        body,
        mesh=plan.mesh,
        in_specs=(plan.param_specs, specs, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    return jax.jit(sharded)


def count(ids: np.ndarray) -> np.ndarray:
    """Distinct experts of each layer, from ids [layers, rows, choices]."""
    return np.array([len(np.unique(layer)) for layer in ids])
