"""A drafter that always agrees gives exactly the block's size a round; one that never does, 1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Decoder, emitted, make_request, tiny_drafter, tiny_model

from mimo_jax.decode.loop import decode
from mimo_jax.decode.prefill import prefill
from mimo_jax.sharding import Parallel

BLOCK, BATCH, MAX_LEN, CHUNK = 6, 3, 70, 9


@dataclasses.dataclass
class PlannedDrafter:
    """Has a drafter's interface, and drafts what a table [b, l] says for each position."""

    plan: jax.Array

    def ingest_prompt(self, model, tokens, features, start, live, contexts, parallel):
        return contexts

    def ingest(self, features, start, live, contexts, parallel):
        return contexts

    def draft(self, model, tokens, start, contexts, wanted, block, parallel):
        positions = start[:, None] + jnp.arange(1, block, dtype=jnp.int32)
        return jnp.take_along_axis(self.plan, positions, axis=1), contexts


@pytest.fixture(scope="module")
def planned():
    """run(prompts, plan, request) -> state, compiled once, and the plain program beside it."""
    shapes, weights = np.random.default_rng(5), np.random.default_rng()
    target = tiny_model(shapes, 1)
    drafter = tiny_drafter(shapes, target, BLOCK, 1)
    decoder = Decoder(
        weights, target, drafter, batch=BATCH, max_len=MAX_LEN, block=BLOCK, chunk=CHUNK
    )
    graph = decoder.plan.graphs[0]

    @jax.jit
    def run(params, state, plan, request):
        model, stub = nnx.merge(graph, params[0]), PlannedDrafter(plan)
        state = prefill(model, stub, decoder.plan.taps, state, CHUNK, Parallel())
        return decode(model, stub, decoder.plan.taps, state, request, BLOCK, Parallel())

    def call(prompts, plan, **changes):
        request = make_request(BATCH, **changes)
        return run(decoder.params, decoder.start(prompts), jnp.asarray(plan, jnp.int32), request)

    return decoder, call


def plain_answers(rng, decoder, room):
    vocab = decoder.plan.config.vocab_size
    prompts = [rng.integers(0, vocab, rng.integers(1, MAX_LEN - room)) for _ in range(BATCH)]
    limits = np.array([len(prompt) for prompt in prompts]) + room
    sampling = {"temperature": rng.choice([0.0, 1.0], BATCH), "seed": int(rng.integers(2**32))}
    state = decoder(prompts, limit=limits, **sampling)
    return prompts, limits, sampling, state


def expected_rounds(right: np.ndarray, max_draft: int) -> list[int]:
    """Tokens emitted by each round, given which tokens of the answer are drafted right."""
    rounds, done = [], 0
    while done < len(right):
        count = 1
        while count <= max_draft and done + count <= len(right) and right[done + count - 1]:
            count += 1
        rounds.append(min(count, len(right) - done))
        done += rounds[-1]
    return rounds


@pytest.mark.parametrize("max_draft", [1, 3, BLOCK - 1])
def test_always_right_gives_max_draft_and_one_more(planned, rng, max_draft):
    decoder, call = planned
    room = 3 * (max_draft + 1)
    prompts, limits, sampling, plain = plain_answers(rng, decoder, room)
    state = call(prompts, plain.tokens, limit=limits, max_draft=max_draft, **sampling)
    assert emitted(state, prompts) == emitted(plain, prompts)
    expected = np.zeros((BATCH, BLOCK + 1), int)
    expected[:, max_draft + 1] = 3
    np.testing.assert_array_equal(state.histogram, expected)


def test_never_right_gives_one(planned, rng):
    decoder, call = planned
    prompts, limits, sampling, plain = plain_answers(rng, decoder, 17)
    wrong = (plain.tokens + 1) % decoder.plan.config.vocab_size
    state = call(prompts, wrong, limit=limits, max_draft=BLOCK - 1, **sampling)
    assert emitted(state, prompts) == emitted(plain, prompts)
    expected = np.zeros((BATCH, BLOCK + 1), int)
    expected[:, 1] = 17
    np.testing.assert_array_equal(state.histogram, expected)


@pytest.mark.parametrize("repeat", range(40))
def test_right_here_and_there(planned, rng, repeat):
    decoder, call = planned
    room = int(rng.integers(1, 40))
    prompts, limits, sampling, plain = plain_answers(rng, decoder, room)
    right = rng.random(plain.tokens.shape) < rng.choice([0.3, 0.7, 0.95])
    vocab = decoder.plan.config.vocab_size
    plan = np.where(right, plain.tokens, (plain.tokens + rng.integers(1, vocab)) % vocab)
    max_draft = int(rng.integers(1, BLOCK))
    state = call(prompts, plan, limit=limits, max_draft=max_draft, **sampling)
    assert emitted(state, prompts) == emitted(plain, prompts)
    for row, prompt in enumerate(prompts):
        rounds = expected_rounds(right[row, len(prompt) : limits[row]], max_draft)
        counts = np.bincount(rounds, minlength=BLOCK + 1)
        np.testing.assert_array_equal(state.histogram[row], counts)
        numbers = np.repeat(np.arange(len(rounds)), rounds)
        np.testing.assert_array_equal(state.round_of[row, len(prompt) : limits[row]], numbers)
