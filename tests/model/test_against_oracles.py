"""Target and drafter against transformers' stored outputs and the numpy oracle, mistakes planted.

The target runs as in decoding: blocks of rows against its caches, of which a random number is kept
and the rest overwritten, so that rings wrap and roll back many times a sequence.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_transformers_golden import FOLDER, SEEDS, load
from oracles import to_tree
from oracles.mimo_numpy import MISTAKES, drafter_forward, features, target_forward
from oracles.random_weights import example, fresh_example, random_drafter, random_drafter_config
from tolerances import assert_close, relative_norm

from mimo_jax.cache import init_cache
from mimo_jax.model.mimo import head_logits
from mimo_jax.sharding import Parallel

BLOCK = 5
TARGET_MISTAKES = [m for m in MISTAKES if m != "feature of the wrong layer"]
DRAFTER_MISTAKES = [m for m in MISTAKES if m != "biased routing weights"]
VISIBLE = 5e-3
"""How much a mistake must change an example's outputs, by the oracle, for our model to show it."""


def caches_of(attentions, batch, max_len):
    return tuple(
        init_cache(attention, attention.num_kv_heads, batch, max_len, BLOCK, jnp.float32)
        for attention in attentions
    )


def run_blocks(model, tokens, rng, width=BLOCK, keep_all=False):
    """Logits [b, t, w] and outputs [b, layers, t, d] of two runs (b) over the same tokens."""
    length, layers = len(tokens), len(model.layers)
    graph, state = nnx.split(model)
    attentions = [layer.attention.config for layer in model.layers]

    @jax.jit
    def step(state, block, start, caches):
        model = nnx.merge(graph, state)
        live = jnp.ones(block.shape, bool)
        h, tapped, caches = model(block, start, live, caches, tuple(range(layers)))
        return model.logits(h), tapped.reshape(*h.shape[:2], layers, -1), caches

    caches = caches_of(attentions, 2, length + width)
    start = np.zeros(2, np.int32)
    logits = np.full((2, length, model.head.shape[0]), np.nan)
    outputs = np.full((2, layers, length, model.head.shape[1]), np.nan)
    while start.min() < length:
        block = rng.integers(0, model.embedding.shape[0], (2, width))  # what will be rejected
        keep = np.full(2, width) if keep_all else rng.integers(1, width + 1, 2)
        keep = np.minimum(keep, length - start)
        for row in range(2):
            block[row, : keep[row]] = tokens[start[row] :][: keep[row]]
        out, tapped, caches = step(state, jnp.asarray(block, jnp.int32), jnp.asarray(start), caches)
        for row in range(2):
            rows = slice(start[row], start[row] + keep[row])
            logits[row, rows] = out[row, : keep[row]]
            outputs[row, :, rows] = np.asarray(tapped[row, : keep[row]]).swapaxes(0, 1)
        start = (start + keep).astype(np.int32)
    return logits, outputs


@pytest.mark.parametrize("seed", SEEDS)
def test_target_equals_transformers(seed, rng):
    config, weights, tokens, rows, logits, residuals = load(FOLDER / f"seed{seed:02d}.npz")
    got, outputs = run_blocks(to_tree.target(config, weights, extra=1), tokens, rng)
    for run in range(2):
        assert_close(got[run, rows], logits, "float32")
        assert_close(outputs[run][:, rows], residuals, "float32")


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")  # of torch and transformers, about themselves
@pytest.mark.parametrize("repeat", range(10))
def test_target_equals_transformers_live(repeat, rng):
    from oracles import transformers_run

    config, weights, tokens, _, _ = fresh_example(rng, extra=1)
    logits, residuals = transformers_run.run(weights, config, tokens)
    got, outputs = run_blocks(to_tree.target(config, weights, extra=1), tokens, rng)
    assert_close(got[0], logits, "float32")
    assert_close(outputs[0], residuals, "float32")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
def test_every_row_and_layer_equals_the_oracle(packed, rng):
    change = to_tree.round_experts if packed else None
    config, weights, tokens, logits, residuals = fresh_example(rng, change=change)
    model = to_tree.target(config, weights, packed=packed)
    got, outputs = run_blocks(model, tokens, rng)
    for run in range(2):
        assert_close(got[run], logits, "float32")
        for layer in range(len(residuals)):
            assert_close(outputs[run, layer], residuals[layer], "float32")


def test_ties_go_to_the_lowest_expert(rng):
    # Routers of zeros: scores are 1/2 for all experts, and biases of two values tie exactly.
    config, weights, tokens = example(int(rng.integers(2**32)))
    for name in [n for n in weights if ".mlp.gate." in n]:
        weights[name] = np.zeros_like(weights[name])
        if name.endswith("bias"):
            weights[name][rng.permutation(len(weights[name]))[:2]] = 0.25
    logits, _ = target_forward(weights, config, tokens)
    got, _ = run_blocks(to_tree.target(config, weights), tokens, rng)
    assert_close(got[0], logits, "float32")


