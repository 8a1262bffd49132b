"""A window layer's launch, its lane code carried out in numpy, against the reference."""

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from attention_cases import BF16, normal
from block_cases import bits, make, reference, written, wrong
from ring_cases import CASES, SMALL, run, run_exchanging

from pallas_kernels.attention.ring_block import RingBlock
from pallas_kernels.attention.rotary import rounded
from pallas_kernels.attention_layer.narrow import NarrowRing

SCALE = 0.707


@pytest.mark.parametrize(("shape", "starts", "lives"), CASES)
@pytest.mark.parametrize("ring", [RingBlock, NarrowRing])
def test_matches_the_reference(ring, shape, starts, lives, rng):
    sink = int(rng.integers(3))  # None, in float32, in bfloat16.
    kind = dict(sink=bool(sink), sink_bytes=2 if sink == 2 else 4)
    shape = ring(**shape, **kind, scale=rounded(SCALE))
    arguments = make(rng, shape, shape.half, starts, lives, bool(sink))
    if sink == 2:
        arguments = *arguments[:7], arguments[7].astype(BF16)
    found = (run if ring is RingBlock else run_exchanging)(shape, arguments)
    assert wrong(arguments, found, reference(arguments, shape.window, SCALE)) is None
    assert not np.isnan(found[0].astype(np.float32)).any()
    if ring is NarrowRing:
        return
    for one, other in zip(found, run(shape, arguments, backwards=True), strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize(("shape", "starts", "lives"), CASES)
def test_few_registers_give_the_same_bits(shape, starts, lives, rng):
    kind = dict(**shape, sink=True, scale=rounded(SCALE))
    arguments = make(rng, RingBlock(**kind), shape["half"], starts, lives)
    for one, other in zip(
        run(RingBlock(**kind), arguments),
        run_exchanging(NarrowRing(**kind), arguments),
        strict=True,
    ):
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
