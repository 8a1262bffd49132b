"""Sampled DFlash has the target's distribution: the joint of four tokens, exactly enumerated."""

import numpy as np
import pytest
from decode.exact import BATCH, CALLS, TOKENS, g_test, joint, make_decoder, samples

SETTINGS = [
    pytest.param({"temperature": 1.0}, id="plain", marks=pytest.mark.slow),
    pytest.param({"temperature": 1.6, "top_p": 0.9, "top_k": 6}, id="restricted"),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_joint_of_four_tokens(sampling):
    decoder = make_decoder()
    probabilities = joint(decoder, **sampling)
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-9)
    answers, histogram = samples(decoder, **sampling)
    assert answers.shape == (BATCH * CALLS, TOKENS) and len(answers) >= 100_000
    # Drafts were kept, and refused, often enough to matter.
    assert histogram[2:].sum() > 10_000 and histogram[1] > 10_000
    assert (100_000 * probabilities >= 10).sum() > 100
    assert g_test(answers, probabilities) > 1e-3


def test_the_g_test_sees_a_slightly_wrong_distribution():
    decoder = make_decoder()
    right = joint(decoder, temperature=1.0)
    wrong = joint(decoder, temperature=1.1)
    rng = np.random.default_rng(3)
    shape = (8,) * TOKENS
    drawn = rng.choice(len(right), size=100_000, p=right)
    answers = np.stack(np.unravel_index(drawn, shape), axis=1)
    assert g_test(answers, right) > 1e-3 > g_test(answers, wrong)
