"""A drafter's launch, its lane code carried out in numpy, against the reference."""

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from attention_cases import BF16, distance
from draft_cases import NAMES, SMALL, make, reference
from numpy_machine import NumpyMachine

from pallas_kernels.attention.draft import Draft

TOLERANCE = 5e-3


def run(shape, arguments):
    """All thread blocks; what nobody writes is NaN."""
    refs = {k: x for k, x in zip(NAMES, arguments, strict=True) if x is not None}
    refs["live"] = np.zeros_like(refs["start"])
    refs["out"] = np.full((shape.b, shape.t, shape.n, shape.v), np.nan, BF16)
    for block in range(shape.b * shape.k * shape.tiles):
        machine = NumpyMachine(128 * shape.warpgroups)
        for name, size in shape.shared.items():
            refs[name] = np.full(size, np.nan, np.float32)
        shape.run(machine, machine.const(block), refs)
    return refs["out"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("shape", "starts"),
    [
        pytest.param(SMALL, (40, 3), id="small"),
        pytest.param(dict(SMALL, t=4, s=27 + 4, h=80, v=96), (0, 27), id="empty"),
        # A rank of eight of MiMo-V2.6-Pro's drafter: turns of a warp.
        pytest.param(
            dict(b=1, t=8, n=16, h=128, v=128, k=1, s=1031 + 8, window=1024), (1300,), id="pro"
        ),
    ],
)
def test_matches_the_reference(shape, starts, causal, rng):
    sink = bool(rng.integers(2))
    shape = Draft(**shape, sink=sink, causal=causal, sink_bytes=2)
    arguments = make(rng, shape, starts)
    assert distance(run(shape, arguments), reference(shape, arguments)) < TOLERANCE


class ForgetsATurn(Draft):
    """A planted bug: of a warp's rows all but the last 16 count."""

    def _share(self, m, refs, where, share, query, tokens):
        found = Draft._share(self, m, refs, where, share, query, tokens)
        last = share % self.turns > self.turns - 2
        return [m.where(last, m.const(-1e30 if i < 2 else 0.0), x) for i, x in enumerate(found)]


class SeesThePast(Draft):
    """A planted bug: rows see only what comes before them."""

    def _sees(self, token):
        return token


class ForgetsItself(Draft):
    """A planted bug: the block's own rows are those of its first token."""

    def _both(self, m, refs, name, first, row, size, places):
        row = m.minimum(row, self.held)
        return Draft._both(self, m, refs, name, first, row, size, places)


@pytest.mark.parametrize("bug", [SeesThePast, ForgetsItself, ForgetsATurn])
def test_a_planted_bug_is_seen(bug, rng):
    window = dict(s=280 + 5, window=276) if bug is ForgetsATurn else {}
    shape = bug(**(SMALL | window), sink=True, causal=False, sink_bytes=2)
    arguments = make(rng, shape, (310, 3) if window else (40, 3))
    assert not distance(run(shape, arguments), reference(shape, arguments)) < 10 * TOLERANCE
