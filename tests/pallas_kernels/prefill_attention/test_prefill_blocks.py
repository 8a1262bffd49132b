"""Prefill attention's reference and blocks against an oracle in numpy; its checks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prefill_cases import arrays, distance, make, oracle

from mimo_jax.model.attention import attend, causal
from pallas_kernels.prefill_attention import api, blocks, prefill_attention
from pallas_kernels.prefill_attention.reference import prefill_attention_reference

CASES = {
    # Two sequences at different depths, one with dead rows; a cache that no tile divides.
    "full": dict(t=20, n=6, h=24, v=16, k=3, s=107, start=(70, 3), live=(20, 9)),
    "window": dict(
        t=20, n=6, h=24, v=16, k=3, s=50, start=(70, 3), live=(20, 9), first=(48, -16), window=13
    ),
    "from nothing": dict(t=33, n=4, h=8, v=12, k=2, s=64, start=(0,), live=(33,)),
    "nothing live": dict(t=5, n=4, h=8, v=12, k=2, s=40, start=(20, 7), live=(0, 5)),
    "window in a cache": dict(t=17, n=4, h=8, v=12, k=1, s=90, start=(61,), live=(17,), window=21),
}


def run(arguments, window, implementation="blocks", dtype=None, **sizes):
    given, named = arrays(arguments)
    if implementation == "blocks":
        walk = functools.partial(blocks.prefill_attention_blocks, window=window, **sizes)
        return np.asarray(walk(*given, named["first"], named["sink"]))
    return np.asarray(
        prefill_attention(*given, **named, window=window, implementation=implementation)
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_sink", [True, False])
@pytest.mark.parametrize("implementation", ["reference", "blocks"])
def test_equals_the_oracle(name, with_sink, implementation, rng):
    case = CASES[name]
    window = case.get("window")
    arguments = make(rng, **case, dtype=np.float32)
    if not with_sink:
        arguments["sink"] = None
    sizes = dict(queries=8, tile=16) if implementation == "blocks" else {}
    out = run(arguments, window, implementation, **sizes)
    wanted = oracle(**arguments, window=window)
    assert distance(out, wanted) < 3e-6
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", ["full", "window"])
def test_bfloat16_is_near_the_oracle(name, rng):
    case = CASES[name]
    arguments = make(rng, **case)
    out = run(arguments, case.get("window"))
    assert out.dtype == arguments["q"].dtype
    assert distance(out, oracle(**arguments, window=case.get("window"))) < 6e-3


def test_a_row_that_sees_nothing_is_zero(rng):
    case = CASES["nothing live"]
    arguments = make(rng, **case) | {"start": np.asarray([0, 7], np.int32), "sink": None}
    for implementation in ("reference", "blocks"):
        assert not run(arguments, None, implementation)[0].any()


def test_tiles_and_blocks_of_queries_change_nothing_but_rounding(rng):
    arguments = make(rng, **CASES["full"], dtype=np.float32)
    first = run(arguments, None, queries=20, tile=107)
    for queries, tile in ((3, 10), (7, 64), (20, 16)):
        other = run(arguments, None, queries=queries, tile=tile)
        np.testing.assert_allclose(other, first, rtol=0, atol=5e-6)


def weights_rounded_alike(rng) -> float:
    """How far bfloat16 outputs are apart if keys are divided otherwise, or not at all."""
    case = CASES["full"]
    arguments = make(rng, **case)
    given, named = arrays(arguments)
    walk = blocks.prefill_attention_blocks.__wrapped__
    options = dict(first=named["first"], sink=named["sink"], window=None)
    outs = [walk(*given, **options, queries=q, tile=k) for q, k in ((20, 107), (3, 10), (7, 32))]
    q, keys, values = (jnp.nan_to_num(x) for x in given[:3])
    places = jnp.broadcast_to(jnp.arange(case["s"]), (len(case["start"]), case["s"]))
    queries = jnp.asarray(arguments["start"])[:, None] + jnp.arange(case["t"])
    outs.append(attend(q, keys, values, causal(queries, places, None), named["sink"]))
    first = np.array(outs[0], np.float64)
    first[np.arange(case["t"]) >= np.asarray(case["live"])[:, None]] = np.nan
    return max(distance(out, first) for out in outs[1:])


def test_weights_are_rounded_alike_however_keys_are_divided(rng):
    assert weights_rounded_alike(rng) < 2e-4


def test_fractional_maxima_round_weights_otherwise(rng, monkeypatch):
    """The planted bug of the test above."""
    monkeypatch.setattr(jnp, "round", lambda x: x)
    assert weights_rounded_alike(rng) > 5e-4


@pytest.mark.parametrize(("start", "window", "steps"), [(3, None, 1), (70, None, 4), (70, 13, 2)])
def test_only_tiles_that_are_seen_are_read(start, window, steps):
    query = jnp.asarray([[start, start + 1]])
    low, high, _, _ = blocks._span(query, query[:, -1] + 1, jnp.asarray([0]), window, 20)
    assert int(high - low) == steps


def test_no_scores_in_memory():
    kind = jax.ShapeDtypeStruct
    bf16 = jnp.bfloat16
    t, n, s = 512, 4, 1 << 16
    arguments = (
        kind((1, t, n, 24), bf16), kind((1, 1, s, 24), bf16), kind((1, 1, s, 16), bf16),
        kind((1,), jnp.int32), kind((1,), jnp.int32), None, None,
    )  # fmt: skip
    walk = functools.partial(blocks.prefill_attention_blocks, window=None)
    compiled = jax.jit(walk).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < t * n * s


@pytest.mark.parametrize("shift", [1, -1])
def test_a_planted_bug_is_seen(shift, rng, monkeypatch):
    """The causal mask is a row too wide or too narrow."""
    tile = blocks._tile

    def shifted(q, keys, values, query, *rest):
        return tile(q, keys, values, query + shift, *rest)

    monkeypatch.setattr(blocks, "_tile", shifted)
    arguments = make(rng, **CASES["full"], dtype=np.float32)
    given, named = arrays(arguments)
    walk = blocks.prefill_attention_blocks.__wrapped__
    out = walk(*given, named["first"], named["sink"], window=None, queries=8, tile=16)
    assert not distance(out, oracle(**arguments, window=None)) < 1e-2


def test_auto_is_blocks_on_a_cpu(rng):
    arguments = make(rng, **CASES["full"])
    out = [run(arguments, None, implementation) for implementation in ("auto", "blocks")]
    np.testing.assert_array_equal(*out)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(q=(2, 3, 5, 16)), "5 heads, the keys 2"),
        (dict(keys=(2, 2, 29, 24)), "must be"),
        (dict(values=(2, 2, 28, 32)), "must be"),
        (dict(start=(3,)), "start .3,., live .2,., first .2,. must be .2."),
        (dict(first=(1,)), "must be"),
        (dict(sink=(5,)), "sink .5,. must be .6."),
        (dict(window=None), "first is for windows"),
    ],
)
def test_what_does_not_fit_is_refused(change, what):
    shapes = dict(
        q=(2, 3, 6, 16), keys=(2, 2, 29, 16), values=(2, 2, 29, 32), start=(2,), live=(2,),
        first=(2,), sink=(6,),
    )  # fmt: skip
    given = {
        name: shape if name == "window" else jnp.zeros(shape)
        for name, shape in ({"window": 7} | shapes | change).items()
    }
    with pytest.raises(ValueError, match=what):
        api._check(**given)


def test_an_unknown_implementation_is_refused(rng):
    given, named = arrays(make(rng, **CASES["full"]))
    with pytest.raises(ValueError, match="'fast' is not one of"):
        prefill_attention(*given, **named, implementation="fast")


def test_the_reference_is_plain(rng):
    """It may be called by itself, as the benchmark does."""
    given, named = arrays(make(rng, **CASES["window"]))
    out = prefill_attention_reference(*given, named["first"], 13, named["sink"])
    assert out.shape == (2, 20, 6, 16)
