"""The few-token linear on a real GPU: right in every element, the same bits whatever is around."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_memory import poison
from linear_cases import random_case

from pallas_kernels.choice import kernel_absence
from pallas_kernels.linear import linear, plan_for
from pallas_kernels.linear.shapes import SHAPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(kernel_absence()), reason=str(kernel_absence())),
]
TOLERANCE = 1e-4
kernel = jax.jit(
    functools.partial(linear, out_dtype=jnp.float32, implementation="mosaic_gpu"),
    static_argnames="epsilon",
)


def make(rng, name, t):
    shape = SHAPES[name]
    plan = plan_for(shape.n, shape.d, shape.itemsize)
    case = random_case(rng, plan, t, shape.unit or 64)
    return [None if part is None else jnp.asarray(part) for part in case]


def distance(out, ref):
    value = np.linalg.norm(np.asarray(out, np.float64) - np.asarray(ref, np.float64))
    value = value / np.linalg.norm(np.asarray(ref, np.float64))
    return np.inf if np.isnan(value) else value


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("t", [1, 8, 13])
def test_matches_the_reference(name, t, rng):
    x, weight, scale, norm = make(rng, name, t)
    for other, limit in ((None, TOLERANCE), (norm, 4e-3)):
        poison()
        out = kernel(x, weight, scale, norm=other)
        ref = linear(
            x, weight, scale, norm=other, out_dtype=jnp.float32, implementation="reference"
        )
        assert distance(out, ref) < limit


@pytest.mark.parametrize("name", ["pro-qkv", "pro-o", "pro-head", "pro-draft-features", "nano-up"])
def test_fifty_runs_give_the_same_bits(name, rng):
    x, weight, scale, _ = make(rng, name, 8)
    first = np.asarray(kernel(x, weight, scale))
    for _ in range(50):
        poison()
        np.testing.assert_array_equal(kernel(x, weight, scale), first)


@pytest.mark.parametrize("name", ["pro-qkv", "pro-o", "flash-qkv", "nano-up"])
def test_a_row_keeps_its_bits_among_any_rows(name, rng):
    x, weight, scale, norm = make(rng, name, 8)
    first = np.asarray(kernel(x, weight, scale, norm=norm))
    for t in range(1, 17):
        for _ in range(5):
            row, slot = rng.integers(8), rng.integers(t)
            others = jnp.asarray(rng.normal(size=(t, x.shape[1])), jnp.bfloat16)
            out = kernel(others.at[slot].set(x[row]), weight, scale, norm=norm)
            np.testing.assert_array_equal(out[slot], first[row])


def test_auto_is_the_kernel(rng):
    x, weight, scale, _ = make(rng, "pro-down", 8)
    auto = jax.jit(functools.partial(linear, out_dtype=jnp.float32))
    np.testing.assert_array_equal(auto(x, weight, scale), kernel(x, weight, scale))
