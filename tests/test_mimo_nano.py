"""The shipped model: whole, small, lossless under drafting, drafted for as well as measured."""

import json
import pathlib

import numpy as np
import pytest

import mimo_jax

CHECKPOINT = pathlib.Path(__file__).resolve().parent.parent / "checkpoints" / "mimo-nano"
PROMPTS = 20


@pytest.fixture(scope="module")
def engine():
    with mimo_jax.load(CHECKPOINT, devices=1, max_len=576, progress=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompts(engine):
    lines = (CHECKPOINT / "heldout_prompts.jsonl").read_text().splitlines()[:PROMPTS]
    encoded = [engine.tokenizer.encode(json.loads(line)["text"]) for line in lines]
    assert all(len(tokens) == 256 for tokens in encoded)
    return encoded


def test_it_is_the_big_architecture_and_small(engine):
    config, drafter = engine.config, engine.drafter
    assert set(config.hybrid_layer_pattern) == {0, 1} and config.add_swa_attention_sink_bias
    assert config.n_routed_experts >= 32
    assert 4 * config.num_experts_per_tok <= config.n_routed_experts
    assert drafter.block_size == 8 and config.expert_format == "mxfp4"
    context = config.max_position_embeddings
    assert context >= 2048 and context >= 8 * drafter.sliding_window
    size = sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file())
    assert size <= 24e6, f"{size / 1e6:.1f} MB"


SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 11}


@pytest.mark.parametrize(
    ("sampling", "count", "length"),
    [
        pytest.param({}, 4, 128, id="greedy"),
        pytest.param({}, PROMPTS, 256, id="greedy, long", marks=pytest.mark.slow),
        pytest.param(SAMPLED, PROMPTS, 256, id="sampled, long", marks=pytest.mark.slow),
    ],
)
def test_drafting_changes_no_token(engine, prompts, sampling, count, length):
    options = {"max_tokens": length, "ignore_eos": True, **sampling}
    drafted = engine.generate(prompts[:count], **options)
    plain = engine.generate(prompts[:count], speculative=False, **options)
    for with_drafts, without in zip(drafted, plain, strict=True):
        assert with_drafts.tokens == without.tokens and len(without.tokens) == length
        assert without.stats.acceptance_length == 1.0
    length = np.mean([output.stats.acceptance_length for output in drafted])
    # On 100 prompts it is 5.8 greedy, 1.9 at temperature 1. Less is a fault of the drafter's input.
    assert length > (1.6 if sampling else 4.5)
