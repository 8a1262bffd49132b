"""A decoded block's and a drafter's attention on a real GPU: right, the same bits every time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_memory import poison

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from attention_cases import distance
from block_cases import make, reference, wrong
from draft_cases import make as make_draft
from draft_cases import reference as draft_reference

from pallas_kernels.attention import block_attention, draft_attention
from pallas_kernels.attention.chunked import Chunked, Launch
from pallas_kernels.attention.draft import Draft
from pallas_kernels.attention.ring_block import RingBlock
from pallas_kernels.attention.rotary import rounded
from pallas_kernels.choice import kernel_absence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(kernel_absence()), reason=str(kernel_absence())),
]

SCALE, TOLERANCE, RUNS = 0.707, 5e-3, 50
DRAFTS = {
    "pro": dict(b=1, t=8, n=16, h=128, v=128, k=1, s=1031 + 8, window=1024),
    "nano": dict(b=2, t=8, n=8, h=32, v=32, k=2, s=263 + 8, window=256),
}
RINGS = {
    "pro": dict(b=1, t=8, n=16, h=192, v=128, k=1, s=136, window=128, half=32),
    "nano": dict(b=2, t=8, n=8, h=48, v=32, k=4, s=135, window=128, half=8),
}
CACHES = {
    "pro": (dict(b=1, t=8, n=16, h=192, v=128, k=1, s=448), 32),
    "nano": (dict(b=2, t=8, n=8, h=48, v=32, k=2, s=448), 8),
}


def repeated(run, *arguments):
    """What it gives, which is the same every time."""
    poison()
    first = jax.tree.map(np.asarray, run(*arguments))
    for _ in range(RUNS):
        again = jax.tree.map(np.asarray, run(*arguments))
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(one.view(np.uint16), other.view(np.uint16))
    return first


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", sorted(DRAFTS))
def test_a_drafters_block(name, causal, rng):
    shape = Draft(**DRAFTS[name], sink=True, causal=causal, sink_bytes=2)
    arguments = make_draft(rng, shape, (1500, 130)[: shape.b])
    run = jax.jit(
        functools.partial(
            draft_attention, window=shape.window, causal=causal, implementation="mosaic_gpu"
        )
    )
    *arrays, sink = map(jnp.asarray, arguments)
    found = repeated(lambda *a: run(*a, sink=sink), *arrays)
    assert distance(found, draft_reference(shape, arguments)) < TOLERANCE


def blocks_are_right(rng, shape, half, window, starts, lives):
    """Heads, and which rows of the caches were written with what."""
    arguments = make(rng, shape, half, starts, lives)
    options = dict(window=window, value_scale=SCALE, implementation="mosaic_gpu")
    run = jax.jit(functools.partial(block_attention, **options))
    *arrays, sink = map(jnp.asarray, arguments)
    found = repeated(lambda *a: run(*a, sink=sink), *arrays)
    assert wrong(arguments, found, reference(arguments, window, SCALE)) is None


@pytest.mark.parametrize("name", sorted(RINGS))
def test_a_windows_block(name, rng):
    shape = RingBlock(**RINGS[name], sink=True, scale=rounded(SCALE))
    blocks_are_right(rng, shape, shape.half, shape.window, (300, 5)[: shape.b], (8, 3)[: shape.b])


@pytest.mark.parametrize("name", sorted(CACHES))
def test_a_long_caches_block(name, rng):
    sizes, half = CACHES[name]
    shape = Chunked(**sizes, launch=Launch())
    blocks_are_right(rng, shape, half, None, (410, 70)[: shape.b], (8, 5)[: shape.b])
