"""The ring kernel's lane code, carried out in numpy, against the reference."""

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from attention_cases import BF16, cache, distance, history, normal, of_the_model, reference
from numpy_machine import NumpyMachine

from pallas_kernels.attention.ring import Ring

TOLERANCE = 5e-3


def run(shape: Ring, q, keys, values, start, live, sink=None):
    """All thread blocks, one after another; what nobody writes is NaN."""
    refs = dict(q=q, keys=keys, values=values, start=start, live=live)
    if sink is not None:
        refs["sink"] = sink
    refs["out"] = np.full((shape.b, shape.t, shape.n, shape.v), np.nan, BF16)
    for block in range(shape.b * shape.k * shape.tiles):
        machine = NumpyMachine(128 * shape.warpgroups)
        for name, size in shape.shared.items():
            refs[name] = np.full(size, np.nan, np.float32)
        shape.run(machine, machine.const(block), refs)
    return refs["out"]


def make(rng, shape: Ring, starts, lives):
    """Queries, rings and sinks."""
    q = normal(rng, shape.b, shape.t, shape.n, shape.h)
    rings = [
        cache(history(rng, shape.k, shape.h, shape.v, start + live), shape.s, start + live)
        for start, live in zip(starts, lives, strict=True)
    ]
    keys, values = (np.stack(x) for x in zip(*rings, strict=True))
    sink = rng.normal(size=shape.n).astype(np.float32) if shape.sink else None
    return q, keys, values, np.asarray(starts, np.int32), np.asarray(lives, np.int32), sink


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(
    ("shape", "starts", "lives"),
    [
        # One rank of eight of MiMo-V2.6-Pro; mimo-nano, whose heads end in half steps.
        (dict(b=2, t=8, n=16, h=192, v=128, k=1, s=135, window=128), (300, 5), (8, 3)),
        (dict(b=1, t=8, n=8, h=48, v=32, k=4, s=135, window=128), (127,), (8,)),
        (dict(b=3, t=5, n=6, h=80, v=96, k=2, s=23, window=19), (0, 40, 18), (5, 2, 0)),
    ],
)
def test_matches_the_reference(shape, starts, lives, sink, rng):
    shape = Ring(**shape, sink=sink)
    arguments = make(rng, shape, starts, lives)
    out, wanted = run(shape, *arguments), reference(*arguments[:5], shape.window, arguments[5])
    for sequence, live in enumerate(lives):
        assert not np.isnan(out[sequence].astype(np.float32)).any()
        if live:
            assert distance(out[sequence, :live], wanted[sequence, :live]) < TOLERANCE


SMALL = dict(b=1, n=4, h=48, v=32, k=2, s=29, window=24, sink=True)


def block(past, queries, position, slot, t, live, sink):
    """Arguments of a block in which `position` is row `slot`; rows after it are not written."""
    start = position - slot
    keys, values = cache(past, SMALL["s"], start + live)
    q = queries[None, start : start + t]
    number = [np.asarray([x], np.int32) for x in (start, live)]
    return q, keys[None], values[None], *number, sink


def test_a_row_minds_its_own_business(rng):
    """Its bits are the same in every slot of blocks of any size, with anything beside it."""
    past = history(rng, 2, 48, 32, 90)
    queries, sink = normal(rng, 90, 4, 48), rng.normal(size=4).astype(np.float32)
    position, first = 61, None
    for t, slot, live in ((1, 0, 1), (6, 0, 6), (6, 5, 6), (5, 2, 3), (6, 3, 6)):
        arguments = block(past, queries, position, slot, t, live, sink)
        others = normal(rng, *arguments[0].shape)
        others[:, slot] = arguments[0][:, slot]
        out = run(Ring(**SMALL, t=t), others, *arguments[1:])[0, slot]
        first = out if first is None else first
        np.testing.assert_array_equal(out, first)


def test_weights_are_rounded_as_xla_rounds_them(rng, monkeypatch):
    """Though each warp looks at 16 rows; with fractional maxima, the planted bug, they are not."""
    shape = Ring(**SMALL, t=5)
    arguments = make(rng, shape, (40,), (5,))
    wanted = of_the_model(*arguments[:5], shape.window, arguments[5])
    assert distance(run(shape, *arguments), wanted) < 2e-4
    monkeypatch.setattr(NumpyMachine, "whole", lambda self, x: x)
    assert distance(run(shape, *arguments), wanted) > 5e-4


class KeepsGarbage(Ring):
    """A planted bug: values of rows that nobody sees are multiplied by 0."""

    def _position(self, m, last, row):
        found = Ring._position(self, m, last, row)
        return m.where(found >= 0, found, m.const(1 << 30))


class ForgetsTheWindow(Ring):
    """A planted bug: an old row of the ring is seen."""

    def _position(self, m, last, row):
        found = Ring._position(self, m, last, row)
        return m.where(m.const(self.s) > row, m.maximum(found, last - self.window + 1), found)


@pytest.mark.parametrize("bug", [KeepsGarbage, ForgetsTheWindow])
def test_a_planted_bug_is_seen(bug, rng):
    past = history(rng, 2, 48, 32, 90)
    queries, sink = normal(rng, 90, 4, 48), rng.normal(size=4).astype(np.float32)
    position = 7 if bug is KeepsGarbage else 61
    arguments = block(past, queries, position, 0, 5, 2, sink)
    out = run(bug(**SMALL, t=5), *arguments)
    wanted = reference(*arguments[:5], SMALL["window"], sink)
    assert not distance(out[0, :2], wanted[0, :2]) < 10 * TOLERANCE
