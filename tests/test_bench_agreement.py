"""`mimo_jax.bench.agreement`: each difference is found, adjudicated, and stepped over."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.bench import agreement
from mimo_jax.model import layers

WORDS = 50


def engine(answer, changed=None):
    """Writes `answer` whatever came before, but other tokens at the places that are changed."""

    def generate(prompt, *, max_tokens, **_):
        start = len(prompt) - 1
        tokens = [(changed or {}).get(i, token) for i, token in enumerate(answer) if i >= start]
        return types.SimpleNamespace(tokens=tuple(tokens[:max_tokens]))

    return types.SimpleNamespace(generate=generate)


def logits(answer, seconds):
    """The answer's token first; at each place of `seconds` another token, so many ulps below."""

    def values(tokens):
        place = len(tokens) - 1
        found = np.zeros(WORDS, np.float32)
        found[answer[place]] = 8.0
        if place in seconds:
            token, ulps = seconds[place]
            found[token] = 8.0 - ulps * 2.0**-4
        return found

    return values


@pytest.mark.parametrize(
    ("high", "low", "ulps"), [(8.0, 7.9375, 1), (-1.0, -1.015625, 2), (4.0, 3.0, 32)]
)
def test_distance_in_units_of_bfloat16(high, low, ulps):
    assert agreement.ulps_apart(high, low) == ulps


def test_equal_answers_differ_nowhere(rng):
    answer = rng.integers(0, WORDS, 30).tolist()
    assert agreement.differences(engine(answer), answer, [1], logits(answer, {})) == []


def test_each_difference_is_found_once_and_only_near_ties_are_forgiven(rng):
    answer = rng.integers(0, WORDS - 3, 30).tolist()
    other = [WORDS - 1, WORDS - 2, WORDS - 3]
    places = (0, 7, 29)
    left = engine(answer, dict(zip(places, other, strict=True)))
    # The first within 2 ulps, the second too far, at the third another token is second.
    seconds = {0: (other[0], 2), 7: (other[1], 3), 29: (other[0], 1)}
    found = agreement.differences(left, answer, [1], logits(answer, seconds))
    assert [place["at"] for place in found] == list(places)
    assert [place["near_tie"] for place in found] == [True, False, False]
    assert [place["ulps"] for place in found] == [2, 3, 1]


def test_reordered_products_have_the_same_terms(rng):
    x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((3, 250), (7, 250)))
    plain = types.SimpleNamespace(generate=lambda x: np.asarray(layers.linear(x, w)))
    whole, halved = plain.generate(x), agreement.Reordered(plain).generate(x)
    np.testing.assert_allclose(halved, whole, rtol=0, atol=2e-5)
    assert (halved != whole).any()
    np.testing.assert_array_equal(plain.generate(x), whole)
