"""What a block does before its experts, carried out in numpy, against what it means in float64."""

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from cluster_machine import Shared
from front_machine import NumpyFront
from router_cases import BF16, choose, close_calls, normed, random_case, scores

from pallas_kernels.moe_layer.front import Front

EPSILON = 1e-5
ROUNDING = 3e-6
"""Of scores: what float32 sums of bfloat16's products are off."""
WORDS = 3, 7
RAISE = np.float32(2.0**64)


def make(t=5, c=6, experts=96, columns=512, warps=8, slices=4, blocks=37, wide=False, **more):
    kind = more.pop("kind", Front)
    more = dict(normalise=True, scale=1.0) | more
    return kind(t, c, experts, columns, warps, slices, blocks, wide, EPSILON, words=WORDS, **more)


def new_flags(front):
    return np.zeros(WORDS[1] + 8 * front.experts + 5, np.uint32)


class Launch:
    """All blocks of a launch: each until its scores are written, then each chooses."""

    def __init__(self, front, case, flags, missing=None):
        self.front, self.case, self.flags, self.missing = front, case, flags, missing

    def run(self, order=None):
        """In any order; the next launch is another one. Returns itself."""
        blocks = range(self.front.blocks) if order is None else order
        begun = {int(block): self.begin(int(block)) for block in blocks}
        self.told = [place for machine, *_ in begun.values() for place in machine.told]
        self.x = {block: x for block, (*_, x) in begun.items()}
        self.found = {block: self.end(*begun[block][:2]) for block in begun}
        self.flags[WORDS[0]] ^= 1
        return self

    def begin(self, block):
        front = self.front
        h, norm, weight, bias, live = self.case
        machine = NumpyFront(32 * front.warps, self.missing)
        refs = {name: Shared(1, size) for name, size in front.shared.items()}
        first = min(block * front.own, front.experts - front.own)
        own = np.ascontiguousarray(weight[first : first + front.own])
        refs["router_here"].values[0] = own.reshape(-1).view(np.float32)
        refs["gain_here"].values[0] = norm.view(np.float32)
        refs |= dict(h=h, bias=bias, flags=self.flags)
        if live is not None:
            refs["alive"] = live.astype(np.int32)
        words = front.scaled_rows(machine, refs)
        words = front.score(machine, refs, machine.const(block), words)
        return machine, refs, np.stack([np.asarray(word) for word in words], axis=1)

    def end(self, machine, refs):
        self.front.choose(machine, refs)
        shape = self.front.t, self.front.c
        ids = refs["ids_here"].values[0].view(np.int32).reshape(shape)
        return ids.copy(), refs["weights_here"].values[0].reshape(shape).copy()

    @property
    def scores(self):
        """As other blocks see them, but for the mark."""
        front = self.front
        found = self.flags[WORDS[1] : WORDS[1] + 8 * front.experts] & np.uint32(2**31 - 1)
        return found.view(np.float32).reshape(8, front.experts)[: front.t]

    def rows(self, block):
        """The normed rows that a block's lanes hold, from those of each slice's first warp."""
        front = self.front
        pairs = np.ascontiguousarray(self.x[block]).view(BF16).astype(np.float32) / RAISE
        lanes = pairs.reshape(front.warps, 8, 4, front.pieces, 8)
        for warp in range(front.slices, front.warps):
            np.testing.assert_array_equal(lanes[warp], lanes[warp % front.slices])
        rows = lanes[: front.slices].transpose(1, 0, 3, 2, 4).reshape(8, front.columns)
        assert not rows[front.t :].any()
        return rows[: front.t]


def check(launch):
    """Asserts that all that all blocks have is what it should be."""
    front, (h, norm, weight, bias, live) = launch.front, launch.case
    x = normed(h, norm, EPSILON)
    some = launch.rows(next(iter(launch.x)))
    # Sums in another order can round a value the other way, once in a long while.
    assert (some != x).mean() < 2e-3
    np.testing.assert_allclose(some, x.astype(float), rtol=2**-6)
    exact = scores(some, weight)
    np.testing.assert_allclose(launch.scores, exact, rtol=0, atol=ROUNDING)
    ids, weights = choose(exact, bias, front.c, front.normalise, front.scale)
    for block, (found, share) in launch.found.items():
        np.testing.assert_array_equal(launch.rows(block), some)
        found = found.copy()
        if live is not None:
            assert (found[~live] == -1).all()
            found[~live] = ids[~live]
        assert ((found == ids) | close_calls(exact, bias, found, 2 * ROUNDING)).all()
        same = found == ids
        np.testing.assert_allclose(share[same], weights[same], rtol=3e-5)
        assert np.isfinite(share).all()


