"""The drafter in training against the drafter in decoding, and the loss against plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoint import write_tokenizer

from mimo_jax.cache import init_cache
from mimo_jax.model.dflash import Drafter
from mimo_jax.model.mimo import MiMo
from mimo_jax.sharding import Parallel
from mimo_jax.train import drafter as drafter_training
from mimo_jax.train.config import from_dict
from mimo_jax.train.drafter import (
    DraftRecipe,
    compare,
    draft_hidden,
    draft_loss,
    draw_anchors,
    place_anchors,
    slot_weights,
    summarise,
)
from mimo_jax.train.pretrain import run_sequences
from mimo_jax.train.start import drafter_shapes
from tests.helpers import randomise, tiny_drafter, tiny_model
from tests.tolerances import relative_norm

BLOCK, LENGTH, BATCH = 4, 29, 3
PLAIN = DraftRecipe(dtype=jnp.dtype(jnp.float32), gamma=2.0)


def random_module(build, rng, common):
    """The module with random parameters that matter everywhere; see `randomise` for `common`."""
    graph, params = nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: device, params)
    return nnx.merge(graph, randomise(params, rng, where, common))


def build(rng, **changes):
    target_config = tiny_model(rng, 1)
    config = tiny_drafter(rng, target_config, BLOCK, 1, **changes)
    common = rng.standard_normal(target_config.hidden_size)
    target, drafter = (
        random_module(functools.partial(module, shapes, dtype=jnp.float32), rng, common)
        for module, shapes in ((MiMo, target_config), (Drafter, config))
    )
    tokens = rng.integers(0, target_config.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    return target, drafter, config, jnp.asarray(tokens)


def jitted_hidden(drafter, target):
    """draft_hidden(features, tokens, anchors), compiled as a whole: that is faster by far."""
    embedding = target.embedding[...]
    return jax.jit(lambda f, t, a: draft_hidden(drafter, embedding, f, t, a, BLOCK))


def drawn(rng, trained, *arguments, **keywords):
    return jax.jit(lambda key, x: draw_anchors(key, x, *arguments, **keywords))(
        key_of(rng), jnp.asarray(trained)
    )


def key_of(rng):
    return jax.random.key(int(rng.integers(1 << 30)))


KINDS = {
    "windows": {},
    "causal": {"causal_layers": (0,)},
    "mixed": {
        "num_hidden_layers": 3,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
        "causal_layers": (1,),
    },
    "full": {"sliding_window": None, "add_swa_attention_sink_bias": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_decoding(kind, rng, monkeypatch):
    monkeypatch.setattr(drafter_training, "_ANCHORS_AT_ONCE", 2)
    target, drafter, config, tokens = build(rng, **KINDS[kind])
    embedding = target.embedding[...]
    size = len(config.target_layer_ids) * config.hidden_size
    features = jnp.asarray(rng.standard_normal((BATCH, LENGTH, size)), jnp.float32)
    anchors = jnp.asarray(rng.integers(1, LENGTH - BLOCK, (BATCH, 5)), jnp.int32)
    trained = jitted_hidden(drafter, target)(features, tokens, anchors)

    @jax.jit
    def decode(start):
        live = jnp.arange(LENGTH) < start[:, None]
        caches = tuple(
            init_cache(attention, config.num_key_value_heads, BATCH, LENGTH, BLOCK, jnp.float32)
            for attention in map(config.attention_of, range(config.num_hidden_layers))
        )
        zero = jnp.zeros(BATCH, jnp.int32)
        caches = drafter.ingest(features, zero, live, caches, Parallel())
        first = embedding[jnp.take_along_axis(tokens, start[:, None], axis=1)[:, 0]]
        places = tuple(cache.positions(start) for cache in caches)
        return drafter(drafter.block(first, BLOCK), start, caches, places)

    for column in range(anchors.shape[1]):
        decoded = decode(anchors[:, column])
        assert relative_norm(trained[:, column], decoded) < 1e-5


@pytest.mark.parametrize("kind", ["windows", "full"])
def test_an_anchor_sees_nothing_from_itself_on_but_its_token_and_masks(kind, rng):
    """Features and tokens that it may not see are changed: not a bit of its block moves."""
    target, drafter, config, tokens = build(rng, **KINDS[kind])
    size = len(config.target_layer_ids) * config.hidden_size
    features = rng.standard_normal((BATCH, LENGTH, size)).astype(np.float32)
    anchors = jnp.asarray(rng.integers(2, LENGTH - BLOCK, (BATCH, 1)), jnp.int32)
    hidden_of = jitted_hidden(drafter, target)

    def run(features, tokens):
        return hidden_of(features, tokens, anchors)

    before = np.asarray(run(jnp.asarray(features), tokens))
    place, column = np.arange(LENGTH), np.asarray(anchors)
    hidden = place >= column
    window = config.sliding_window or LENGTH
    far = place <= column - window
    changed = np.where((hidden | far)[..., None], 7 * features + 1, features)
    others = np.where(place == column, tokens, (np.asarray(tokens) + 1) % config.vocab_size)
    after = run(jnp.asarray(changed), jnp.asarray(others.astype(np.int32)))
    assert np.array_equal(before, after)
    for seen in (column - 1, np.maximum(column - window + 1, 0)):
        touched = np.where((place == seen)[..., None], features + 1, features)
        assert not np.array_equal(before, run(jnp.asarray(touched), tokens))
    nexts = np.where(place == column, (np.asarray(tokens) + 1) % config.vocab_size, tokens)
    assert not np.array_equal(before, run(jnp.asarray(features), jnp.asarray(nexts)))


def test_kinds_of_layers_make_no_block_causal(rng, tmp_path):
    """As they do in a release's file, whose sliding layers are causal if it does not say."""
    kinds = ["sliding_attention", "full_attention"]
    config = from_dict({"drafter": {"shape": {"layer_types": kinds, "mask_token_id": 3}}})
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    shapes = drafter_shapes(config, tiny_model(rng, 1), tokenizer)
    assert shapes.causal_layers == () and shapes.reach is None
    assert [shapes.attention_of(i).window is None for i in range(2)] == [False, True]


