"""A row's bits depend on nothing but the tokens before it; and all devices hold equal bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Decoder, tiny_drafter, tiny_model
from jax.sharding import PartitionSpec

from mimo_jax.decode.state import state_specs
from mimo_jax.sharding import AXIS, Parallel, shardings

BLOCK, BATCH, LENGTH = 8, 2, 22
MESHES = {1: 160, 4: 40}
"""Draws on each number of devices: 200 in all."""


def forward(decoder: Decoder):
    """step(params, caches, tokens, start, live) -> every device's layers, logits; the caches.

    The first two are [devices, b, t, _]: device by device, nothing is taken for equal.
    """
    plan = decoder.plan
    graph, layers = plan.graphs[0], range(plan.config.num_hidden_layers)
    caches = state_specs(jax.eval_shape(decoder.empty), plan.rules).caches

    def step(params, caches, tokens, start, live):
        parallel = Parallel(AXIS, experts=plan.layout == "expert")
        model = nnx.merge(graph, params)
        h, features, caches = model(tokens, start, live, caches, tuple(layers), parallel)
        logits = parallel.gather(model.logits(h), -1)
        return features[None], logits[None], caches

    each, everywhere = PartitionSpec(AXIS), PartitionSpec()
    outputs = (each, each, caches)
    return jax.jit(
        jax.shard_map(
            step,
            mesh=plan.mesh,
            in_specs=(plan.param_specs[0], caches, everywhere, everywhere, everywhere),
            out_specs=outputs,
            check_vma=False,
        ),
        out_shardings=shardings(outputs, plan.mesh),
    )


def run(step, decoder, rng, sequences, widths):
    """Runs both sequences in blocks of at most `widths` live rows, noise in all other rows.

    Returns the outputs [devices, b, LENGTH, features + logits] of the rows that were kept.
    """
    caches, start = decoder.empty().caches, np.zeros(BATCH, np.int32)
    rows = [[] for _ in range(BATCH)]
    while start.min() < LENGTH:
        most = np.minimum(rng.integers(1, widths + 1, BATCH), LENGTH - start)
        tokens = rng.integers(0, decoder.plan.config.vocab_size, (BATCH, BLOCK)).astype(np.int32)
        for b in range(BATCH):
            tokens[b, : most[b]] = sequences[b, start[b] : start[b] + most[b]]
        # Rows after the kept ones are rejected drafts, or dead.
        live = np.arange(BLOCK) < rng.integers(most, widths + 1)[:, None]
        features, logits, caches = step(decoder.params[0], caches, tokens, start, live)
        both = np.concatenate([features, logits], axis=-1)
        for b in range(BATCH):
            rows[b].append(both[:, b, : most[b]])
        start = start + most.astype(np.int32)
    return np.stack([np.concatenate(parts, axis=1) for parts in rows], axis=1)


@pytest.mark.parametrize("shards", MESHES)
def test_bits_do_not_depend_on_slot_or_neighbours(shards, rng):
    shapes = np.random.default_rng(shards)
    target = tiny_model(shapes, shards)
    decoder = Decoder(rng, target, None, shards=shards, batch=BATCH, max_len=40, block=BLOCK)
    step = forward(decoder)
    for draw in range(MESHES[shards]):
        if draw % 10 == 0:
            decoder.reset(rng)
        sequences = rng.integers(0, target.vocab_size, (BATCH, LENGTH))
        alone = run(step, decoder, rng, sequences, 1)
        moved = run(step, decoder, rng, sequences, BLOCK)
        assert np.isfinite(alone).all() and alone.std() > 0.1
        np.testing.assert_array_equal(alone, moved)
        # Beside another sequence, and in its place in the batch.
        other = rng.integers(0, target.vocab_size, LENGTH)
        swapped = run(step, decoder, rng, np.stack([other, sequences[0]]), BLOCK)
        np.testing.assert_array_equal(alone[:, 0], swapped[:, 1])
    assert step._cache_size() == 1


@pytest.mark.parametrize("layout", ["tensor", "expert"])
def test_ranks_agree_after_every_layer(layout, rng):
    shapes = np.random.default_rng(8)
    target = tiny_model(shapes, 8)
    decoder = Decoder(
        rng, target, None, shards=8, layout=layout, batch=BATCH, max_len=40, block=BLOCK
    )
    step = forward(decoder)
    for _ in range(5):
        decoder.reset(rng)
        sequences = rng.integers(0, target.vocab_size, (BATCH, LENGTH))
        out = run(step, decoder, rng, sequences, BLOCK)
        assert out.shape[0] == 8 and out.std() > 0.1
        for device in range(1, 8):
            np.testing.assert_array_equal(out[0], out[device])


def test_ranks_agree_on_what_was_decoded(rng):
    shapes = np.random.default_rng(88)
    target = tiny_model(shapes, 8)
    drafter = tiny_drafter(shapes, target, 4, 8)
    decoder = Decoder(rng, target, drafter, shards=8, batch=3, max_len=40, block=4)
    for temperature in (0.0, 1.0):
        prompts = [rng.integers(0, target.vocab_size, n) for n in rng.integers(1, 20, 3)]
        state = decoder(prompts, max_draft=3, temperature=temperature)
        for name in ("tokens", "length", "cached", "done", "round_of", "histogram"):
            copies = [np.asarray(s.data) for s in getattr(state, name).addressable_shards]
            assert len(copies) == 8
            assert all((copy == copies[0]).all() for copy in copies)
        assert jnp.all(state.length == 40)
