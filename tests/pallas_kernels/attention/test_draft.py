"""A drafter's launch, its lane code carried out in numpy, against the reference."""

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from attention_cases import distance, normal
from block_cases import bits
from draft_cases import EPSILON, SCALE, SMALL, make, reference, run

from pallas_kernels.attention.draft import Draft
from pallas_kernels.attention.rotary import rounded

TOLERANCE = 5e-3
LONG = dict(SMALL, s=310, window=301, v=64)
"""Two thread blocks a cluster, where 28 rows have one."""
CASES = [
    pytest.param(SMALL, (40, 3), id="wraps"),
    pytest.param(dict(SMALL, t=11, s=37, window=26, b=1), (45,), id="eleven tokens"),
    pytest.param(dict(SMALL, t=4, s=27, h=80, v=96, half=16), (0, 27), id="empty"),
    pytest.param(dict(SMALL, b=1, t=1, n=12, s=39, window=37), (1,), id="one token"),
    pytest.param(LONG, (900, 7), id="two blocks"),
    pytest.param(dict(LONG, window=13, t=7, k=2), (312, 309), id="a window in a block"),
    pytest.param(dict(LONG, s=700, window=690, h=144, half=64), (5000, 400), id="four blocks"),
    # As many rows as there are warps: the warps that prepare queries have keys too.
    pytest.param(dict(SMALL, b=1, s=16 * 11 - 3, window=168), (1000,), id="no idle warp"),
    # A rank of eight of MiMo-V2.6-Pro's drafter, but half of its heads; mimo-nano's.
    pytest.param(
        dict(b=1, t=8, n=8, h=128, v=128, k=1, s=1031, window=1024, half=32), (1300,), id="pro"
    ),
    pytest.param(
        dict(b=2, t=8, n=8, h=32, v=32, k=2, s=263, window=256, half=8), (500, 100), id="nano"
    ),
]


def shape_of(sizes, kind=Draft, causal=False, sink=2, **options):
    sink = dict(sink=bool(sink), sink_bytes=sink or 4)
    return kind(**sizes, **sink, causal=causal, scale=rounded(SCALE), epsilon=EPSILON, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sizes", "starts"), CASES)
def test_matches_the_reference(sizes, starts, causal, rng):
    # None, of four bytes, of two.
    shape = shape_of(sizes, causal=causal, sink=(0, 4, 2)[rng.integers(3)])
    assert shape.misfit() is None
    arguments = make(rng, shape, starts)
    found = run(shape, arguments)
    assert distance(found, reference(shape, arguments)) < TOLERANCE
    assert np.isfinite(found.astype(np.float32)).all()


def test_the_order_of_clusters_changes_no_bit(rng):
    shape = shape_of(LONG)
    arguments = make(rng, shape, (800, 20))
    order = rng.permutation(shape.b * shape.k * shape.tiles)
    np.testing.assert_array_equal(
        bits(run(shape, arguments)), bits(run(shape, arguments, order=order))
    )


def test_a_row_minds_its_own_business(rng):
    """Other queries, other heads' keys, and what comes later if it is causal: the same bits."""
    shape = shape_of(LONG, causal=True)
    qkv, *rest = make(rng, shape, (800, 800))
    split = shape.group * shape.h
    row = 3
    noise = normal(rng, *qkv.shape)
    noise[:, : row + 1, 1, split:] = qkv[:, : row + 1, 1, split:]
    noise[:, row, 1] = qkv[:, row, 1]
    mine = slice(shape.group, 2 * shape.group)
    for part in rest[4:6]:
        part[:, :1] = rng.permutation(part[:, :1], axis=3)
    before, after = (run(shape, (x, *rest))[:, row, mine] for x in (qkv, noise))
    np.testing.assert_array_equal(bits(before), bits(after))


def test_sizes_that_cannot_be_are_refused():
    for change, why in (
        (dict(s=16 * 95 + 1, window=1500, v=64), "a ring of 1521 rows; at most 1520 fit 8 "),
        (dict(s=16 * 47 + 1, window=700), "a ring of 753 rows; at most 752 fit 4 "),
        (dict(h=24), "heads of 24"),
        (dict(s=16 * 95, window=1500, v=320), "bytes of shared memory"),
        (dict(window=4), "a block of 5; its window of 4"),
        (dict(half=12), "24 rotated columns of 48"),
    ):
        assert why in shape_of(SMALL | change).misfit()
    assert shape_of(SMALL | dict(s=16 * 95, window=1500, v=64)).misfit() is None


class SeesThePast(Draft):
    """A planted bug: rows see only what comes before them."""

    def _sees(self, token):
        return token


class ForgetsItself(Draft):
    """A planted bug: the block's own rows are those of its first token."""

    def _head(self, m, here, token):
        token = m.where(here.own, m.const(0), token)
        return Draft._head(self, m, here, token)


class ForgetsABlock(Draft):
    """A planted bug: of what blocks send each other, the last one's counts twice."""

    def _send(self, m, refs):
        Draft._send(self, m, refs)
        refs["marks"].values[:, : 2 * self.finished] = refs["marks"].values[:, -2 * self.finished :]
        refs["parts"].values[:, : 4 * self.finished] = refs["parts"].values[:, -4 * self.finished :]


class NormsByAnothersWeight(Draft):
    """A planted bug: keys have the weights of queries."""

    def run(self, m, cluster, refs):
        Draft.run(self, m, cluster, refs | dict(key_norm=refs["query_norm"]))


class LeavesValues(Draft):
    """A planted bug: the block's own values are not scaled."""

    def _renewed(self, m, here, first, key, value, turning):
        return Draft._renewed(self, m, here, first, key, value, turning)[0], value


class LeavesKeys(Draft):
    """A planted bug: the block's own keys are neither normed nor rotated."""

    def _renewed(self, m, here, first, key, value, turning):
        return key, Draft._renewed(self, m, here, first, key, value, turning)[1]


BUGS = [
    SeesThePast, ForgetsItself, ForgetsABlock, NormsByAnothersWeight, LeavesValues, LeavesKeys,
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug, rng):
    # Few rows, so that the block's own weigh much; more where two blocks share them.
    sizes = LONG if bug is ForgetsABlock else dict(SMALL, s=16, window=9)
    shape = shape_of(sizes, bug)
    arguments = make(rng, shape, (310, 30) if bug is ForgetsABlock else (40, 3))
    assert not distance(run(shape, arguments), reference(shape, arguments)) < 4 * TOLERANCE


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_barrier_is_seen(missing, rng):
    """After queries are left, and sums; until all blocks have begun; until all is received."""
    shape = shape_of(LONG)
    arguments = make(rng, shape, (310, 30))
    with pytest.raises(AssertionError, match="barrier|begun|received"):
        run(shape, arguments, missing=missing)
