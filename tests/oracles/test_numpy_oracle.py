"""The numpy oracle against stored outputs of transformers, and each planted mistake caught."""

import pathlib

import numpy as np
import pytest
from golden.make_transformers_golden import FOLDER, SEEDS, load
from oracles.mimo_numpy import MISTAKES, drafter_forward, features, target_forward
from oracles.random_weights import (
    random_checkpoint,
    random_config,
    random_drafter,
    random_drafter_config,
)
from tolerances import assert_close, relative_norm

GOLDENS = [FOLDER / f"seed{seed:02d}.npz" for seed in SEEDS]
TARGET_MISTAKES = [m for m in MISTAKES if m != "feature of the wrong layer"]


def shown(config):
    """Keys that transformers shows a sliding layer's query: one more than the window."""
    return config["sliding_window"] + 1


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_target_equals_transformers(path):
    config, weights, tokens, rows, logits, residuals = load(path)
    got, stream = target_forward(weights, config, tokens, shown(config))
    assert_close(got[rows], logits, "float32")
    for layer in range(len(stream)):
        assert_close(stream[layer, rows], residuals[layer], "float32")


@pytest.mark.parametrize("mistake", TARGET_MISTAKES)
def test_a_mistake_in_the_target_is_seen(mistake):
    config, weights, tokens, rows, logits, _ = load(GOLDENS[0])
    wrong, _ = target_forward(weights, config, tokens, shown(config), mistake)
    assert relative_norm(wrong[rows], logits) > 1e-3


def test_goldens_are_small_and_complete():
    files = sorted(pathlib.Path(FOLDER).iterdir())
    assert files == GOLDENS
    assert sum(f.stat().st_size for f in files) < 1_000_000


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m != "biased routing weights"])
def test_a_mistake_in_the_drafter_is_seen(mistake, rng):
    # Some drafters hardly mind that a sink is scaled; of three, one does.
    assert max(effect_of(mistake, int(rng.integers(2**32))) for _ in range(3)) > 1e-3


def effect_of(mistake, seed) -> float:
    """How much the mistake changes a random drafter's logits."""
    rng = np.random.RandomState(seed)
    target = random_config(rng)
    config = random_drafter_config(target, rng)
    weights, draft = random_checkpoint(target, rng), random_drafter(config, rng)
    tokens = rng.randint(0, target["vocab_size"], 3 * config["sliding_window"])
    residuals = rng.standard_normal((target["num_hidden_layers"], len(tokens), 1)) * np.ones(
        target["hidden_size"]
    ) + rng.standard_normal((target["num_hidden_layers"], len(tokens), target["hidden_size"]))
    start = len(tokens)

    def run(mistake):
        tapped = features(residuals, config, mistake)
        return drafter_forward(draft, config, weights, tapped, int(tokens[0]), start, mistake)[0]

    return relative_norm(run(mistake), run(None))


def test_the_drafter_sees_context_before_the_anchor_only(rng):
    rng = np.random.RandomState(rng.integers(2**32))
    target = random_config(rng)
    config = random_drafter_config(target, rng)
    weights, draft = random_checkpoint(target, rng), random_drafter(config, rng)
    window, block = config["sliding_window"], config["block_size"]
    start = 2 * window
    tapped = rng.standard_normal((start + block, draft["fc.weight"].shape[1]))
    base, _ = drafter_forward(draft, config, weights, tapped, 1, start)
    for position in range(len(tapped)):
        changed = tapped.copy()
        changed[position] += 1.0
        logits, _ = drafter_forward(draft, config, weights, changed, 1, start)
        assert np.any(logits != base) == (start - window < position < start), position
