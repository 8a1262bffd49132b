"""The kernel for Hopper, interpreted: ring, tiles, masks and sinks against the oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from prefill_cases import arrays, distance, make, oracle

from pallas_kernels.prefill_attention.blocks import prefill_attention_blocks
from pallas_kernels.prefill_attention.mosaic_gpu import Launch, Prefill, run

TOLERANCE = 8e-3
SMALL = dict(t=21, n=8, h=48, v=32, k=2)
CASES = {
    # Two sequences, one with dead rows; the first tile of the second ends inside the chunk.
    "full": dict(SMALL, s=256, start=(150, 3), live=(21, 9)),
    # Rows begin before position 0 in the second sequence.
    "window": dict(SMALL, s=256, start=(150, 3), live=(21, 9), first=(64, -64), window=40),
    # A window of several tiles.
    "long window": dict(SMALL, s=512, start=(400,), live=(21,), first=(64,), window=210),
    "nothing live": dict(SMALL, s=128, start=(20, 70), live=(0, 21)),
}
# One rank of eight of MiMo-V2.6-Pro.
PRO = dict(t=17, n=16, h=192, v=128, k=1, s=384, start=(250,), live=(17,))


def shape_for(case, kind=Prefill, **launch):
    """Of a case; tiles of 64 unless it says otherwise."""
    known = {x: case[x] for x in ("t", "n", "h", "v", "k", "s")}
    launch = Launch(**{"tile": 64, **launch})
    return kind(
        b=len(case["start"]), **known, window=case.get("window"), launch=launch, interpreted=True
    )


def interpret(shape, arguments):
    given, named = arrays(arguments)
    out = jax.jit(functools.partial(run, shape))(*given, named["first"], named["sink"])
    return np.asarray(out)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name, rng):
    case = CASES[name]
    arguments = make(rng, **case)
    out = interpret(shape_for(case, stages=2), arguments)
    assert distance(out, oracle(**arguments, window=case.get("window"))) < TOLERANCE
    assert np.isfinite(out.astype(np.float32)).all()


def test_without_sinks_and_turns(rng):
    case = CASES["full"]
    arguments = make(rng, **case) | {"sink": None}
    out = interpret(shape_for(case, turns=False), arguments)
    assert distance(out, oracle(**arguments, window=None)) < TOLERANCE


class FractionalMaxima(Prefill):
    """A planted bug: a weight's rounding depends on the tiles that were looked at before."""

    def step(self, *arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jnp, "round", lambda x: x)
            return Prefill.step(self, *arguments, **options)


@pytest.mark.parametrize("name", ["full", "window"])
def test_weights_are_rounded_as_in_blocks(name, rng):
    case = CASES[name]
    arguments = make(rng, **case)
    given, named = arrays(arguments)
    options = dict(first=named["first"], sink=named["sink"], window=case.get("window"))
    wanted = np.array(prefill_attention_blocks(*given, **options), np.float64)
    wanted[np.arange(case["t"]) >= np.asarray(case["live"])[:, None]] = np.nan
    shapes = [shape_for(case, kind, stages=2) for kind in (Prefill, FractionalMaxima)]
    right, wrong = (distance(interpret(shape, arguments), wanted) for shape in shapes)
    assert right < 2e-4 and wrong > 5e-4


def test_three_warpgroups_give_the_bits_of_two(rng):
    case = dict(CASES["full"], t=26, live=(26, 9))
    arguments = make(rng, **case)
    out = [interpret(shape_for(case, turns=False, warpgroups=count), arguments) for count in (2, 3)]
    for i, live in enumerate(case["live"]):
        np.testing.assert_array_equal(out[0][i, :live], out[1][i, :live])


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 128])
def test_a_rank_of_the_large_model(window, rng):
    case = dict(PRO, window=window)
    arguments = make(rng, **case)
    shape = shape_for(case, tile=None)
    assert shape.tile == (128 if window is None else 64)
    out = interpret(shape, arguments)
    assert distance(out, oracle(**arguments, window=window)) < TOLERANCE


@pytest.mark.parametrize("window", [None, 40])
def test_bits_do_not_depend_on_the_cut(window, rng):
    case = dict(CASES["full"], start=(150,), live=(21,), window=window)
    arguments = make(rng, **case)
    whole = interpret(shape_for(case), arguments)
    for low, high in ((0, 6), (6, 21), (13, 18)):
        part = dict(case, t=high - low)
        q = np.concatenate([arguments["q"][:, low:high]], axis=1)
        given = arguments | {"q": q, "start": np.asarray([150 + low], np.int32)}
        given["live"] = np.asarray([high - low], np.int32)
        out = interpret(shape_for(part), given)
        np.testing.assert_array_equal(out, whole[:, low:high])


def test_tiles_and_stages_are_what_fits():
    for launch, tile, stages in ((Launch(), 128, 2), (Launch(tile=64), 64, 4)):
        shape = Prefill(1, 2048, 16, 192, 128, 1, 4096, None, launch)
        assert (shape.tile, shape.stages) == (tile, stages)
    assert Prefill(1, 64, 16, 192, 128, 1, 4096, 128).tile == 64


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(h=40), "heads of 40 and 32"),
        (dict(v=144), "heads of 48 and 144"),
        (dict(s=100), "multiples of 8"),
        (dict(h=256, v=128, launch=Launch(tile=128)), "too few fit"),
    ],
)
def test_what_the_kernel_cannot_take(change, what):
    sizes = dict(b=1, t=64, n=8, h=48, v=32, k=2, s=128, window=None)
    assert what in Prefill(**{**sizes, **change}).misfit()


class KeepsGarbage(Prefill):
    """A planted bug: values past the end are multiplied by 0."""

    def clear(self, refs, work, i, stage):
        pass


class SeesTheFuture(Prefill):
    """A planted bug: the causal mask is a row too wide."""

    def seen(self, work, row, i):
        return Prefill.seen(self, work, row + self.group, i)


class SkipsATile(Prefill):
    """A planted bug: the first tile is left out."""

    def find(self, refs):
        work = Prefill.find(self, refs)
        begin = jnp.minimum(work.begin + 1, work.end)
        # All warpgroups agree on it, or they would wait for each other.
        return dataclasses.replace(work, begin=begin, plain=jnp.maximum(work.plain, begin))


@pytest.mark.parametrize("bug", [KeepsGarbage, SeesTheFuture, SkipsATile])
def test_a_planted_bug_is_seen(bug, rng):
    case = CASES["full"]
    arguments = make(rng, **case)
    out = interpret(shape_for(case, bug), arguments)
    assert not distance(out, oracle(**arguments, window=None)) < 3 * TOLERANCE