def test_anchors_are_drawn_evenly_from_the_places_allowed(rng):
    """Every place allowed is drawn, and no other; a row without one says so."""
    trained = np.zeros((3, 31), bool)
    trained[0], trained[1, [0, 4, 9, 10, 30]] = True, True
    places, any_ = drawn(rng, trained, 4000, BLOCK)
    assert any_[:, 0].tolist() == [True, True, False]
    places = np.asarray(places)
    # A place's count is binomial: 4000 draws of 27 places leave none out but by odds of e^-148.
    assert sorted(set(places[0].tolist())) == list(range(1, 31 - BLOCK + 1))
    assert np.bincount(places[0])[1:].max() < 3 * 4000 / 27
    assert sorted(set(places[1].tolist())) == [3, 8, 9]
    late, _ = drawn(rng, trained, 50, BLOCK, start=20)
    assert late[0].min() >= 20 and late[0].max() <= 31 - BLOCK


def test_far_anchors_lie_beyond_four_windows(rng):
    recipe = dataclasses.replace(PLAIN, anchors=256, far=0.25)
    trained = jnp.ones((2, 64), bool)
    place = jax.jit(lambda key, w: place_anchors(key, trained, recipe, BLOCK, w), static_argnums=1)
    places, counted = place(key_of(rng), 9)
    assert places.shape == counted.shape == (2, 16) and counted.all()
    assert (places[:, 12:] >= 36).all() and places[:, :12].min() < 36
    recipe = dataclasses.replace(recipe, far=1.0)
    for window in (16, None):  # No row reaches beyond: all are drawn from everywhere.
        near, _ = place_anchors(key_of(rng), trained, recipe, BLOCK, window)
        assert near.shape == (2, 16) and near.min() < 36


def plain_weights(recipe, losses):
    """The weights of one block by loops."""
    if recipe.weighting == "flat":
        return np.ones(len(losses))
    if recipe.weighting == "decay":
        return np.exp(-np.arange(len(losses)) / recipe.gamma)
    sure = (1 - recipe.alpha) * np.exp(-losses) + recipe.alpha
    return np.array(
        [sum(np.prod(sure[: m + 1]) for m in range(j, len(sure))) for j in range(len(sure))]
    )


@pytest.mark.parametrize("weighting", ["decay", "flat", "dpace"])
def test_weights_of_slots(weighting, rng):
    recipe = dataclasses.replace(PLAIN, weighting=weighting, alpha=0.3, gamma=1.7)
    losses = rng.gamma(1.0, 2.0, (5, 7))
    expected = [plain_weights(recipe, row) for row in losses]
    assert relative_norm(slot_weights(recipe, jnp.asarray(losses, jnp.float32)), expected) < 1e-5
    flow = jax.grad(lambda x: slot_weights(recipe, x).sum())(jnp.ones((2, 3)))
    assert not np.any(flow)


def closest_call(*logits) -> float:
    """The smallest lead of a largest logit: within rounding, float32 may choose another."""
    ranked = (np.sort(each, axis=-1) for each in logits)
    return min((each[..., -1] - each[..., -2]).min() for each in ranked)


def plain_losses(recipe, row, other):
    """Cross-entropy against the target's top, and the loss, of one draft in float64."""
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (other, row))
    ce = -np.log(q[other.argmax()])
    mixed = {
        "ce": ce,
        "tv": recipe.ce_share * ce + (1 - recipe.ce_share) * 0.5 * np.abs(p - q).sum(),
        "kl": recipe.ce_share * ce + (1 - recipe.ce_share) * (p * np.log(p / q)).sum(),
    }
    return ce, mixed[recipe.loss]


