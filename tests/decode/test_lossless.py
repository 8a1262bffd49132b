"""DFlash gives, token for token, what plain decoding gives: greedy and sampled, on any mesh."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Decoder, emitted, tiny_drafter, tiny_model

COMBINATIONS = [
    # devices, layout, batch, block, chunk, kind of weights
    (1, "tensor", 1, 2, 5, "float32"),
    (1, "tensor", 4, 16, 11, "float32"),
    (1, "expert", 2, 7, 40, "float32"),
    (1, "tensor", 3, 5, 1, "bfloat16"),
    (1, "tensor", 1, 8, 23, "mxfp4"),
    (1, "expert", 2, 12, 3, "float32"),
    (2, "tensor", 1, 3, 17, "float32"),
    (2, "expert", 4, 8, 6, "float32"),
    (2, "tensor", 2, 15, 33, "float32"),
    (2, "expert", 1, 6, 9, "mxfp4"),
    (2, "tensor", 3, 4, 13, "bfloat16"),
    (2, "expert", 2, 10, 64, "float32"),
    (4, "tensor", 2, 2, 7, "float32"),
    (4, "expert", 1, 9, 19, "float32"),
    (4, "tensor", 4, 13, 4, "float32"),
    (4, "expert", 3, 5, 31, "bfloat16"),
    (4, "tensor", 1, 8, 15, "mxfp4"),
    (4, "expert", 2, 14, 10, "float32"),
    (8, "tensor", 1, 4, 12, "float32"),
    (8, "expert", 2, 8, 29, "float32"),
    (8, "tensor", 2, 16, 8, "float32"),
    (8, "expert", 1, 3, 21, "bfloat16"),
    (8, "tensor", 3, 11, 16, "float32"),
    (8, "expert", 4, 6, 14, "mxfp4"),
]
FAST = (3, 5, 8, 9, 15, 16, 18, 23)
"""Combinations of the default suite: all meshes and kinds of weights. Slow tests add the rest."""
DRAWS = 40
AGREEING, MORE = 10, 4000
"""Rounds that must keep a draft, and after how many more draws a test gives up."""
MAX_LEN = 96


def build(number: int, rng: np.random.Generator) -> Decoder:
    """The program of a combination. Its shapes are always the same, its weights are drawn anew."""
    shards, layout, batch, block, chunk, kind = COMBINATIONS[number]
    shapes = np.random.default_rng(number)
    changes = {}
    if kind == "mxfp4":
        width = 32 if layout == "expert" else 32 * shards
        changes = {"expert_format": "mxfp4", "hidden_size": 64, "moe_intermediate_size": width}
    target = tiny_model(shapes, shards, **changes)
    return Decoder(
        rng,
        target,
        tiny_drafter(shapes, target, block, shards),
        shards=shards,
        layout=layout,
        batch=batch,
        max_len=MAX_LEN,
        block=block,
        chunk=chunk,
        dtype=jnp.bfloat16 if kind == "bfloat16" else jnp.float32,
    )


def draw_prompts(rng, decoder: Decoder) -> list[np.ndarray]:
    """Prompts of 1 to 80 tokens, short ones among them: within a window, and past several."""
    longest = rng.choice([3, 20, 80], size=decoder.settings.batch)
    vocab = decoder.plan.config.vocab_size
    return [rng.integers(0, vocab, rng.integers(1, most + 1)) for most in longest]


def draw_sampling(rng, batch: int) -> dict:
    """Greedy, sampled, or both in one batch."""
    if rng.random() < 0.4:
        return {}
    return {
        "temperature": rng.choice([0.0, 0.3, 0.8, 1.0, 2.5], size=batch),
        "top_p": rng.choice([0.2, 0.7, 0.95, 1.0], size=batch),
        "top_k": rng.choice([0, 1, 3, 9, 100], size=batch),
        "seed": int(rng.integers(2**32)),
        "sequence": rng.permutation(1000)[:batch],
    }


def cut(tokens: list[int], budget: int, eos: list[int]) -> list[int]:
    """What is left of an answer with that budget and those end-of-sequence tokens."""
    tokens = tokens[:budget]
    ends = [place for place, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens


def check_counters(state, prompts) -> None:
    """Lengths, rounds and the histogram tell the same story."""
    rounds, length = np.asarray(state.round_of), np.asarray(state.length)
    histogram = np.asarray(state.histogram)
    assert (np.asarray(state.cached) == length - 1).all()
    for row, prompt in enumerate(prompts):
        mine = rounds[row, len(prompt) : length[row]]
        assert (rounds[row, : len(prompt)] == -1).all()
        counted = np.bincount(np.bincount(mine), minlength=histogram.shape[1])
        np.testing.assert_array_equal(histogram[row], counted)
        assert mine.tolist() == sorted(mine)


def check_draw(rng, decoder: Decoder, prompts, sampling, plain, room: int) -> np.ndarray:
    """One DFlash answer against the plain one; returns the acceptance histogram."""
    batch, block = decoder.settings.batch, decoder.settings.block
    budgets = rng.integers(1, room + 1, batch) if rng.random() < 0.5 else np.full(batch, room)
    eos = []
    if rng.random() < 0.5:
        answer = plain[rng.integers(batch)]
        eos = [int(rng.choice(answer)), int(rng.integers(decoder.plan.config.vocab_size))]
    limits = np.array([len(prompt) for prompt in prompts]) + budgets
    max_draft = block - 1 if rng.random() < 0.6 else int(rng.integers(1, block))
    state = decoder(prompts, limit=limits, eos=eos, max_draft=max_draft, **sampling)
    expected = [cut(answer, most, eos) for answer, most in zip(plain, budgets, strict=True)]
    assert emitted(state, prompts) == expected, "DFlash differs from plain decoding"
    assert np.asarray(state.done).tolist() == [answer[-1] in eos for answer in expected]
    check_counters(state, prompts)
    histogram = np.asarray(state.histogram).sum(axis=0)
    assert not histogram[max_draft + 2 :].any()
    return histogram


def check_two_draws(rng, decoder: Decoder) -> np.ndarray:
    """Two DFlash answers against one plain answer; returns their acceptance histogram."""
    prompts = draw_prompts(rng, decoder)
    sampling = draw_sampling(rng, decoder.settings.batch)
    most = MAX_LEN - max(map(len, prompts))
    room = most if rng.random() < 0.15 else int(rng.integers(1, min(most, 24) + 1))
    limits = np.array([len(prompt) for prompt in prompts]) + room
    state = decoder(prompts, limit=limits, max_draft=0, **sampling)
    plain = emitted(state, prompts)
    assert [len(answer) for answer in plain] == [room] * len(plain)
    check_counters(state, prompts)
    return sum(check_draw(rng, decoder, prompts, sampling, plain, room) for _ in range(2))


def check_combination(rng, decoder: Decoder, draws: int) -> None:
    """Random draws with new weights now and then; more of them until enough rounds kept a draft.

    How often drafts agree depends on the weights: of 40 draws, some hold only a few such rounds.
    """
    total = np.zeros(decoder.settings.block + 1, int)
    for number in itertools.count():
        if 2 * number >= draws and total[2:].sum() >= AGREEING:
            break
        assert 2 * number < draws + MORE, "the drafter never agreed: nothing was shown"
        if number % 2 == 0:
            decoder.reset(rng, agreement=(1.0, 3.0, 6.0, 4.0, 2.0)[number // 2 % 5])
        total += check_two_draws(rng, decoder)
    print("acceptance", total.tolist(), "in", 2 * number, "draws")
    assert decoder.program._cache_size() == 1


@pytest.mark.parametrize(
    "number",
    [
        number if number in FAST else pytest.param(number, marks=pytest.mark.slow)
        for number in range(len(COMBINATIONS))
    ],
)
def test_dflash_equals_plain_decoding(number, rng):
    check_combination(rng, build(number, rng), DRAWS)


@pytest.mark.parametrize("numbers", [FAST, range(len(COMBINATIONS))])
def test_combinations_cover_the_grid(numbers):
    chosen = [COMBINATIONS[number] for number in numbers]
    devices, layouts, batches, blocks, _, kinds = zip(*chosen, strict=True)
    assert len(set(chosen)) == len(numbers)
    meshes = set(itertools.product((1, 2, 4, 8), ("tensor", "expert")))
    assert meshes <= set(zip(devices, layouts, strict=True))
    assert set(kinds) == {"float32", "bfloat16", "mxfp4"}
    if numbers is not FAST:
        assert set(batches) == {1, 2, 3, 4} and set(blocks) == set(range(2, 17))
