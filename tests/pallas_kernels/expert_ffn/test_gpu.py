"""The expert kernel on a real GPU: right in every element, the same bits whatever is around."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_cases import distance, random_experts, random_routing
from gpu_memory import poison

from pallas_kernels.choice import kernel_absence
from pallas_kernels.expert_ffn import expert_ffn, pack_experts
from pallas_kernels.expert_ffn.shapes import SHAPES

if not kernel_absence():
    from pallas_kernels.expert_ffn.mosaic_gpu import Launch, expert_ffn_mosaic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(kernel_absence()), reason=str(kernel_absence())),
]
TOLERANCE = 5e-3
EXPERTS = 40

kernel = jax.jit(functools.partial(expert_ffn, implementation="mosaic_gpu"))
WAYS = {
    "two": dict(fused=False),
    "two-list": dict(fused=False, own_list=True),
    "one": {},
}
ways = pytest.mark.parametrize("way", WAYS)


@functools.cache
def launched(way, **options):
    """The kernel launched in another way, which changes no bit."""
    return jax.jit(functools.partial(expert_ffn_mosaic, launch=Launch(**WAYS[way]), **options))


@jax.jit
def reference(x, *arguments):
    """In float32, so that nothing is rounded, not hidden values either."""
    with jax.default_matmul_precision("highest"):
        return expert_ffn(x.astype(jnp.float32), *arguments, implementation="reference")


def make(rng, name, t, experts=EXPERTS, scales=(118, 124)):
    """x, weights in the checkpoint's order, ids and routing, of a real shape with fewer experts."""
    shape = SHAPES[name]
    weights = random_experts(rng, experts, shape.d, shape.f, scales)
    ids, routing = random_routing(rng, t, min(shape.c, experts), experts)
    x = jnp.asarray(rng.normal(size=(t, shape.d)), jnp.bfloat16)
    return x, weights, ids, routing


@pytest.mark.parametrize("name", ["pro-tp8", "flash-tp8", "nano", "pro-tp2"])
@pytest.mark.parametrize("t", [1, 8, 13])
def test_matches_the_reference(name, t, rng):
    x, weights, ids, routing = make(rng, name, t)
    if t > 1:
        ids[0, 0], ids[1, 0], ids[2, 1] = EXPERTS, ids[1, 1], -1
    packed = jax.jit(pack_experts)(weights)
    poison(2)
    out = kernel(x, packed, ids, routing)
    assert distance(out, np.asarray(reference(x, weights, ids, routing), np.float64)) < TOLERANCE


@pytest.mark.parametrize("active", [1, 2, 17, 64, 128])
def test_any_number_of_active_experts(active, rng):
    x, weights, _, routing = make(rng, "pro-tp8", 16, experts=128)
    ids = np.resize(rng.permutation(128)[:active], 16 * 8).reshape(16, 8).astype(np.int32)
    packed = jax.jit(pack_experts)(weights)
    poison(2)
    out = kernel(x, packed, ids, routing)
    assert distance(out, np.asarray(reference(x, weights, ids, routing), np.float64)) < TOLERANCE


def test_all_codes_under_all_scales(rng):
    """2^-20 to 2^10, one scale a matrix and run, so that small ones are not lost among large."""
    for scale in range(107, 138):
        x, weights, ids, routing = make(rng, "nano", 8, 8, (scale, scale + 1))
        x = (x.astype(jnp.float32) * 2.0 ** (118 - scale)).astype(jnp.bfloat16)
        out = kernel(x, jax.jit(pack_experts)(weights), ids, routing)
        expected = np.asarray(reference(x, weights, ids, routing), np.float64)
        assert distance(out, expected) < TOLERANCE


@ways
@pytest.mark.parametrize("t", [1, 8, 16])
def test_fifty_runs_give_the_same_bits_however_launched(t, way, rng):
    x, weights, ids, routing = make(rng, "pro-tp8", t)
    packed = jax.jit(pack_experts)(weights)
    first = np.asarray(launched("two")(x, packed, ids, routing))
    assert distance(first, np.asarray(reference(x, weights, ids, routing), np.float64)) < TOLERANCE
    for _ in range(50):
        poison(1)
        np.testing.assert_array_equal(launched(way)(x, packed, ids, routing), first)


@ways
def test_sums_are_rounded_once_a_residual_in_them(way, rng):
    x, weights, ids, routing = make(rng, "pro-tp8", 8)
    residual = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16)
    arguments = x, jax.jit(pack_experts)(weights), ids, routing
    y = launched(way)(*arguments)
    rounded = launched(way, out_dtype=jnp.bfloat16)(*arguments)
    np.testing.assert_array_equal(rounded, y.astype(jnp.bfloat16))
    for kind in (jnp.bfloat16, jnp.float32):
        added = launched(way, out_dtype=kind)(*arguments, residual)
        np.testing.assert_array_equal(added, (residual.astype(jnp.float32) + y).astype(kind))


@ways
@pytest.mark.parametrize("t", [8, 70])
def test_a_row_keeps_its_bits_in_200_other_blocks(t, way, rng):
    """In any slot, among any rows and experts, in a block of 8 or in a chunk of a prompt."""
    kernel = launched(way)
    x, weights, ids, routing = make(rng, "pro-tp8", 8)
    packed = jax.jit(pack_experts)(weights)
    first = np.asarray(kernel(x, packed, ids, routing))
    for _ in range(200):
        row, slot = rng.integers(8), rng.integers(t)
        others, shares = random_routing(rng, t, 8, EXPERTS)
        others[rng.random(t) < 0.2] = EXPERTS
        others[slot], shares[slot] = ids[row], routing[row]
        rows = jnp.asarray(rng.normal(size=(t, x.shape[1])), jnp.bfloat16).at[slot].set(x[row])
        np.testing.assert_array_equal(kernel(rows, packed, others, shares)[slot], first[row])


def test_auto_is_the_kernel(rng):
    x, weights, ids, routing = make(rng, "nano", 8)
    packed = jax.jit(pack_experts)(weights)
    np.testing.assert_array_equal(
        jax.jit(expert_ffn)(x, packed, ids, routing), kernel(x, packed, ids, routing)
    )
