"""One executable for all that may change; a decoding cut anywhere goes on as if it had not been."""

import jax
import numpy as np
import pytest
from helpers import Decoder, emitted, tiny_drafter, tiny_model

BLOCK, BATCH, MAX_LEN = 5, 2, 60
STATE = ("tokens", "length", "cached", "done")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="one device"),
        pytest.param(4, id="four devices", marks=pytest.mark.slow),
    ],
)
def decoder(request) -> Decoder:
    shapes = np.random.default_rng(request.param)
    target = tiny_model(shapes, request.param)
    drafter = tiny_drafter(shapes, target, BLOCK, request.param)
    return Decoder(
        np.random.default_rng(),
        target,
        drafter,
        shards=request.param,
        batch=BATCH,
        max_len=MAX_LEN,
        block=BLOCK,
        chunk=8,
    )


def draw(rng, vocab):
    prompts = [rng.integers(0, vocab, rng.integers(1, 33)) for _ in range(BATCH)]
    limits = np.array([len(prompt) for prompt in prompts]) + rng.integers(1, 25, BATCH)
    return prompts, {
        "limit": limits,
        "temperature": rng.choice([0.0, 0.5, 1.3], BATCH),
        "top_p": rng.uniform(0.3, 1.0, BATCH),
        "top_k": rng.integers(0, 9, BATCH),
        "seed": int(rng.integers(2**32)),
        "eos": rng.integers(0, vocab, 2),
        "max_draft": int(rng.integers(BLOCK)),
    }


def test_one_compile_for_a_hundred_prompts(decoder, compiles, rng):
    vocab = decoder.plan.config.vocab_size
    decoder(*draw(rng, vocab)[:1])
    assert decoder.program._cache_size() == 1
    decoder.reset(rng)  # New weights are arguments as well.
    prompts, changes = draw(rng, vocab)
    decoder(prompts, **changes)
    before = len(compiles)
    for _ in range(100):
        prompts, changes = draw(rng, vocab)
        decoder(prompts, **changes)
    assert len(compiles) == before
    assert decoder.program._cache_size() == 1


def test_the_counter_of_compiles_counts(compiles):
    before = len(compiles)
    jax.jit(lambda x: x * 3 + len(compiles))(np.arange(7, dtype=np.float32))
    assert len(compiles) > before


def parts(rng, first: np.ndarray, last: np.ndarray):
    """Growing limits, from just after the prompts to the end."""
    limit = first.copy()
    while (limit < last).any():
        limit = np.minimum(limit + rng.integers(0, 7, BATCH), last)
        yield limit


def test_cut_anywhere_gives_the_same(decoder, rng):
    vocab = decoder.plan.config.vocab_size
    for _ in range(25):
        prompts, changes = draw(rng, vocab)
        whole = decoder(prompts, **changes)
        lengths = np.array([len(prompt) for prompt in prompts])
        state, total = decoder.start(prompts), changes["limit"]
        for limit in parts(rng, lengths, total):
            # What is drafted may change between calls too: it is never seen in the answer.
            step = changes | {"limit": limit, "max_draft": int(rng.integers(BLOCK))}
            state = decoder(state, **step)
            assert (np.asarray(state.length) <= limit).all()
        assert emitted(state, prompts) == emitted(whole, prompts)
        for name in ("length", "cached", "done"):
            np.testing.assert_array_equal(getattr(state, name), getattr(whole, name))
    assert decoder.program._cache_size() == 1


def test_every_stop_point(decoder, rng):
    """Token by token, as a stream that shows each one."""
    vocab = decoder.plan.config.vocab_size
    prompts, changes = draw(rng, vocab)
    changes |= {"limit": np.array([len(p) for p in prompts]) + 20, "eos": []}
    changes["max_draft"] = BLOCK - 1
    whole = emitted(decoder(prompts, **changes), prompts)
    state, lengths = decoder.start(prompts), np.array([len(prompt) for prompt in prompts])
    for stop in range(1, 21):
        state = decoder(state, **(changes | {"limit": lengths + stop}))
        assert emitted(state, prompts) == [answer[:stop] for answer in whole]


def test_nothing_to_do_changes_nothing(decoder, rng):
    prompts, changes = draw(rng, decoder.plan.config.vocab_size)
    state = decoder(prompts, **changes)
    before = {name: np.asarray(getattr(state, name)) for name in STATE}
    histogram = np.asarray(state.histogram)
    state = decoder(state, **changes)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(state, name), value)
    np.testing.assert_array_equal(state.histogram, histogram)


def test_pauses_change_neither_tokens_nor_rounds(decoder, rng):
    prompts, changes = draw(rng, decoder.plan.config.vocab_size)
    # A call ends after 3 to 3 + BLOCK - 1 tokens at most: so many more need several.
    changes["limit"] = np.array([len(p) for p in prompts]) + rng.integers(2 * BLOCK, 25, BATCH)
    changes |= {"max_draft": BLOCK - 1, "eos": []}
    whole = decoder(prompts, **changes)
    state, calls = decoder.start(prompts), 0
    while (np.asarray(state.length) < changes["limit"]).any():
        pause = np.asarray(state.length) + rng.integers(1, 4, BATCH)
        before = np.asarray(state.length)
        state = decoder(state, **changes, pause=pause)
        calls += 1
        reached = np.asarray(state.length) >= np.minimum(pause, changes["limit"])
        assert reached.all() and (np.asarray(state.length) >= before).all()
    assert calls > 1
    for name in ("tokens", "length", "histogram", "round_of"):
        np.testing.assert_array_equal(getattr(state, name), getattr(whole, name))
