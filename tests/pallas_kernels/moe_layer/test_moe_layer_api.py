"""What the API of router and experts checks, what it means, and when it is the kernel."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_cases import distance
from moe_layer_cases import expected, make, options

from mimo_jax.model.moe import ATTENTION_WORD, ROUTER_WORD
from pallas_kernels.choice import whole_layers
from pallas_kernels.expert_ffn import block, pack_experts
from pallas_kernels.expert_ffn.layout import (
    BARRIER_WORDS,
    CLAIM,
    DONE,
    MARK,
    MEET,
    KernelWeights,
    plan_for,
)
from pallas_kernels.expert_ffn.shapes import SHAPES
from pallas_kernels.moe_layer import moe_layer
from pallas_kernels.moe_layer.cut import misfit

NEW_JAX = jax.__version_info__ >= (0, 11, 2)
T, D, F, EXPERTS, CHOICES = 5, 256, 128, 32, 3


@pytest.fixture
def given(rng):
    found = make(rng, T, D, F, EXPERTS, CHOICES)
    return found | dict(weights=jax.jit(pack_experts)(found["weights"]), loose=found["weights"])


def call(given, **more):
    arguments = {name: x for name, x in given.items() if name != "loose"}
    return moe_layer(**arguments, **options(CHOICES) | more)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_cpu_runs_the_reference(stream, implementation, given):
    found = call(given, stream=stream, implementation=implementation)
    wanted = expected(given | dict(weights=given["loose"]), CHOICES, stream)
    # XLA leaves out roundings to bfloat16 between what it fuses.
    assert found.dtype == jnp.bfloat16 and distance(found, wanted) < 1e-2
    if not stream:
        assert not np.asarray(found)[~np.asarray(given["live"])].any()


def test_auto_takes_what_the_caller_has_instead(given):
    for context in (whole_layers("experts"), contextlib.nullcontext()):
        with context:
            assert (call(given, elsewhere=lambda h, live: jnp.ones_like(h)) == 1).all()


def test_only_parts_of_a_layer_can_be_one_launch():
    with (
        pytest.raises(ValueError, match=r"\['expert'\] cannot be one launch each: only"),
        whole_layers("attention", "expert"),
    ):
        pass


@pytest.mark.skipif(not NEW_JAX, reason="the kernels need jax >= 0.11.2")
@pytest.mark.parametrize("wanted", [False, True])
def test_the_kernel_is_taken_where_it_is_wanted(wanted, given):
    with whole_layers("experts" if wanted else "attention"):
        traced = jax.jit(lambda h: call(given | dict(h=h))).trace(given["h"])
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) == wanted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(implementation="fast"), "implementation='fast' is not one of"),
        (dict(choices=33), "choices=33 is not 1 to 32"),
        (dict(rows=9), "takes 1 to 8 tokens, not 9: use implementation='reference'"),
        (dict(loose=True), "takes experts packed by pack_experts"),
        (dict(router=24), "takes all 24 experts of the router, not 32 of them"),
        (dict(dtype=jnp.float32), "rows and norm in bfloat16, .* not float32, bfloat16, bfloat16"),
    ],
)
def test_arguments_that_do_not_fit(change, words, given):
    change = dict(implementation="mosaic_gpu") | change
    given = dict(given)
    if rows := change.pop("rows", 0):
        given |= dict(h=jnp.resize(given["h"], (rows, D)), live=None)
    if change.pop("loose", False):
        given["weights"] = given["loose"]
    if experts := change.pop("router", 0):
        given |= dict(router=given["router"][:experts], bias=given["bias"][:experts])
    if dtype := change.pop("dtype", None):
        given["h"] = given["h"].astype(dtype)
    with pytest.raises(ValueError, match=words):
        call(given, **change)


def why_not(shape, wide, words=BARRIER_WORDS):
    """What `misfit` says of a shape, whose weights do not exist."""
    plans, found = (plan_for(2 * shape.f, shape.d), plan_for(shape.d, shape.f)), []

    def trace():
        arrays = [jnp.zeros((shape.e, *plan.packed_shape), jnp.uint32) for plan in plans]
        weights = KernelWeights(*arrays, jnp.zeros(words, jnp.uint32), *plans)
        found.append(misfit(weights, 8, shape.c, wide))

    jax.eval_shape(trace)
    return found[0]


def test_what_fits_is_asked_for_the_blocks_that_there_are(monkeypatch):
    """A router in float32 has more rows a block on a GPU of fewer SMs; the words are counted."""
    shape = SHAPES["pro-tp8"]
    assert why_not(shape, wide=True) is None
    monkeypatch.setattr(block, "multiprocessors", lambda _: 114)
    assert "less than 3 stages" in why_not(shape, wide=True)
    assert why_not(shape, wide=False) is None
    assert f"{BARRIER_WORDS} words of `barrier`" in why_not(shape, False, BARRIER_WORDS - 1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU says")
def test_the_kernel_by_name_refuses_a_cpu_in_words(given):
    words = "this program is for cpu" if NEW_JAX else "needs jax >= 0.11.2, on Python 3.12"
    with pytest.raises(NotImplementedError, match=words):
        jax.jit(lambda given: call(given, implementation="mosaic_gpu"))(given)


def test_launches_that_share_words_use_others():
    words = [MEET, ROUTER_WORD, *range(ATTENTION_WORD, ATTENTION_WORD + 8), MARK, CLAIM]
    assert words == sorted(set(words)) and CLAIM < DONE < BARRIER_WORDS
