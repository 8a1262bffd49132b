"""The router kernel's lane code, carried out in numpy, against what it means in float64."""

import dataclasses

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from numpy_cluster import NumpyCluster, Shared
from router_cases import BF16, choose, close_calls, normed, random_case, scores

from pallas_kernels.router.block import Block
from pallas_kernels.router.plan import Plan, plan_for

EPSILON = 1e-5
ROUNDING = 3e-6
"""Of scores: what float32 sums of bfloat16's products are off."""
PLANS = (
    # experts, columns, ranks, warps, tiles
    Plan(13, 256, 2, 4, 1),
    Plan(70, 1024, 8, 4, 2),
    Plan(37, 384, 1, 4, 3),
)


def run(block: Block, case, order=None, counter=None, missing=None):
    """All clusters, in any order; what nobody writes is NaN, or no id. Outputs by name."""
    h, norm, weight, bias, live = case
    plan, t = block.plan, block.t
    counter = np.zeros(3, np.uint32) if counter is None else counter
    refs = dict(h=h, norm=norm, weight=weight, bias=bias, counter=counter)
    if live is not None:
        refs["live"] = live.astype(np.int32)
    refs |= dict(
        x=np.full(h.shape, np.nan, BF16),
        ids=np.full((t, block.c), -77, np.int32),
        weights=np.full((t, block.c), np.nan, np.float32),
        scores=np.full((t, plan.experts), np.nan, np.float32),
    )
    for cluster in range(plan.clusters) if order is None else order:
        machine = NumpyCluster(plan.threads, plan.ranks, missing)
        shared = {name: Shared(plan.ranks, size) for name, size in block.shared.items()}
        block.run(machine, machine.const(int(cluster)), machine.rank, refs | shared)
    assert not counter.any(), "the counter is not fit for the next launch"
    return refs


def make(plan, t, c, wide, normalise=True, scale=1.0, kind=Block):
    return kind(t, c, plan, wide, EPSILON, normalise, scale, 1)


def check(block, case, refs):
    """Asserts that all outputs mean what they should."""
    h, norm, weight, bias, live = case
    x = normed(h, norm, EPSILON)
    flipped = refs["x"] != x
    # Sums in another order can round a value the other way, once in a long while.
    assert flipped.mean() < 2e-3
    np.testing.assert_allclose(refs["x"].astype(float), x.astype(float), rtol=2**-6)
    exact = scores(refs["x"], weight)
    np.testing.assert_allclose(refs["scores"], exact, rtol=0, atol=ROUNDING)
    ids, weights = choose(exact, bias, block.c, block.normalise, block.scale)
    found = refs["ids"].copy()
    if live is not None:
        assert (found[~live] == -1).all()
        found[~live] = ids[~live]
    assert ((found == ids) | close_calls(exact, bias, found, 2 * ROUNDING)).all()
    assert all(len(set(row)) == block.c for row in found)
    same = found == ids
    np.testing.assert_allclose(refs["weights"][same], weights[same], rtol=3e-5)
    assert np.isfinite(refs["weights"]).all()


@pytest.mark.parametrize("wide", [False, True], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("plan", "t", "c", "normalise", "scale"),
    [
        (PLANS[0], 3, 5, True, 2.5),
        (PLANS[0], 11, 13, False, 1.0),
        (PLANS[1], 9, 6, True, 1.0),
        (PLANS[2], 16, 7, True, 0.5),
        (PLANS[2], 1, 4, False, 1.5),
    ],
)
def test_matches_the_reference(plan, t, c, normalise, scale, wide, rng):
    case = random_case(rng, t, plan.columns, plan.experts, wide)
    block = make(plan, t, c, wide, normalise, scale)
    order = rng.permutation(plan.clusters)
    check(block, case, run(block, case, order))
    case = (*case[:4], None)
    check(block, case, run(block, case))


class TakesTheHighest(Block):
    """A planted bug: ties go to the highest id."""

    def _best(self, m, at, experts, keys):
        return m.const(0) - super()._best(m, at, [m.const(0) - expert for expert in experts], keys)


