"""Sums over real GPUs: every bit, on every device; ten thousand in a loop while devices idle.

Eight GPUs of one host are meant; four or two do.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

import mimo_jax
from mimo_jax.bench import sums_jobs
from mimo_jax.sharding import make_mesh
from pallas_kernels.choice import kernel_absence

pytestmark = [
    pytest.mark.gpu8(least=2),
    pytest.mark.skipif(bool(kernel_absence()), reason=str(kernel_absence())),
]
NANO = Path(__file__).parents[3] / "checkpoints" / "mimo-nano"


def most() -> int:
    """GPUs to use."""
    return max(n for n in (1, 2, 4, 8) if n <= jax.device_count())


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_sums_have_the_same_bits_everywhere_and_are_right(devices, rng):
    if devices > most():
        pytest.skip(f"needs {devices} GPUs")
    assert sums_jobs.same_bits(rng, make_mesh(devices)) >= 6


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_ten_thousand_exchanges_while_devices_idle_at_random(devices, rng):
    if devices > most():
        pytest.skip(f"needs {devices} GPUs")
    print(sums_jobs.exact_rounds(rng, make_mesh(devices), 10_000 // sums_jobs.EXCHANGES), "s")


def test_runs_of_one_program_follow_each_other(rng):
    """Each opens its mailbox anew, where an earlier one's may have been."""
    mesh = make_mesh(most())
    start = rng.integers(0, sums_jobs.PRIME, (mesh.size, 8, 512)).astype(np.int32)
    idle = rng.integers(0, 4, (mesh.size, 20)).astype(np.int32)
    program = sums_jobs.exact_program(mesh).lower(start, idle).compile()
    results = [program(start, idle) for _ in range(50)]
    for result in results:
        np.testing.assert_array_equal(np.asarray(result), sums_jobs.expected(start, 20))


def test_the_engine_on_all_gpus_drafts_without_changing_a_token():
    engine = mimo_jax.load(str(NANO), mesh=make_mesh(most()))
    prompt = "def fibonacci(n):"
    drafted = engine.generate(prompt, max_tokens=64)
    assert len(drafted.tokens) == 64 or drafted.finish_reason == "stop"
    assert drafted.tokens == engine.generate(prompt, max_tokens=64, speculative=False).tokens
    assert drafted.tokens == engine.generate(prompt, max_tokens=64).tokens
