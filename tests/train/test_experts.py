"""The grouped mixture of experts against a plain sum over all experts, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimo_jax.model.moe import MoE
from mimo_jax.train.experts import capacity, grouped_moe
from tests.helpers import tiny_model
from tests.tolerances import relative_norm


def build(rng):
    """A random mixture of experts, and inputs [b, t, d] for it."""
    config = tiny_model(rng, 1)
    moe = MoE(config, packed=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, params = nnx.split(moe)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), params)
    x = jnp.asarray(rng.standard_normal((3, 17, config.hidden_size)), jnp.float32)
    return graph, params, x


def plain(graph, params, x):
    """Every expert on every token, weighted by routing: no sorting, no places."""
    moe = nnx.merge(graph, params)
    rows = x.reshape(-1, x.shape[-1])
    ids, routing = moe.router(rows)
    weights = moe.experts.weights
    total = jnp.zeros_like(rows)
    for expert in range(weights.gate_up.shape[0]):
        gate, up = weights.gate_up[expert]
        output = (jax.nn.silu(rows @ gate.T) * (rows @ up.T)) @ weights.down[expert].T
        total += jnp.where(ids == expert, routing, 0.0).sum(axis=1)[:, None] * output
    return total.reshape(x.shape)


def grouped(graph, params, x):
    return grouped_moe(nnx.merge(graph, params), x, factor=float("inf"))[0]


def test_forward_and_gradients(rng):
    graph, params, x = build(rng)
    aim = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    assert relative_norm(grouped(graph, params, x), plain(graph, params, x)) < 1e-5

    def gradients(function):
        return jax.grad(lambda p, x: (function(graph, p, x) * aim).sum(), (0, 1))(params, x)

    ours, theirs = (jax.tree.leaves(gradients(f)) for f in (grouped, plain))
    norms = [np.linalg.norm(leaf) for leaf in theirs]
    assert min(norms[:-1]) >= 0 and sum(norm > 0 for norm in norms) >= 4
    for mine, reference in zip(ours, theirs, strict=True):
        if np.linalg.norm(reference):
            assert relative_norm(mine, reference) < 1e-4
        else:
            assert not np.any(mine)  # the router's bias, which no gradient reaches


def test_full_experts_drop_the_last_choices(rng):
    graph, params, x = build(rng)
    moe = nnx.merge(graph, params)
    rows = np.asarray(x.reshape(-1, x.shape[-1]))
    ids, routing = (np.asarray(y) for y in moe.router(jnp.asarray(rows)))
    experts = moe.experts.weights.gate_up.shape[0]
    places = capacity(len(rows), experts, ids.shape[1], 0.5)
    assert 0 < places < len(rows)
    taken, kept = np.zeros(experts, int), np.zeros(ids.shape, bool)
    for token in range(len(rows)):
        for choice, expert in enumerate(ids[token]):
            kept[token, choice] = taken[expert] < places
            taken[expert] += 1
    assert not kept.all()
    weights, expected = moe.experts.weights, np.zeros(rows.shape)
    for token, choice in zip(*np.nonzero(kept), strict=True):
        expert = ids[token, choice]
        gate, up = np.asarray(weights.gate_up[expert], np.float64) @ rows[token]
        hidden = gate / (1 + np.exp(-gate)) * up
        down = np.asarray(weights.down[expert], np.float64)
        expected[token] += routing[token, choice] * (down @ hidden)
    out, load = grouped_moe(moe, x, 0.5)
    assert relative_norm(out, expected.reshape(x.shape)) < 1e-5
    assert float(load.dropped) == pytest.approx(1 - kept.mean())
    assert np.array_equal(load.chosen, taken)
