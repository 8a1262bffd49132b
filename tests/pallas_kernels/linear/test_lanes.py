"""The kernel's own PTX hooks, emulated on a CPU, against float64: every fragment, every address."""

import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

import emulated_linear  # noqa: E402
import lane_emulator  # noqa: E402
from linear_cases import BF16, CODES, oracle, random_case  # noqa: E402

from pallas_kernels.linear import arithmetic, lanes  # noqa: E402
from pallas_kernels.linear.plan import Plan  # noqa: E402

TOLERANCE = 1e-5
CASES = {
    "bf16": (Plan(23, 256, 2, 1, 4, 2, 1, ctas=2), 5),
    "bf16 wide tokens": (Plan(21, 640, 2, 1, 4, 1, 2, ctas=1), 11),
    "bf16 split": (Plan(10, 1024, 2, 2, 8, 1, 1, ctas=4), 8),
    "fp8": (Plan(128, 1024, 1, 1, 4, 2, 1, ctas=16), 7),
    "fp8 narrow": (Plan(64, 512, 1, 1, 8, 1, 2, ctas=5), 16),
    "fp8 split": (Plan(64, 1024, 1, 2, 8, 1, 4, ctas=6), 3),
}


def distance(out, ref):
    value = np.linalg.norm(out - ref) / np.linalg.norm(ref)
    return np.inf if np.isnan(value) else value


@pytest.mark.parametrize("name", CASES)
def test_the_hooks_compute_the_linear(name, rng):
    plan, t = CASES[name]
    x, weight, scale, _ = random_case(rng, plan, t)
    out = emulated_linear.run(plan, x, weight, scale, None, 0.0, np.float32, t)
    assert distance(out, oracle(x, weight, scale)) < TOLERANCE


@pytest.mark.parametrize("name", ["bf16", "fp8 narrow"])
def test_the_hooks_compute_the_norm(name, rng):
    plan, t = CASES[name]
    x, weight, scale, norm = random_case(rng, plan, t)
    out = emulated_linear.run(plan, x, weight, scale, norm, 1e-5, np.float32, t)
    # Another rounding of a few normed values of x to bfloat16.
    assert distance(out, oracle(x, weight, scale, norm, 1e-5)) < 2e-3


@pytest.mark.parametrize("name", ["bf16", "bf16 wide tokens", "fp8 narrow"])
def test_the_hooks_add_the_residual_before_they_round(name, rng):
    plan, t = CASES[name]
    x, weight, scale, _ = random_case(rng, plan, t)
    residual = rng.normal(size=(t, plan.rows)).astype(BF16)
    out = emulated_linear.run(plan, x, weight, scale, None, 0.0, BF16, t, residual)
    wide = emulated_linear.run(plan, x, weight, scale, None, 0.0, np.float32, t)
    wide = wide.astype(np.float32) + residual.astype(np.float32)
    np.testing.assert_array_equal(out, wide.astype(BF16).astype(np.float64))


def test_the_hooks_round_to_bfloat16(rng):
    plan, t = CASES["bf16"]
    x, weight, scale, _ = random_case(rng, plan, t)
    out = emulated_linear.run(plan, x, weight, scale, None, 0.0, BF16, t)
    wide = emulated_linear.run(plan, x, weight, scale, None, 0.0, np.float32, t)
    np.testing.assert_array_equal(out, wide.astype(BF16).astype(np.float64))


def test_every_code_is_decoded(rng):
    """All codes but NaN, subnormal ones too, alone in a row of ones."""
    plan = Plan(254, 256, 1, 1, 4, 1, 4, ctas=1)
    codes = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
    weight = np.zeros((254, 256), np.uint8)
    places = rng.permutation(256)[:254]
    weight[np.arange(254), places] = codes
    x = np.zeros((3, 256), BF16)
    x[1] = 1
    x[2, places[7]] = 3
    scale = np.full((2, 2), 2.0**-3, np.float32)
    out = emulated_linear.run(plan, x, weight.view(CODES), scale, None, 0.0, np.float32, 3)
    values = codes.view(CODES).astype(np.float64) / 8
    np.testing.assert_array_equal(out, [0 * values, values, 3 * values * (np.arange(254) == 7)])


@pytest.mark.parametrize("wanted", [1 << 20, 70_000, 1])
def test_blocks_bring_their_shares_of_an_array_nearer(wanted):
    """All of it, or the beginning of each block's share: once, and nothing beyond."""
    plan, t = CASES["bf16"]
    ahead = lane_emulator.Memory(np.zeros((37, 1504), np.float32))
    with lane_emulator.emulated(*emulated_linear.MODULES):
        for block in range(plan.groups):
            lanes.Lanes(plan, t).prefetch(ahead, wanted, block)
    found = sorted(ahead.prefetched)
    assert all(size % 16 == 0 and start % 128 == 0 for start, size in found)
    ends = [start + size for start, size in found]
    assert all(end <= start for end, (start, _) in zip(ends, found[1:], strict=False))
    assert ends[-1] <= ahead.array.nbytes
    total = sum(size for _, size in found)
    assert min(wanted, ahead.array.nbytes) <= total <= wanted + plan.groups * 32 * 128


BUGS = {
    "a word of another column": ("odd;\nmov.b32 $1, even", "even;\nmov.b32 $1, odd"),
    "a mask": ("0x07F007F0", "0x07E007F0"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug, rng, monkeypatch):
    right, wrong = BUGS[bug]
    text = arithmetic.DECODE_ASM
    assert right in text
    monkeypatch.setattr(arithmetic, "DECODE_ASM", text.replace(right, wrong))
    plan, t = CASES["fp8"]
    x, weight, scale, _ = random_case(rng, plan, t)
    out = emulated_linear.run(plan, x, weight, scale, None, 0.0, np.float32, t)
    assert not distance(out, oracle(x, weight, scale)) < 100 * TOLERANCE
