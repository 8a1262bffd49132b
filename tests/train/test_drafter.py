"""The drafter in training against the drafter in decoding, and the loss against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.cache import init_cache
from mimo_jax.model.dflash import Drafter
from mimo_jax.model.mimo import MiMo
from mimo_jax.sharding import Parallel
from mimo_jax.train.drafter import draft_hidden, draft_loss, draw_anchors, slot_weights
from mimo_jax.train.pretrain import run_sequences
from tests.helpers import randomise, tiny_drafter, tiny_model
from tests.tolerances import relative_norm

BLOCK, LENGTH, BATCH = 4, 29, 3


def random_module(build, rng, common):
    """The module with random parameters that matter everywhere; see `randomise` for `common`."""
    graph, params = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: device, params)
    return nnx.merge(graph, randomise(params, rng, where, common))


def build(rng):
    target_config = tiny_model(rng, 1)
    config = tiny_drafter(rng, target_config, BLOCK, 1)
    common = rng.standard_normal(target_config.hidden_size)
    target, drafter = (
        random_module(functools.partial(module, shapes, dtype=jnp.float32), rng, common)
        for module, shapes in ((MiMo, target_config), (Drafter, config))
    )
    tokens = rng.integers(0, target_config.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    return target, drafter, config, jnp.asarray(tokens)


def test_blocks_are_those_of_decoding(rng):
    target, drafter, config, tokens = build(rng)
    embedding = target.embedding[...]
    size = len(config.target_layer_ids) * config.hidden_size
    features = jnp.asarray(rng.standard_normal((BATCH, LENGTH, size)), jnp.float32)
    anchors = jnp.asarray(rng.integers(1, LENGTH - BLOCK, (BATCH, 5)), jnp.int32)
    trained = draft_hidden(drafter, embedding, features, tokens, anchors, BLOCK)
    for column in range(anchors.shape[1]):
        start = anchors[:, column]
        live = jnp.arange(LENGTH) < start[:, None]
        caches = tuple(
            init_cache(
                config.attention, config.num_key_value_heads, BATCH, LENGTH, BLOCK, jnp.float32
            )
            for _ in range(config.num_hidden_layers)
        )
        zero = jnp.zeros(BATCH, jnp.int32)
        caches = drafter.ingest(features, zero, live, caches, Parallel())
        first = embedding[jnp.take_along_axis(tokens, start[:, None], axis=1)[:, 0]]
        decoded = drafter(drafter.block(first, BLOCK), start, caches, caches[0].positions(start))
        assert relative_norm(trained[:, column], decoded) < 1e-5


def logits_of(target, drafter, config, tokens, anchors):
    """Logits in float64 of the target [b, t, w] and of the drafts [b, a, slots, w]."""
    # The loss's own capacity: few enough tokens may find an expert full (test_experts.py has that).
    h, outputs, _ = run_sequences(target, tokens, factor=3.0)
    features = jnp.concatenate([outputs[layer] for layer in config.target_layer_ids], axis=-1)
    hidden = draft_hidden(drafter, target.embedding[...], features, tokens, anchors, BLOCK)
    head = np.asarray(target.head[...], np.float64)
    return np.asarray(target.norm(h), np.float64) @ head.T, np.asarray(hidden, np.float64) @ head.T


def closest_call(*logits) -> float:
    """The smallest lead of a largest logit; within rounding, float32 may choose another one."""
    ranked = (np.sort(each, axis=-1) for each in logits)
    return min((each[..., -1] - each[..., -2]).min() for each in ranked)


def test_loss_and_run_against_loops(rng):
    lead = 0.0
    while lead < 1e-4:
        target, drafter, config, tokens = build(rng)
        anchors = draw_anchors(jax.random.key(int(rng.integers(1 << 30))), BATCH, LENGTH, 6, BLOCK)
        targets, logits = logits_of(target, drafter, config, tokens, anchors)
        lead = closest_call(targets, logits)
    assert int(anchors.min()) >= 1 and int(anchors.max()) + BLOCK <= LENGTH
    loss, metrics = draft_loss(drafter, target, tokens, anchors, config, decay=2.0)

    choices = np.argmax(targets, axis=-1)
    weights = np.asarray(slot_weights(BLOCK, 2.0), np.float64)
    total = norm = runs = 0.0
    for b in range(BATCH):
        for a, anchor in enumerate(np.asarray(anchors)[b]):
            unbroken = True
            for slot in range(1, BLOCK):
                row, label = logits[b, a, slot], choices[b, anchor + slot - 1]
                top = row.max()
                total += weights[slot - 1] * (top + np.log(np.exp(row - top).sum()) - row[label])
                norm += weights[slot - 1]
                unbroken = unbroken and row.argmax() == label
                runs += unbroken
                if tokens[b, anchor + slot] != label:
                    break
    assert abs(float(loss) - total / norm) < 1e-4 * abs(total / norm)
    assert abs(float(metrics["run"]) - runs / anchors.size) < 1e-6
