"""The MTP layers' logits at every row against the numpy oracle, its mistakes planted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import to_tree
from oracles.mtp_numpy import MISTAKES, mtp_logits
from oracles.random_weights import fresh_example, random_mtp
from tolerances import assert_close, relative_norm

from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import MTPConfig
from mimo_jax.model.mimo import head_logits
from mimo_jax.sharding import Parallel

LAYERS = 3


def our_logits(config, target, mtp, residual, tokens, chunks):
    """Layer k's logits at every row whose token exists: a list of [t - k - 1, w].

    One sequence for each row t. The rows before it come from `ingest_prompt`, in chunks, and from
    a round's `extend`; `finish` runs row t. Sequence t's tokens are the text's, drafts too.
    """
    rows = len(tokens)
    starts = np.arange(1, rows)  # Anchors; row t is the one before.
    graph, params = nnx.split((target, mtp))
    contexts = mtp.init_contexts(
        MTPConfig(ModelConfig.from_dict(config), LAYERS),
        batch=len(starts),
        max_len=rows,
        block=mtp.block_size,
        shards=1,
        dtype=jnp.float32,
    )
    ids = jnp.asarray(np.tile(np.append(tokens, [0] * mtp.block_size), (len(starts), 1)), jnp.int32)

    @jax.jit
    def ingest(params, features, at, live, contexts):
        target, mtp = nnx.merge(graph, params)
        return mtp.ingest_prompt(target, ids, features, at, live, contexts, Parallel())

    @jax.jit
    def last(params, start, contexts):
        target, mtp = nnx.merge(graph, params)
        out = []
        hidden = mtp._recent(target, start, contexts)
        for k, layer in enumerate(mtp.layers):
            width = mtp.block_size + k
            embedded = mtp._embedded(target, ids, start, width, Parallel())
            keep = start[:, None] - width + jnp.arange(width) >= 0
            u, q, cache = layer.extend(
                embedded, hidden[:, -width:], start - width, keep, contexts.layers[k], Parallel()
            )
            row = layer.finish(u[:, -1:], q[:, -1:], start - 1, cache, Parallel())
            out.append(head_logits(row, target.head[...])[:, 0])
        return out

    at = np.zeros(len(starts), np.int32)
    while (at < starts).any():
        width = chunks()
        places = at[:, None] + np.arange(width)
        live = places < starts[:, None]
        features = np.where(live[..., None], residual[np.minimum(places, rows - 1)], np.nan)
        contexts = ingest(params, jnp.asarray(features, jnp.float32), at, live, contexts)
        at = at + live.sum(axis=1).astype(np.int32)
    logits = last(params, jnp.asarray(starts, jnp.int32), contexts)
    # A row's token must exist: those of the last rows would be drafts.
    return [np.asarray(a)[: rows - k - 1] for k, a in enumerate(logits)]


@pytest.fixture(scope="module")
def example():
    """A target, its MTP layers' weights, and everything that a comparison needs."""
    rng = np.random.default_rng()
    config, weights, tokens, _, residuals = fresh_example(rng)
    seeded = np.random.RandomState(rng.integers(2**32))
    return config, weights, random_mtp(config, LAYERS, seeded), tokens, residuals[-1]


NORMED = pytest.param(True, id="after the norm", marks=pytest.mark.slow)


@pytest.mark.parametrize("normed", [pytest.param(False, id="before the norm"), NORMED])
def test_every_row_equals_the_oracle_and_mistakes_are_caught(example, normed, rng):
    config, weights, layers, tokens, residual = example
    target = to_tree.target(config, weights)
    mtp = to_tree.mtp(config, layers, layers=LAYERS, hidden_normed=normed)
    widths = [5, config["sliding_window"] + 4]
    got = our_logits(config, target, mtp, residual, tokens, lambda: int(rng.choice(widths)))

    def oracle(mistake=None):
        return mtp_logits(layers, config, weights, residual, tokens, normed, mistake)

    for mine, wanted in zip(got, oracle(), strict=True):
        assert_close(mine, wanted, "float32")
    for mistake in MISTAKES:
        distances = [relative_norm(a, b) for a, b in zip(got, oracle(mistake), strict=True)]
        # What is between the layers cannot show in the first.
        between = mistake in ("layers chained", "one cache for all layers")
        assert min(distances[between:]) > 1e-3, (mistake, distances)
