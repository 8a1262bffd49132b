"""A decoded block's and a drafter's attention on a real GPU: right, the same bits every time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_memory import poison

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

import context_cases
import draft_cases
from attention_cases import distance, normal
from block_cases import make, reference, wrong

from pallas_kernels.attention import block_attention, draft_attention, write_context
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
PRO_DRAFT = dict(b=1, t=8, n=16, h=128, v=128, k=1, s=1031, window=1024, half=32)
NANO_DRAFT = dict(b=2, t=8, n=8, h=32, v=32, k=2, s=263, window=256, half=8)
DRAFTS = {
    "pro": (PRO_DRAFT, (1500,)),
    "pro, empty": (PRO_DRAFT, (0,)),
    "pro, few": (dict(PRO_DRAFT, t=5, s=1028), (77,)),
    "flash": (dict(PRO_DRAFT, b=2, n=64, k=8), (5000, 1030)),
    "nano": (NANO_DRAFT, (1500, 130)),
    "one block": (dict(NANO_DRAFT, t=7, h=48, v=96, s=149, window=141), (140, 3000)),
    "four blocks": (dict(NANO_DRAFT, t=3, h=80, v=96, s=701, window=699, half=16), (1000, 2)),
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


def draft_of(sizes, causal=False):
    """Shapes, and the kernel jitted."""
    kind = dict(causal=causal, scale=rounded(draft_cases.SCALE), epsilon=draft_cases.EPSILON)
    shape = Draft(**sizes, **kind, sink=True, sink_bytes=2)
    options = dict(window=shape.window, value_scale=draft_cases.SCALE, causal=causal)
    options |= dict(epsilon=draft_cases.EPSILON, implementation="mosaic_gpu")
    run = jax.jit(functools.partial(draft_attention, **options))
    return shape, lambda *arrays: run(*arrays[:-1], sink=arrays[-1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", sorted(DRAFTS))
def test_a_drafters_block(name, causal, rng):
    sizes, starts = DRAFTS[name]
    shape, run = draft_of(sizes, causal)
    arguments = draft_cases.make(rng, shape, starts)
    found = repeated(run, *map(jnp.asarray, arguments))
    assert distance(found, draft_cases.reference(shape, arguments)) < TOLERANCE
    assert np.isfinite(found.astype(np.float32)).all()


def test_drafters_blocks_one_after_another(rng):
    """In a loop, each on the last one's heads: launches that follow at once change nothing."""
    sizes, starts = DRAFTS["pro"]
    shape, run = draft_of(sizes)
    qkv, *rest = map(jnp.asarray, draft_cases.make(rng, shape, starts))

    def step(_, qkv):
        heads = run(qkv, *rest).reshape(*qkv.shape[:3], -1)
        return qkv.at[..., : heads.shape[-1]].add(heads)

    looped = repeated(jax.jit(lambda qkv: jax.lax.fori_loop(0, 9, step, qkv)), qkv)
    by_hand = qkv
    for i in range(9):
        by_hand = jax.jit(step)(i, by_hand)
    np.testing.assert_array_equal(looped.view(np.uint16), np.asarray(by_hand).view(np.uint16))


def test_a_drafters_row_minds_its_own_business(rng):
    """Other rows' queries, and what comes after it if it is causal: the same bits."""
    shape, run = draft_of(DRAFTS["pro"][0], causal=True)
    qkv, *rest = draft_cases.make(rng, shape, (1500,))
    known = np.asarray(run(*map(jnp.asarray, (qkv, *rest))))
    split = shape.group * shape.h
    for row in range(shape.t):
        noise = normal(rng, *qkv.shape)
        noise[:, : row + 1, :, split:] = qkv[:, : row + 1, :, split:]
        noise[:, row] = qkv[:, row]
        found = np.asarray(run(*map(jnp.asarray, (noise, *rest))))
        assert (found[:, row].view(np.uint16) == known[:, row].view(np.uint16)).all(), row


@pytest.mark.parametrize("name", sorted(context_cases.CASES))
def test_a_drafters_context(name, rng):
    """All layers' rows, and no others."""
    arguments = context_cases.make(rng, *context_cases.CASES[name])
    options = dict(value_scale=context_cases.SCALE, epsilon=context_cases.EPSILON)
    run = jax.jit(functools.partial(write_context, **options, implementation="mosaic_gpu"))
    found = repeated(run, *jax.tree.map(jnp.asarray, arguments))
    assert context_cases.wrong(arguments, found) is None


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
