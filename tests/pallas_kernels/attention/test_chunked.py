"""Long caches: the first launch interpreted, the second in numpy, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from attention_cases import BF16, cache, distance, history, normal, of_the_model, reference
from numpy_machine import NumpyMachine

from pallas_kernels.attention.chunked import Chunked, Launch
from pallas_kernels.attention.combine import WARPS

TOLERANCE = 5e-3


@functools.partial(jax.jit, static_argnums=0)
def parts_of(shape, q, keys, values, start, live):
    rows = q.reshape(shape.b, shape.t, shape.k, shape.group, shape.h).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(shape.b, shape.k, shape.t * shape.group, shape.h)
    missing = shape.rows - shape.t * shape.group
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, missing), (0, 0)))
    return shape.call(rows, keys, values, start, live)


def add_up(shape, parts, start, live, sink):
    """The second launch."""
    joint = shape.joint(sink is not None)
    refs = dict(zip(("parts", "tops", "totals"), map(np.asarray, parts), strict=True))
    refs |= dict(start=start, live=live)
    if sink is not None:
        refs["sink"] = sink
    refs["out"] = np.full((shape.b, shape.t, shape.n, shape.v), np.nan, BF16)
    for block in range(joint.blocks):
        machine = NumpyMachine(32 * WARPS)
        for name, size in joint.shared.items():
            refs[name] = np.full(size, np.nan, np.float32)
        joint.run(machine, machine.const(block), refs)
    return refs["out"]


def run(shape, q, keys, values, start, live, sink=None):
    parts = parts_of(shape, *map(jnp.asarray, (q, keys, values, start, live)))
    return add_up(shape, parts, start, live, sink)


SMALL = dict(b=1, n=8, h=48, v=32, k=2, s=320, launch=Launch(blocks=3, stages=2), interpreted=True)


def make(rng, shape, starts, lives):
    """Queries and caches whose unwritten rows are NaN."""
    start, live = (np.asarray(x, np.int32) for x in (starts, lives))
    q = normal(rng, shape.b, shape.t, shape.n, shape.h)
    held = [
        cache(history(rng, shape.k, shape.h, shape.v, end), shape.s, end) for end in start + live
    ]
    return q, *(np.stack(x) for x in zip(*held, strict=True)), start, live


@pytest.mark.parametrize(
    ("shape", "starts", "lives"),
    [
        # The block lies across a tile's end, a chunk's end in the second sequence.
        pytest.param(dict(SMALL, b=2, t=5), (189, 253), (5, 4), id="nano"),
        # One rank of eight of MiMo-V2.6-Pro: two warpgroups, chunks of two tiles.
        pytest.param(
            dict(SMALL, t=8, n=16, h=192, v=128, k=1),
            (124,),
            (8,),
            marks=pytest.mark.slow,
            id="pro",
        ),
        # Two blocks of query rows.
        pytest.param(
            dict(SMALL, t=16, n=32, h=32, v=64, k=2), (250,), (16,), marks=pytest.mark.slow, id="16"
        ),
    ],
)
def test_matches_the_reference(shape, starts, lives, rng):
    shape = Chunked(**shape)
    arguments = make(rng, shape, starts, lives)
    sink = rng.normal(size=shape.n).astype(np.float32)
    parts = parts_of(shape, *map(jnp.asarray, arguments))
    for s in (None, sink):
        out = add_up(shape, parts, *arguments[3:], s)
        wanted = reference(*arguments, None, s)
        for i, count in enumerate(lives):
            assert distance(out[i, :count], wanted[i, :count]) < TOLERANCE


def test_a_row_minds_its_own_business(rng):
    """Its bits are the same in every slot of blocks of any size, with anything beside it."""
    past, queries = history(rng, 2, 48, 32, 300), normal(rng, 300, 8, 48)
    position, first = 191, None
    for t, slot, live in ((1, 0, 1), (5, 0, 5), (5, 4, 5), (5, 2, 3)):
        start = position - slot
        shape, held = Chunked(**SMALL, t=t), cache(past, 320, start + live)
        q = normal(rng, 1, t, 8, 48)
        q[0, slot] = queries[position]
        numbers = (np.asarray([x], np.int32) for x in (start, live))
        out = run(shape, q, held[0][None], held[1][None], *numbers)[0, slot]
        first = out if first is None else first
        np.testing.assert_array_equal(out, first)


class FractionalMaxima(Chunked):
    """A planted bug: a weight's rounding depends on the tiles that were looked at before."""

    def step(self, *arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jnp, "round", lambda x: x)
            return Chunked.step(self, *arguments, **options)


def test_weights_are_rounded_as_xla_rounds_them(rng):
    arguments = make(rng, Chunked(**SMALL, t=5), (189,), (5,))
    sink = rng.normal(size=SMALL["n"]).astype(np.float32)
    wanted = of_the_model(*arguments, None, sink)
    shapes = [kind(**SMALL, t=5) for kind in (Chunked, FractionalMaxima)]
    right, wrong = (distance(run(shape, *arguments, sink), wanted) for shape in shapes)
    assert right < 2e-4 and wrong > 5e-4


class KeepsGarbage(Chunked):
    """A planted bug: values past the end are multiplied by 0."""

    def clear(self, refs, unit, i, stage):
        pass


class SeesTheFuture(Chunked):
    """A planted bug: rows of a block see each other."""

    def seen(self, unit, row, i):
        return Chunked.seen(self, dataclasses.replace(unit, start=unit.start + 8), row, i)


@pytest.mark.parametrize("bug", [KeepsGarbage, SeesTheFuture])
def test_a_planted_bug_is_seen(bug, rng):
    shape = bug(**SMALL, t=5)
    arguments = make(rng, shape, (189,), (5,))
    out = run(shape, *arguments)
    assert not distance(out, reference(*arguments, None, None)) < 10 * TOLERANCE