CASES = [
    dict(),
    dict(t=8, c=9, blocks=13, wide=True, normalise=False, scale=2.5),
    dict(t=1, c=4, experts=64, columns=192, warps=4, slices=2, blocks=70),
    dict(t=3, c=5, experts=32, columns=256, warps=8, slices=1, blocks=9, wide=True, scale=0.5),
]


@pytest.mark.parametrize("sizes", CASES)
def test_matches_the_reference(sizes, rng):
    front = make(**sizes)
    case = random_case(rng, front.t, front.columns, front.experts, front.wide)
    check(Launch(front, case, new_flags(front)).run(rng.permutation(front.blocks)))
    check(Launch(front, (*case[:4], None), new_flags(front)).run())


def test_launches_one_after_another(rng):
    """Of more and fewer tokens: no score of a launch before this one is taken."""
    flags = new_flags(make())
    for t in (5, 8, 1, 1, 8):
        front = make(t=t)
        case = random_case(rng, t, front.columns, front.experts, False)
        check(Launch(front, case, flags).run())


@pytest.mark.parametrize("blocks", [13, 37, 96, 110])
def test_each_score_is_written_once(blocks, rng):
    """Where blocks' shares of the experts are not equal, too."""
    front = make(blocks=blocks)
    case = random_case(rng, front.t, front.columns, front.experts, False)
    launch = Launch(front, case, new_flags(front)).run()
    check(launch)
    assert sorted(launch.told) == list(range(WORDS[1], WORDS[1] + 8 * front.experts))


class KeepsItsMark(Front):
    """A planted bug: scores do not say of what launch they are."""

    def score(self, m, refs, block, words):
        refs["mark"].values[:] = 0.0
        return super().score(m, refs, block, words)


def test_scores_that_are_not_there_are_waited_for(rng):
    case = random_case(rng, 5, make().columns, make().experts, False)
    launch = Launch(make(), case, new_flags(make()))
    machine, refs, _ = launch.begin(0)
    with pytest.raises(AssertionError, match="waits for ever"):
        launch.end(machine, refs)
    # Without marks nobody waits, and what is there is taken.
    front = make(kind=KeepsItsMark)
    launch = Launch(front, case, new_flags(front))
    launch.end(*launch.begin(0)[:2])


def test_a_row_minds_its_own_business(rng):
    """Its bits are the same in every slot of blocks of any size, with anything beside it."""
    front = make(t=1)
    case = random_case(rng, 1, front.columns, front.experts, False)
    own = Launch(front, (*case[:4], None), new_flags(front)).run()
    for t, slot, blocks in ((8, 3, 37), (5, 4, 13), (2, 0, 96)):
        others = random_case(rng, t, front.columns, front.experts, False)
        others[0][slot] = case[0][0]
        others = others[0], *case[1:4], None
        front = make(t=t, blocks=blocks)
        found = Launch(front, others, new_flags(front)).run()
        np.testing.assert_array_equal(found.rows(1)[slot], own.rows(1)[0])
        np.testing.assert_array_equal(found.scores[slot], own.scores[0])
        for one, other in zip(found.found[1], own.found[1], strict=True):
            np.testing.assert_array_equal(one[slot], other[0])


class MixesColumns(Front):
    """A planted bug: the router's columns are two further than the rows'."""

    def _weights(self, m, refs, row, column):
        return super()._weights(m, refs, row, column ^ 8)


class ConfusesTokens(Front):
    """A planted bug: the squares of a token's neighbour."""

    def _squares(self, m, words, g):
        return super()._squares(m, words, g + 1)


class LosesASlice(Front):
    """A planted bug: logits without the last slice."""

    def _tell(self, m, refs, block):
        refs["logits"].values[0, -64:] = 0
        super()._tell(m, refs, block)


@pytest.mark.parametrize("bug", [MixesColumns, ConfusesTokens, LosesASlice])
def test_a_planted_bug_is_seen(bug, rng):
    front = make(kind=bug)
    case = random_case(rng, front.t, front.columns, front.experts, False)
    with pytest.raises(AssertionError):
        check(Launch(front, case, new_flags(front)).run())


@pytest.mark.parametrize("missing", range(3))
def test_a_missing_barrier_is_seen(missing, rng):
    front = make()
    case = random_case(rng, front.t, front.columns, front.experts, False)
    with pytest.raises(AssertionError, match="no barrier between"):
        Launch(front, case, new_flags(front), missing).run()