@pytest.mark.parametrize("kind", [Block, TakesTheHighest])
def test_ties_go_to_the_lowest_id(kind, rng):
    plan, t, c = PLANS[1], 4, 8
    case = list(random_case(rng, t, plan.columns, plan.experts, False))
    case[2] = case[2][rng.integers(0, 5, plan.experts)]
    case[3][:], case[4][0] = 0.25, True
    refs = run(make(plan, t, c, False, kind=kind), case)
    assert all(len(set(row)) < 6 for row in refs["scores"])
    total = refs["scores"] + case[3]
    ids = np.argsort(-total, axis=1, kind="stable")[:, :c]
    same = refs["ids"] == np.where(case[4][:, None], ids, -1)
    assert same.all() == (kind is Block)


def test_a_bias_chooses_and_does_not_weigh(rng):
    plan, t, c = PLANS[0], 2, 3
    case = list(random_case(rng, t, plan.columns, plan.experts, True))
    case[3][:] = -5.0
    case[3][[2, 7, 11]] = -4.0, -1.0, -2.0
    case[4] = None
    refs = run(make(plan, t, c, True, normalise=False), case)
    np.testing.assert_array_equal(refs["ids"], [[7, 11, 2]] * t)
    np.testing.assert_array_equal(refs["weights"], refs["scores"][:, [7, 11, 2]])


def test_a_row_minds_its_own_business(rng):
    """Its bits are the same in every slot of blocks of any size, with anything beside it."""
    plan, c = PLANS[1], 6
    case = random_case(rng, 1, plan.columns, plan.experts, False)
    own = run(make(plan, 1, c, False), (*case[:4], None))
    for t, slot in ((8, 3), (9, 8), (16, 0), (5, 4)):
        others = random_case(rng, t, plan.columns, plan.experts, False)
        others[0][slot] = case[0][0]
        found = run(make(plan, t, c, False), (others[0], *case[1:4], None))
        for name in ("x", "scores", "ids", "weights"):
            np.testing.assert_array_equal(found[name][slot], own[name][0], err_msg=name)


def test_float32_weights_are_not_rounded(rng):
    plan = PLANS[2]
    case = list(random_case(rng, 5, plan.columns, plan.experts, True))
    case[4] = None
    refs = run(make(plan, 5, 4, True), case)
    exact, rounded = (scores(refs["x"], w) for w in (case[2], case[2].astype(BF16)))
    far = np.abs(refs["scores"] - exact).max()
    assert far < ROUNDING < 30 * ROUNDING < np.abs(rounded - exact).max()


def test_the_counter_may_be_any_word_and_others_are_left_alone(rng):
    plan = PLANS[0]
    case = random_case(rng, 2, plan.columns, plan.experts, False)
    block = dataclasses.replace(make(plan, 2, 3, False), word=2)
    counter = np.zeros(3, np.uint32)
    for _ in range(3):
        check(block, case, run(block, case, counter=counter))


class MixesColumns(Block):
    """A planted bug: a piece's words are in another order for rows than for weights."""

    def _multiply(self, m, x, pieces):
        return Block._multiply(self, m, x, [words[::-1] for words in pieces])


class ConfusesTokens(Block):
    """A planted bug: a lane takes the first of its eight tokens."""

    def _tokens(self, m, at):
        return [(token * 0 + 8 * i, ok) for i, (token, ok) in enumerate(super()._tokens(m, at))]


@pytest.mark.parametrize("bug", [MixesColumns, ConfusesTokens])
def test_a_planted_bug_is_seen(bug, rng):
    plan, t, c = PLANS[1], 9, 6
    case = random_case(rng, t, plan.columns, plan.experts, False)
    block = make(plan, t, c, False, kind=bug)
    with pytest.raises(AssertionError):
        check(block, case, run(block, case))


@pytest.mark.parametrize("missing", range(8))
def test_a_missing_barrier_is_seen(missing, rng):
    plan, t = PLANS[0], 3
    case = random_case(rng, t, plan.columns, plan.experts, False)
    with pytest.raises(AssertionError, match="no barrier between|not received|not have begun"):
        run(make(plan, t, 4, False), case, missing=missing)


def test_plans_divide_real_shapes_well():
    assert plan_for(384, 6144) == Plan(384, 6144, 8, 12, 3)
    assert plan_for(256, 4096) == Plan(256, 4096, 8, 16, 2)
    assert plan_for(32, 256) == Plan(32, 256, 1, 8, 1)
    assert plan_for(384, 6144).clusters == plan_for(256, 4096).clusters == 16
    assert plan_for(9, 64) is None
    assert plan_for(384, 6144).width == 64