@pytest.mark.parametrize("loss", ["ce", "tv", "kl"])
def test_losses_against_numpy_and_finite_differences(loss, rng):
    recipe = dataclasses.replace(PLAIN, loss=loss, ce_share=0.3, chunk=3)
    lead = 0.0
    while lead < 1e-4:
        shapes = ((2, 7, 5), (2, 7, 5), (11, 5))
        drawn = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        lead = closest_call(
            *(x.astype(np.float64) @ drawn[2].astype(np.float64).T for x in drawn[:2])
        )
    hidden, before, head = map(jnp.asarray, drawn)

    def value(x):
        found = compare(x, before, head, recipe)
        return found["loss"].sum(), found

    (_, found), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(hidden)
    rows, others = (
        np.asarray(x, np.float64) @ np.asarray(head, np.float64).T for x in (hidden, before)
    )
    for place in np.ndindex(2, 7):
        ce, value = plain_losses(recipe, rows[place], others[place])
        assert abs(float(found["ce"][place]) - ce) < 1e-4
        assert abs(float(found["loss"][place]) - value) < 1e-4
        assert int(found["chosen"][place]) == others[place].argmax()
        assert bool(found["right"][place]) == (rows[place].argmax() == others[place].argmax())
    way = rng.standard_normal(hidden.shape)
    slope = [
        sum(
            plain_losses(recipe, row, other)[1]
            for row, other in zip(
                (
                    (np.asarray(hidden, np.float64) + e * way) @ np.asarray(head, np.float64).T
                ).reshape(-1, 11),
                others.reshape(-1, 11),
                strict=True,
            )
        )
        for e in (1e-6, -1e-6)
    ]
    difference = (slope[0] - slope[1]) / 2e-6
    assert abs((np.asarray(gradient) * way).sum() - difference) < 1e-3 * (1 + abs(difference))


def compute_all(target, drafter, config, recipe):
    """The loss's sums and measures, the target's and the drafter's normed rows: (batch, places)."""

    @jax.jit
    def compute(batch, places):
        # The loss's own capacity: few enough tokens may find an expert full (test_experts.py).
        h, outputs, _ = run_sequences(target, batch["tokens"], factor=recipe.capacity)
        features = jnp.concatenate([outputs[layer] for layer in config.target_layer_ids], axis=-1)
        hidden = draft_hidden(
            drafter, target.embedding[...], features, batch["tokens"], places[0], BLOCK
        )
        sums = draft_loss(drafter, target, batch, places, config, recipe)
        return *sums, target.norm(h), hidden

    return compute


@pytest.mark.parametrize("weighting", [pytest.param("decay", marks=pytest.mark.slow), "dpace"])
def test_loss_and_run_against_loops(weighting, rng):
    recipe = dataclasses.replace(PLAIN, weighting=weighting)
    lead = 0.0
    while lead < 1e-4:
        target, drafter, config, tokens = build(rng)
        trained = rng.random((BATCH, LENGTH)) < 0.8
        anchors, _ = drawn(rng, trained, 6, BLOCK)
        assert int(anchors.min()) >= 1 and int(anchors.max()) + BLOCK <= LENGTH
        counted = rng.random(anchors.shape) < 0.9
        batch = {"tokens": tokens, "trained": jnp.asarray(trained)}
        places = anchors, jnp.asarray(counted)
        sums, measured, normed, hidden = compute_all(target, drafter, config, recipe)(batch, places)
        head = np.asarray(target.head[...], np.float64)
        targets, logits = (np.asarray(x, np.float64) @ head.T for x in (normed, hidden))
        lead = closest_call(targets, logits)
    choices = np.argmax(targets, axis=-1)
    total = norm = runs = 0.0
    for b, a in zip(*np.nonzero(counted), strict=True):
        anchor, unbroken = int(anchors[b, a]), True
        labels = choices[b, anchor : anchor + BLOCK - 1]
        rows = logits[b, a, 1:]
        top = rows.max(-1)
        losses = (
            top + np.log(np.exp(rows - top[:, None]).sum(-1)) - rows[np.arange(BLOCK - 1), labels]
        )
        weights = plain_weights(recipe, losses) * trained[b, anchor + 1 : anchor + BLOCK]
        for slot in range(BLOCK - 1):
            total, norm = total + weights[slot] * losses[slot], norm + weights[slot]
            unbroken = unbroken and rows[slot].argmax() == labels[slot]
            runs += unbroken
            if tokens[b, anchor + slot + 1] != labels[slot]:
                break
    assert abs(float(sums["weight"]) - norm) < 1e-4 * (1 + norm)
    assert abs(float(sums["loss"]) - total) < 1e-4 * (1 + abs(total))
    assert float(measured["anchors"]) == counted.sum()
    acceptance = summarise(measured)["acceptance"]
    assert abs(float(acceptance) - 1 - runs / max(counted.sum(), 1)) < 1e-5
