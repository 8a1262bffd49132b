"""The numpy oracle against transformers itself, on fresh random models; needs the extra oracle."""

import pytest
from golden.make_transformers_golden import FOLDER, SEEDS, load
from oracles.random_weights import fresh_example
from tolerances import assert_close

pytestmark = [
    pytest.mark.oracle,
    # Warnings of torch and transformers about themselves are not ours to fix.
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("repeat", range(10))
def test_fresh_models_equal_transformers(repeat, rng):
    from oracles import transformers_run

    config, weights, tokens, logits, residuals = fresh_example(rng, extra=1)
    got, stream = transformers_run.run(weights, config, tokens)
    assert_close(got, logits, "float32")
    assert_close(stream, residuals, "float32")


@pytest.mark.parametrize("seed", SEEDS)
def test_stored_goldens_are_what_transformers_gives(seed):
    from oracles import transformers_run

    config, weights, tokens, rows, logits, residuals = load(FOLDER / f"seed{seed:02d}.npz")
    got, stream = transformers_run.run(weights, config, tokens)
    assert_close(got[rows], logits, "float32")
    assert_close(stream[:, rows], residuals, "float32")
