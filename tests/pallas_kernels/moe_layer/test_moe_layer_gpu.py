"""Router and experts in one launch on a real GPU: right, the same bits whatever is around."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_cases import distance
from moe_layer_cases import EPSILON, make, options, others, poison

from pallas_kernels.choice import kernel_absence
from pallas_kernels.expert_ffn import pack_experts
from pallas_kernels.expert_ffn.shapes import SHAPES
from pallas_kernels.moe_layer import moe_layer
from pallas_kernels.router.reference import route_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(kernel_absence()), reason=str(kernel_absence())),
]
TOLERANCE = 5e-3
EXPERTS = 64
NAMES = ["pro-tp8", "flash-tp8", "nano"]


@functools.cache
def kernel(c, stream=True):
    return jax.jit(
        functools.partial(moe_layer, **options(c, stream=stream, implementation="mosaic_gpu"))
    )


@functools.partial(jax.jit, static_argnames="c")
def reference(h, norm, router, bias, weights, live, c):
    """In float32 from the normed rows on; hidden values are not rounded either."""
    from pallas_kernels.expert_ffn.reference import expert_ffn_reference

    with jax.default_matmul_precision("highest"):
        route = dict(choices=c, epsilon=EPSILON, normalise=True, scale=1.5)
        x, ids, shares = route_reference(h, norm, router, bias, live, **route)
        return expert_ffn_reference(x.astype(jnp.float32), weights, ids, shares)


def case(rng, name, t):
    """Arguments by name, packed weights in place of the checkpoint's, and what is right."""
    shape = SHAPES[name]
    given = make(rng, t, shape.d, shape.f, EXPERTS, shape.c, wide=name == "nano")
    right = np.asarray(reference(**given, c=shape.c), np.float64)
    return given | dict(weights=jax.jit(pack_experts)(given["weights"])), right


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [1, 5, 8])
def test_matches_the_reference(name, t, rng):
    given, right = case(rng, name, t)
    poison()
    found = np.asarray(kernel(SHAPES[name].c, False)(**given), np.float64)
    assert distance(found, right) < TOLERANCE
    added = right + np.asarray(given["h"], np.float64)
    assert distance(kernel(SHAPES[name].c)(**given), added) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_fifty_runs_of_blocks_of_all_sizes_give_the_same_bits(name, rng):
    """Scores that one launch leaves behind are not taken for another's."""
    given, _ = case(rng, name, 8)
    run, first = kernel(SHAPES[name].c), {}
    for _ in range(50):
        t = int(rng.integers(1, 9))
        poison()
        block = given | dict(h=given["h"][:t], live=given["live"][:t])
        found = np.asarray(run(**block))
        np.testing.assert_array_equal(found, first.setdefault(t, found))
        np.testing.assert_array_equal(found, np.asarray(run(**given))[:t])


@pytest.mark.parametrize("name", NAMES)
def test_a_row_keeps_its_bits_in_200_other_blocks(name, rng):
    given, _ = case(rng, name, 8)
    given["live"], run = None, kernel(SHAPES[name].c)
    first = np.asarray(run(**given))
    for _ in range(200):
        t = int(rng.integers(1, 9))
        row, slot = rng.integers(8), rng.integers(t)
        rows = jnp.asarray(others(rng, t, given["h"].shape[1])).at[slot].set(given["h"][row])
        np.testing.assert_array_equal(np.asarray(run(**given | dict(h=rows)))[slot], first[row])