def test_long_chunks_equal_the_oracle(rng):
    # Chunks longer than a ring's slack, as prompts are prefilled.
    config, weights, tokens, logits, _ = fresh_example(rng)
    model = to_tree.target(config, weights)
    for width in (BLOCK + 2, config["sliding_window"] + 3):
        got, _ = run_blocks(model, tokens, rng, width, keep_all=True)
        assert_close(got[0], logits, "float32")


def test_whole_sequences_without_a_cache_equal_the_oracle(rng):
    config, weights, tokens, logits, _ = fresh_example(rng)
    model = to_tree.target(config, weights)
    window = config["sliding_window"]

    def feed_forward(ffn, x):
        live = (jnp.ones(x.shape[:2], bool),) if hasattr(ffn, "router") else ()
        return ffn(x, *live, Parallel())

    graph, state = nnx.split(model)

    @jax.jit
    def forward(state, tokens):
        model = nnx.merge(graph, state)
        h = model.embedding[...][tokens]
        for layer in model.layers:
            h = layer.sequence(h, feed_forward)
        return model.logits(h)

    for length in (len(tokens), len(tokens) // window * window):  # in one piece, in blocks
        got = forward(state, jnp.asarray(tokens[:length])[None])
        assert_close(got[0], logits[:length], "float32")


@pytest.mark.parametrize("mistake", TARGET_MISTAKES)
def test_a_mistake_would_be_caught(mistake, model_and_blocks):
    config, weights, tokens, got = model_and_blocks
    wrong, _ = target_forward(weights, config, tokens, mistake=mistake)
    with pytest.raises(AssertionError, match="relative norm"):
        assert_close(got, wrong, "float32")
    assert relative_norm(got, wrong) > 1e-3


@pytest.fixture(scope="module")
def model_and_blocks():
    """One target, in which every mistake matters, and its logits."""
    rng, least = np.random.default_rng(), 0.0
    while least < VISIBLE:  # In one of fifty, a sink that is scaled changes less.
        config, weights, tokens, logits, _ = fresh_example(rng)
        wrong = (target_forward(weights, config, tokens, mistake=m)[0] for m in TARGET_MISTAKES)
        least = min(relative_norm(each, logits) for each in wrong)
    got, _ = run_blocks(to_tree.target(config, weights), tokens, rng)
    assert_close(got[0], logits, "float32")
    return config, weights, tokens, got[0]


def draft(model, drafter, residuals, config, tokens, starts, rng):
    """Logits [b, block, w] of our drafter: features ingested in blocks, some of them rejected."""
    attention = drafter.layers[0].attention.config
    taps = features(residuals, config).astype(np.float32)
    contexts = caches_of([attention] * len(drafter.layers), len(starts), len(tokens))
    graph, state = nnx.split(drafter)

    @jax.jit
    def ingest(state, rows, at, contexts):
        live = jnp.ones(rows.shape[:2], bool)
        return nnx.merge(graph, state).ingest(rows, at, live, contexts, Parallel())

    at = np.zeros(len(starts), np.int32)
    while (at < starts).any():
        rows = rng.standard_normal((len(starts), BLOCK, taps.shape[1])).astype(np.float32)
        keep = np.minimum(rng.integers(1, BLOCK + 1, len(starts)), starts - at)
        for row, count in enumerate(keep):
            rows[row, :count] = taps[at[row] :][:count]
        contexts = ingest(state, jnp.asarray(rows), jnp.asarray(at), contexts)
        at = (at + keep).astype(np.int32)
    anchors = model.embedding[...][jnp.asarray(tokens[starts])]

    @jax.jit
    def run(state, anchors, at, contexts):
        drafter = nnx.merge(graph, state)
        block = drafter.block(anchors, config["block_size"])
        return drafter(block, at, contexts, contexts[0].positions(at))

    hidden = run(state, anchors, jnp.asarray(at), contexts)
    return np.asarray(head_logits(hidden, model.head[...]))


@pytest.mark.parametrize("repeat", range(3))
def test_drafter_equals_the_oracle_and_its_mistakes_are_caught(repeat, rng):
    config, weights, tokens, _, residuals = fresh_example(rng)

    def oracle(mistake=None):
        tapped = features(residuals, draft_config, mistake)
        return np.stack(
            [
                drafter_forward(
                    draft_weights, draft_config, weights, tapped, tokens[s], int(s), mistake
                )[0]
                for s in starts
            ]
        )

    least = 0.0
    while least < VISIBLE:
        seeded = np.random.RandomState(rng.integers(2**32))
        draft_config = random_drafter_config(config, seeded)
        draft_weights = random_drafter(draft_config, seeded)
        window = draft_config["sliding_window"]
        starts = np.array([1, window // 2, 2 * window, len(tokens) - 1], np.int32)
        starts = np.minimum(starts, len(tokens) - 1)
        right, wrong = oracle(), {mistake: oracle(mistake) for mistake in DRAFTER_MISTAKES}
        least = min(relative_norm(each, right) for each in wrong.values())
    model, drafter = to_tree.target(config, weights), to_tree.drafter(draft_config, draft_weights)
    got = draft(model, drafter, residuals, draft_config, tokens, starts, rng)
    assert_close(got, right, "float32")
    for mistake, each in wrong.items():
        assert relative_norm(got, each) > 1e-3, mistake
