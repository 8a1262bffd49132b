"""The attention layer on a real GPU: right, the same bits whatever is around, time after time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_layer_cases import SHAPES, distance, make, options
from gpu_memory import poison

from pallas_kernels.attention_layer import attention_layer
from pallas_kernels.choice import kernel_absence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(kernel_absence()), reason=str(kernel_absence())),
]
TOLERANCE = 1e-2


@functools.cache
def kernel(name, stream=False):
    """Of a shape; the flags are the same for all launches."""
    flags = dict(flags=SHAPES[name].flags, stream=stream)
    rest = options(SHAPES[name], **flags, implementation="mosaic_gpu")
    return jax.jit(lambda a: attention_layer(**a, **rest, ahead=a["qkv"]))


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize(("t", "start", "live"), [(8, 1000, 8), (8, 130, 5), (1, 40, 1), (5, 0, 5)])
def test_matches_the_reference(name, t, start, live, rng):
    a = make(rng, SHAPES[name], 1, t, start, live)
    wanted = attention_layer(**a, **options(SHAPES[name], flags=None, implementation="reference"))
    poison()
    found = kernel(name)(a)
    assert distance(found[0][:, :live], wanted[0][:, :live]) < TOLERANCE
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert distance(one, other) < TOLERANCE
    wide = [np.asarray(x, np.float64)[:, :live] for x in (kernel(name, True)(a)[0], a["h"])]
    assert distance(wide[0] - wide[1], wanted[0][:, :live]) < TOLERANCE


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_fifty_runs_give_the_same_bits(name, rng):
    a = make(rng, SHAPES[name], 1, 8, 1000, 8)
    first = jax.tree.map(np.asarray, kernel(name)(a))
    for _ in range(50):
        poison()
        jax.tree.map(np.testing.assert_array_equal, kernel(name)(a), first)


@pytest.mark.parametrize("name", ["pro", "flash"])
def test_a_row_keeps_its_bits_among_any_rows(name, rng):
    """The first row sees the ring and itself, whatever comes after it."""
    a = make(rng, SHAPES[name], 1, 8, 1000, 8)
    first = np.asarray(kernel(name)(a)[0][0, 0])
    for _ in range(30):
        live = int(rng.integers(1, 9))
        others = jnp.asarray(rng.normal(size=a["h"].shape), jnp.bfloat16).at[:, 0].set(a["h"][:, 0])
        found = kernel(name)(a | dict(h=others, live=jnp.full(1, live, jnp.int32)))
        np.testing.assert_array_equal(np.asarray(found[0][0, 0]), first)
