"""Prefill attention on a real GPU: near the reference, the same bits in every run and cut."""

import jax
import pytest

from pallas_kernels.choice import kernel_absence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(kernel_absence()), reason=str(kernel_absence())),
]
TOLERANCE = 5e-3


@pytest.mark.parametrize("number", range(8))
def test_what_the_benchmark_checks(number, rng):
    from mimo_jax.bench import prefill_jobs as jobs

    with jax.default_matmul_precision("highest"):
        found = jobs.check(rng, jobs.checks()[number])
    assert found["distance"] < TOLERANCE
    assert found["same_bits"] and found["turns_same_bits"]
    same, drawn = found["independent"].split("/")
    assert same == drawn
