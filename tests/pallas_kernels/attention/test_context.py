"""The launch that writes a drafter's contexts, its lane code in numpy, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import CASES, EPSILON, SCALE, SMALL, make, wrong

from mimo_jax.model.layers import rms_norm, rope
from pallas_kernels.attention import write_context
from pallas_kernels.attention.checks import check_context

OPTIONS = dict(value_scale=SCALE, epsilon=EPSILON)
KERNELS = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the Mosaic GPU kernels need jax >= 0.11.2"
)


def run(arguments, change=None):
    """All thread blocks of the launch; `change` is of its shapes."""
    from numpy_machine import NumpyMachine

    from pallas_kernels.attention import context

    kv, norms, cos, sin, keys, values, start, live = arguments
    shape = context.shape_of(kv, cos, keys, values, **OPTIONS)
    assert shape.misfit() is None
    shape = change(shape) if change else shape
    refs = dict(kv=kv, norms=norms, cos=cos, sin=sin, start=start, live=live)
    held = [[x.copy() for x in rings] for rings in (keys, values)]
    for name, rings in zip(("keys", "values"), held, strict=True):
        refs |= {f"{name}{i}": ring for i, ring in enumerate(rings)}
    for block in range(shape.blocks):
        machine = NumpyMachine(32 * context.WARPS)
        shape.run(machine, machine.const(block), refs)
    return held


@KERNELS
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name, rng):
    arguments = make(rng, *CASES[name])
    assert wrong(arguments, run(arguments)) is None


@KERNELS
def test_more_than_one_launch_takes(rng):
    from pallas_kernels.attention import context

    kv, _, cos, _, keys, values, *_ = make(rng, dict(SMALL, layers=17), (27, 41), (3, 5))
    shape = context.shape_of(kv, cos, keys, values, **OPTIONS)
    assert "17 layers; at most 16" in shape.misfit()
    wide = context.Context(2, 8, 5, 8, 128, 128, 1 << 20, 32, SCALE, EPSILON)
    assert "2^31" in wide.misfit()


@KERNELS
@pytest.mark.parametrize(
    "bug", ["takes another layer's norm", "writes the dead", "a ring too long"]
)
def test_a_planted_bug_is_seen(bug, rng):
    arguments = make(rng, SMALL, (27, 41), (3, 5))
    kv, norms, cos, sin, keys, values, start, live = arguments
    spoilt = {
        "takes another layer's norm": (kv, norms[::-1].copy(), *arguments[2:]),
        "writes the dead": (*arguments[:7], np.full_like(live, SMALL["t"])),
        "a ring too long": (*arguments[:6], start + 1, live),
    }[bug]
    assert wrong(arguments, run(spoilt)) is not None


def test_the_reference_is_what_the_model_does(rng):
    """Norm and rotation as the model's layers have them, one row after another."""
    arguments = make(rng, SMALL, (27, 41), (3, 5))
    kv, norms, _, _, keys, values, start, live = arguments
    theta, h, half = 1e4, SMALL["h"], SMALL["half"]
    positions = jnp.asarray(start)[:, None] + jnp.arange(SMALL["t"], dtype=jnp.int32)
    frequencies = theta ** (-np.arange(half) / half)
    angles = np.asarray(positions)[..., None] * frequencies
    turns = [f(angles).astype(np.float32) for f in (np.cos, np.sin)]
    arguments = kv, norms, *turns, keys, values, start, live
    found = write_context(
        *jax.tree.map(jnp.asarray, arguments), **OPTIONS, implementation="reference"
    )
    for i in range(SMALL["layers"]):
        normed = rms_norm(jnp.asarray(kv[:, :, i, :, :h]), jnp.asarray(norms[i]), EPSILON)
        own = rope(normed, positions, theta, 2 * half)
        for sequence, slot in ((0, 2), (1, 4)):
            row = (start[sequence] + slot) % SMALL["s"]
            here = np.asarray(found[0][i][sequence, :, row], np.float64)
            right = np.asarray(own[sequence, slot], np.float64)
            assert np.linalg.norm(here - right) < 5e-3 * np.linalg.norm(right)
            scaled = np.asarray(kv[sequence, slot, i, :, h:]) * jnp.bfloat16(SCALE)
            np.testing.assert_array_equal(np.asarray(found[1][i][sequence, :, row]), scaled)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: (*a[:5], a[5][:-1], *a[6:]), "2 of values"),
        (lambda a: (a[0], a[1][:-1], *a[2:]), r"must be \[3, 48\]"),
        (lambda a: (*a[:4], (), *a[5:]), "here are 0 rings of keys"),
        (lambda a: (*a[:2], a[2].astype(jnp.bfloat16), *a[3:]), "must be float32"),
        (lambda a: (*a[:4], (a[4][0][:, :, :-1], *a[4][1:]), *a[5:]), "with one s"),
        (lambda a: (*a[:3], a[3][:, :-1], *a[4:]), "r at most 24"),
        (lambda a: (*a[:6], a[6][:-1], a[7]), "and 5 rows fit 29"),
    ],
)
def test_arguments_that_do_not_fit(change, words, rng):
    arguments = jax.tree.map(jnp.asarray, make(rng, SMALL, (27, 41), (3, 5)))
    with pytest.raises(ValueError, match=words):
        check_context(*change(arguments))
