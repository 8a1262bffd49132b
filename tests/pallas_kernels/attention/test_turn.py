"""The launch before a long cache's, its lane code carried out in numpy, against the reference."""

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from attention_cases import BF16
from block_cases import make, reference, wrong
from numpy_machine import NumpyMachine

from pallas_kernels.attention.chunked import Chunked, Launch
from pallas_kernels.attention.reference import decode_attention_reference
from pallas_kernels.attention.rotary import rounded
from pallas_kernels.attention.turn import WARPS, Turn

NAMES = ("qkv", "cos", "sin", "keys", "values", "start", "live")
SCALE = 0.612
SMALL = dict(b=2, t=5, n=12, h=48, v=32, k=3, s=88, launch=Launch())
PRO = dict(b=1, t=8, n=16, h=192, v=128, k=1, s=320, launch=Launch())


def run(shape: Turn, arguments):
    """All thread blocks; then the reference for what follows."""
    of = shape.attention
    refs = dict(zip(NAMES, arguments[:7], strict=True))
    refs |= dict(keys=refs["keys"].copy(), values=refs["values"].copy())
    refs["out"] = np.full((of.b, of.k, of.rows, of.h), np.nan, BF16)
    for block in range(shape.blocks):
        machine = NumpyMachine(32 * WARPS)
        shape.run(machine, machine.const(block), refs)
    q = refs["out"][:, :, : of.t * of.group].reshape(of.b, of.k, of.t, of.group, of.h)
    q = q.transpose(0, 2, 1, 3, 4).reshape(of.b, of.t, of.n, of.h)
    known = refs["keys"], refs["values"], refs["start"], refs["live"], None, arguments[7]
    out = decode_attention_reference(*jax.tree.map(jax.numpy.asarray, (q, *known)))
    return np.asarray(out), refs["keys"], refs["values"]


@pytest.mark.parametrize(
    ("shape", "half", "starts", "lives"),
    [
        pytest.param(PRO, 32, (300,), (8,), id="pro"),
        pytest.param(SMALL, 8, (0, 70), (5, 2), id="nano"),
        pytest.param(dict(SMALL, h=80, v=96), 16, (41, 70), (0, 5), id="half16"),
        pytest.param(dict(SMALL, t=16, n=21, k=7), 8, (41, 70), (16, 1), id="sixteen"),
    ],
)
@pytest.mark.parametrize("sink", [True, False])
def test_matches_the_reference(shape, half, starts, lives, sink, rng):
    shape = Turn(Chunked(**shape), half, rounded(SCALE))
    arguments = make(rng, shape.attention, half, starts, lives, sink)
    assert wrong(arguments, run(shape, arguments), reference(arguments, None, SCALE)) is None


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        (dict(b=10, s=1 << 20), True),
        (dict(b=11, s=1 << 20), False),
        (dict(b=2, k=8, n=128, s=1 << 20), False),
        (dict(b=64, s=1 << 18), False),
    ],
)
def test_a_cache_whose_places_do_not_fit_32_bits(sizes, fits):
    """Flash's and Pro's caches of a million tokens: from eleven sequences on."""
    shape = Turn(Chunked(**(PRO | sizes)), 32, rounded(SCALE))
    of = shape.attention
    assert (of.b * of.k * of.s * of.h < 2**31) is fits
    assert fits is (shape.misfit() is None) and (fits or "2^31" in shape.misfit())


class WritesTheDead(Turn):
    """A planted bug: all of the block is cached."""

    def run(self, m, block, refs):
        live = np.full_like(refs["live"], self.attention.t)
        Turn.run(self, m, block, refs | dict(live=live))


class TurnsBackwards(Turn):
    """A planted bug: by the negative of the angle, keys alike."""

    def run(self, m, block, refs):
        Turn.run(self, m, block, refs | dict(sin=-refs["sin"]))


@pytest.mark.parametrize("bug", [WritesTheDead, TurnsBackwards])
def test_a_planted_bug_is_seen(bug, rng):
    shape = bug(Chunked(**SMALL), 8, rounded(SCALE))
    arguments = make(rng, shape.attention, 8, (41, 70), (3, 5))
    assert wrong(arguments, run(shape, arguments), reference(arguments, None, SCALE)) is not None
