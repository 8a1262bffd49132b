"""The few-token linear's ring, copies and division of work, interpreted against the oracle.

Memory that nobody wrote is NaN in the interpreter, so that every result here also shows that each
element was written.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_cases import oracle, random_case

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from pallas_kernels.linear import block, interpreted, mosaic_gpu  # noqa: E402
from pallas_kernels.linear.plan import Plan, plan_for  # noqa: E402
from pallas_kernels.linear.shapes import SHAPES  # noqa: E402

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the Mosaic GPU kernels need jax >= 0.11.2"
)
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Short(Plan):
    """A plan whose ring is shorter than a block's copies, as if shared memory were small."""

    @property
    def stages(self):
        """Two."""
        return 2


CASES = {
    # A last step of few rows, rows that two blocks share, a ring that is used again.
    "bf16": (Short(51, 256, 2, 1, 4, 2, 1, ctas=3), 5, False),
    "fp8": (Plan(128, 1024, 1, 1, 4, 2, 1, ctas=5), 3, False),
    "norm": (Plan(22, 256, 2, 1, 8, 1, 2, ctas=2), 3, True),
    "split": (Short(50, 512, 2, 2, 8, 1, 1, ctas=4), 11, True),
}
SLOW = ("fp8", "norm")


def distance(out, ref):
    value = np.linalg.norm(np.asarray(out, np.float64) - ref) / np.linalg.norm(ref)
    return np.inf if np.isnan(value) else value


def run(plan, x, weight, scale, norm=None, hooks=None, residual=None):
    options = dict(plan=plan, interpret=plgpu.InterpretGPUParams(), hooks=hooks)
    return np.asarray(mosaic_gpu.linear_mosaic(x, weight, scale, norm, 1e-5, residual, **options))


@pytest.mark.parametrize("name", ["bf16", "split"])
def test_the_residual_is_added(name, rng):
    plan, t, _ = CASES[name]
    x, weight, scale, _ = random_case(rng, plan, t)
    residual = rng.normal(size=(t, plan.rows)).astype(x.dtype)
    out = run(plan, x, weight, scale, residual=residual)
    wanted = oracle(x, weight, scale) + residual.astype(np.float64)
    assert distance(out, wanted) < TOLERANCE


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]
)
def test_matches_the_oracle(name, rng):
    plan, t, normed = CASES[name]
    x, weight, scale, norm = random_case(rng, plan, t)
    norm = norm if normed else None
    out = run(plan, x, weight, scale, norm)
    # With a norm: another rounding of a few normed values to bfloat16.
    limit = 4e-3 if normed else TOLERANCE
    assert distance(out, oracle(x, weight, scale, norm, 1e-5)) < limit


def early(plan):
    """Copies of a block that do not wait for x."""
    return block.Block(plan, interpreted.Interpreted(plan, 1)).early


def test_copies_that_wait_for_x_give_the_same_bits(rng, monkeypatch):
    plan = Plan(19, 256, 2, 1, 4, 1, 1, ctas=1)
    case = random_case(rng, plan, 5)
    assert early(plan) >= plan.copies
    first = run(plan, *case)
    monkeypatch.setattr(block, "EARLY_BYTES", 0)
    mosaic_gpu.linear_mosaic.clear_cache()
    assert early(plan) == 1 < plan.copies
    np.testing.assert_array_equal(run(plan, *case), first)


@pytest.mark.parametrize("name", ["pro-qkv", "pro-draft-up", "pro-head", "pro-draft-q"])
def test_some_copies_and_not_all_go_before_x(name):
    """A few tens of kilobytes a block are what memory gives until x is there."""
    shape = SHAPES[name]
    plan = plan_for(shape.n, shape.d, shape.itemsize)
    assert early(plan) < plan.copies
    assert early(plan) * plan.stage_bytes <= block.EARLY_BYTES


@pytest.mark.slow
def test_more_tokens_than_registers_hold_take_two_launches(rng):
    plan = Plan(12, 4096, 2, 1, 16, 2, 1, ctas=1)
    assert plan.tokens == 8
    x, weight, *_ = random_case(rng, plan, 13)
    out = run(plan, x, weight, None)
    assert distance(out, oracle(x, weight)) < TOLERANCE
    np.testing.assert_array_equal(run(plan, x[8:], weight, None), out[8:])


def test_a_row_minds_its_own_business(rng):
    """Its bits stay in another place, beside other rows, however many there are."""
    plan, t, _ = CASES["bf16"]
    x, weight, *_ = random_case(rng, plan, t)
    first = run(plan, x, weight, None)
    others, *_ = random_case(rng, plan, t)
    others[4] = x[1]
    np.testing.assert_array_equal(run(plan, others, weight, None)[4], first[1])


class LosesAStep(interpreted.Interpreted):
    """A planted bug: a block's first rows are written from another block's."""

    def finish(self, sums_ref, out_ref, first_row, *rest):
        first_row = jnp.maximum(first_row - 1, 0)
        interpreted.Interpreted.finish(self, sums_ref, out_ref, first_row, *rest)


class SwapsWarps(interpreted.Interpreted):
    """A planted bug: warps take each other's columns of x."""

    def operands(self, fetched):
        x = interpreted.Interpreted.operands(self, fetched)
        return jnp.stack([x[1], x[0], x[3], x[2]])


@pytest.mark.parametrize("bug", [LosesAStep, pytest.param(SwapsWarps, marks=pytest.mark.slow)])
def test_a_planted_bug_is_seen(bug, rng):
    plan, t, _ = CASES["bf16"]
    x, weight, *_ = random_case(rng, plan, t)
    out = run(plan, x, weight, None, hooks=bug)
    assert not distance(out, oracle(x, weight)) < 100 * TOLERANCE


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_all_shapes_have_a_plan_that_keeps_the_gpu_busy(name):
    shape = SHAPES[name]
    plan = plan_for(shape.n, shape.d, shape.itemsize)
    covered = plan.block_rows * plan.groups
    assert plan.rows <= covered < plan.rows + plan.block_rows
    assert plan.slice_columns * plan.warps * plan.split == plan.columns
    assert plan.groups * plan.split <= plan.ctas
    # The share of the bytes of a GPU of 132 SMs that the busiest block leaves to the mean.
    if shape.bytes > 1 << 22:
        assert plan.rows / (plan.block_rows * plan.ctas / plan.split) > 0.9


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ((100, 256, 2, 1, 6), "not a multiple of 4"),
        ((100, 448, 2, 1, 4), "448 columns are not 4 pieces of a multiple of 32"),
        ((100, 6144, 1, 1, 16, 2), "cross borders"),
        ((100, 1536, 2, 5), "132 blocks are not a multiple of 5"),
        ((8, 30720, 2, 1, 12), "too many registers"),
        ((3000, 6144, 2, 1, 12, 1, 2), "do not fit shared memory"),
        ((3000, 6144, 2, 1, 12, 4, 4), "loops to unroll"),
    ],
)
def test_what_cannot_be_cut_is_refused(cut, words):
    with pytest.raises(ValueError, match=words):
        Plan(*cut)


def test_a_matrix_without_a_plan_has_none():
    assert plan_for(256, 448, 2) is None
