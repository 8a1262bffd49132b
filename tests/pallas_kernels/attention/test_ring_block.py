"""A window layer's launch, its lane code carried out in numpy, against the reference."""

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from attention_cases import BF16, normal
from block_cases import bits, make, reference, written, wrong
from numpy_machine import NumpyMachine

from pallas_kernels.attention.ring_block import RingBlock
from pallas_kernels.attention.rotary import rounded

NAMES = ("qkv", "cos", "sin", "keys", "values", "start", "live", "sink")
SCALE = 0.707


def run(shape, arguments, backwards=False):
    """All thread blocks, one after another, in either order; what nobody writes is NaN."""
    refs = {k: x for k, x in zip(NAMES, arguments, strict=True) if x is not None}
    refs |= dict(keys=refs["keys"].copy(), values=refs["values"].copy())
    refs["out"] = np.full((shape.b, shape.t, shape.n, shape.v), np.nan, BF16)
    blocks = range(shape.b * shape.k * shape.tiles)
    for block in reversed(blocks) if backwards else blocks:
        machine = NumpyMachine(128 * shape.warpgroups)
        for name, size in shape.shared.items():
            refs[name] = np.full(size, np.nan, np.float32)
        shape.run(machine, machine.const(block), refs)
    return refs["out"], refs["keys"], refs["values"]


PRO = dict(b=1, t=8, n=16, h=192, v=128, k=1, s=135, window=128, half=32)
NANO = dict(b=2, t=8, n=8, h=48, v=32, k=4, s=135, window=128, half=8)
SMALL = dict(b=2, t=5, n=12, h=48, v=32, k=3, s=29, window=24, half=8)


@pytest.mark.parametrize(
    ("shape", "starts", "lives"),
    [
        # One rank of eight of MiMo-V2.6-Pro, the block across the ring's end; mimo-nano.
        pytest.param(PRO, (132,), (8,), id="pro"),
        pytest.param(NANO, (0, 301), (8, 3), id="nano"),
        # Several tiles of a key/value head: blocks across the ring's end, with dead rows, empty.
        pytest.param(dict(SMALL, n=24), (27, 86), (5, 2), id="wraps"),
        pytest.param(dict(SMALL, b=3), (0, 40, 1), (1, 0, 5), id="empty"),
        # Other pairs: of lanes two apart, and in one lane.
        pytest.param(dict(SMALL, h=80, v=96, half=16), (7, 60), (5, 4), id="half16"),
        pytest.param(dict(SMALL, h=144, v=96, half=64), (7, 60), (5, 4), id="half64"),
        pytest.param(dict(SMALL, t=1, s=24), (23, 24), (1, 1), id="one"),
        pytest.param(dict(SMALL, t=16, n=6, s=39), (33, 5), (16, 11), id="sixteen"),
    ],
)
def test_matches_the_reference(shape, starts, lives, rng):
    sink = int(rng.integers(3))  # None, in float32, in bfloat16.
    kind = dict(sink=bool(sink), sink_bytes=2 if sink == 2 else 4)
    shape = RingBlock(**shape, **kind, scale=rounded(SCALE))
    arguments = make(rng, shape, shape.half, starts, lives, bool(sink))
    if sink == 2:
        arguments = *arguments[:7], arguments[7].astype(BF16)
    found = run(shape, arguments)
    assert wrong(arguments, found, reference(arguments, shape.window, SCALE)) is None
    assert not np.isnan(found[0].astype(np.float32)).any()
    for one, other in zip(found, run(shape, arguments, backwards=True), strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


def test_a_row_minds_its_own_business(rng):
    """Written by its own block or by an earlier one, in any slot: the same bits."""
    shape = RingBlock(**dict(SMALL, t=6), sink=True, scale=rounded(SCALE))
    whole = make(rng, shape, shape.half, (41, 41), (6, 6))
    known = run(shape, whole)
    for t, slot, live in ((1, 0, 1), (6, 2, 3), (4, 3, 4)):
        # The rows before `slot` are cached first, by a block of their own.
        before = 5 - slot
        first = whole[:6] + (np.full(2, before, np.int32), whole[7])
        held = run(shape, first)[1:] if before else whole[3:5]
        part = RingBlock(**dict(SMALL, t=t), sink=True, scale=rounded(SCALE))
        qkv, cos, sin = (x[:, before : before + t].copy() for x in whole[:3])
        missing = t - qkv.shape[1]
        qkv, cos, sin = (
            np.concatenate([x, np.ones((2, missing, *x.shape[2:]), x.dtype)], axis=1)
            for x in (qkv, cos, sin)
        )
        noise = normal(rng, *qkv.shape)
        noise[:, : slot + 1, :, shape.group * shape.h :] = qkv[
            :, : slot + 1, :, shape.group * shape.h :
        ]
        noise[:, slot] = qkv[:, slot]
        numbers = whole[5] + before, np.full(2, live, np.int32)
        out = run(part, (noise, cos, sin, *held, *numbers, whole[7]))[0]
        np.testing.assert_array_equal(bits(out[:, slot]), bits(known[0][:, 5]))


class ForgetsToRotate(RingBlock):
    """A planted bug: new keys are as they were projected."""

    def _new_key(self, m, refs, where, row, is_new, old):
        still = dict(refs, cos=np.ones_like(refs["cos"]), sin=np.zeros_like(refs["sin"]))
        return RingBlock._new_key(self, m, still, where, row, is_new, old)


class WritesOneMore(RingBlock):
    """A planted bug: the row before the block is written too."""

    def _is_new(self, m, where, row):
        return self._position(m, where.last, row) > where.start - 2


class WritesOnly(RingBlock):
    """A planted bug: the block attends to what the ring held before."""

    def _new_value(self, m, refs, where, row, old):
        RingBlock._new_value(self, m, refs, where, row, old)
        return old


@pytest.mark.parametrize("bug", [ForgetsToRotate, WritesOneMore, WritesOnly])
def test_a_planted_bug_is_seen(bug, rng):
    shape = bug(**SMALL, sink=True, scale=rounded(SCALE))
    arguments = make(rng, shape, shape.half, (26, 61), (5, 3))
    found = run(shape, arguments)
    assert wrong(arguments, found, reference(arguments, shape.window, SCALE)) is not None


def test_a_dead_row_is_not_written(rng):
    shape = RingBlock(**SMALL, sink=False, scale=1.0)
    arguments = make(rng, shape, shape.half, (26, 61), (2, 0), sink=False)
    _, keys, values = run(shape, arguments)
    for before, after in ((arguments[3], keys), (arguments[4], values)):
        assert np.argwhere(written(before, after)).tolist() == [[0, 26], [0, 27]]
