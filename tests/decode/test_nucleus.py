"""Top-k and top-p without sorting, against sorting; on shards, against the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_request
from jax.sharding import PartitionSpec
from oracles import sampling_sorted
from scipy import stats

from mimo_jax.decode.nucleus import LIMB, WIDEST, Bracket, _carried, _share, kept, keys
from mimo_jax.decode.sampling import choose, scores
from mimo_jax.errors import MimoError
from mimo_jax.sharding import Parallel

NEAR = 1e-6
"""Shares of mass so close to top_p may be taken for it: the sorted sums are float32's."""
SHAPES = [(1, 2, 3), (3, 4, 39), (2, 5, 8), (2, 3, 2601)]
TOP_P = [1e-4, 0.05, 0.5, 0.9, 0.999, 1.0]
run_kept = jax.jit(kept, static_argnames=("parallel", "thresholds"))


def draw_logits(rng, shape) -> np.ndarray:
    """Logits of many kinds: smooth, with many or only ties, -inf, one-hot, hot and cold."""
    normal = rng.standard_normal(shape)
    kinds = [
        lambda: normal * rng.choice([0.3, 2.0, 8.0]),
        lambda: np.round(normal * 3) / 2,
        lambda: np.full(shape, rng.normal()),
        lambda: np.where(rng.random(shape) < 0.5, -np.inf, normal * 2),
        lambda: np.where(np.arange(shape[-1]) == rng.integers(shape[-1]), 0.0, -np.inf),
        lambda: np.where(rng.random(shape) < 0.3, 0.0, -0.0) + np.round(normal),
        lambda: normal / 1e-4,
        lambda: normal / 1e6,
        lambda: 1000.0 + normal,
        lambda: np.sort(normal, axis=-1) * 4,
    ]
    logits = np.broadcast_to(kinds[rng.integers(len(kinds))](), shape).astype(np.float32)
    # Never nothing but -inf.
    logits[..., 0] = np.where(np.isneginf(logits).all(axis=-1), 1.0, logits[..., 0])
    return logits


def draw(rng, shape):
    """Logits, top_p and top_k."""
    b, _, w = shape
    top_p = rng.choice(TOP_P, b).astype(np.float32)
    top_k = rng.choice([0, 1, 2, w // 2, w - 1, w, w + 7, 1000], b).astype(np.int32)
    return draw_logits(rng, shape), top_p, np.maximum(top_k, 0)


@pytest.mark.parametrize(("thresholds", "shapes"), [(None, SHAPES), (15, SHAPES[-1:])])
def test_kept_as_by_sorting(thresholds, shapes, rng):
    compared, left = 0, 0
    for number in range(240):
        logits, top_p, top_k = draw(rng, shapes[number % len(shapes)])
        stays = np.asarray(run_kept(logits, top_p, top_k, thresholds=thresholds))
        for i, j in np.ndindex(logits.shape[:2]):
            lowest, near = sampling_sorted.lowest_kept(logits[i, j], top_p[i], top_k[i])
            if near > NEAR:
                np.testing.assert_array_equal(stays[i, j], logits[i, j] >= lowest)
                compared += 1
            left += near <= NEAR
    # A share is near by chance in some 2e-6 of the tokens, or because equal tokens divide evenly.
    assert compared > 1000 > 2 * left


def test_kept_as_by_the_sorting_program(rng):
    """The program that sampled before: its sums are float32's, and near ones may differ."""
    sort = jax.jit(sampling_sorted.truncate)
    for _ in range(60):
        logits, top_p, top_k = draw(rng, SHAPES[1])
        stays = np.asarray(run_kept(logits, top_p, top_k))
        before = np.asarray(sort(logits, top_p, top_k))
        for i, j in np.ndindex(logits.shape[:2]):
            if sampling_sorted.lowest_kept(logits[i, j], top_p[i], top_k[i])[1] > 1e-5:
                finite = np.isfinite(logits[i, j])
                np.testing.assert_array_equal(
                    stays[i, j][finite], np.isfinite(before[i, j][finite])
                )


def test_equal_tokens_stay_or_go_together_and_one_always_stays():
    def stay(row, top_p=1.0, top_k=0):
        row = np.asarray([[row]], np.float32)
        return np.asarray(run_kept(row, np.float32([top_p]), np.int32([top_k])))[0, 0].tolist()

    assert stay([1, 3, 3, 0], top_k=1) == [False, True, True, False]
    assert stay([1, 3, 2], top_p=0.0) == [False, True, False]
    assert stay([1, 3, 3], top_p=0.0) == [False, True, True]
    assert stay([0, 0, 0, 0], top_p=0.5) == [True] * 4
    # Half of the mass lies before the second token, which is not less than half.
    assert stay([0, 0, 5, -np.inf], top_p=1e-4) == [False, False, True, False]
    # Of three equal tokens two are wanted: the first has a third of the mass that counts, not a
    # quarter.
    e = float(np.log(2.0))
    assert stay([e, 0, 0, 0, -9], top_p=0.49, top_k=3) == [True, False, False, False, False]
    assert stay([e, 0, 0, 0, -9], top_p=0.51, top_k=3) == [True, True, True, True, False]
    assert stay([np.inf, 0, np.inf], top_p=0.9) == [True, False, True]


def test_keys_are_in_the_order_of_the_numbers(rng):
    x = np.concatenate([rng.normal(size=99), [np.inf, -np.inf, 0.0, 3e38, -3e38, 1e-30, -1e-30]])
    x = np.sort(x.astype(np.float32))
    ordered = np.asarray(keys(jnp.asarray(x))).astype(np.int64)
    assert (np.diff(ordered) > 0).all()
    assert keys(jnp.float32(-0.0)) == keys(jnp.float32(0.0))


def as_numbers(limbs) -> list[int]:
    """Three limbs, the highest first, as Python's integers."""
    columns = zip(*(np.asarray(limb).tolist() for limb in limbs), strict=True)
    return [(high << 2 * LIMB) + (middle << LIMB) + low for high, middle, low in columns]


def test_a_share_of_a_mass_is_exact(rng):
    """Against whole numbers as great as the limbs of `WIDEST` tokens sum up to."""
    greatest = WIDEST * ((1 << LIMB) - 1)
    high, middle, low = rng.integers(0, greatest, (3, 400), np.uint32, endpoint=True)
    middle[:2], low[1:3] = greatest, greatest
    high = (high >> rng.integers(1, 30, 400).astype(np.uint32)).astype(np.uint32)
    p = rng.choice([rng.random(400), np.full(400, 0.95), rng.random(400) * 1e-3], axis=0)
    p = p.astype(np.float32)
    total = _carried([high, middle, low])
    whole = as_numbers([high, middle, low])
    assert as_numbers(total) == whole
    shares = as_numbers(jax.jit(_share)(total, p))
    for number, share, part in zip(whole, shares, p, strict=True):
        # p to 36 bits below the point, and three digits' roundings.
        exact = number * int(np.float64(part) * 2.0**36)
        assert exact - (3 << 36) <= share << 36 <= exact


def test_a_bracket_closes_on_every_bound(rng):
    """Every width from 2 on, with the fewest thresholds there are."""
    for width in [*range(2, 40), 2**24, 2**32 - 2**24]:
        low, bound = 5, 5 + int(rng.integers(1, width + 1))
        bracket = Bracket(*(jnp.full((1, 1), n, jnp.uint32) for n in (low, low + width, 9, 0)))
        for _ in range(40):
            if not bracket.open.any():
                break
            at = bracket.thresholds(3)
            true = at >= jnp.uint32(bound)
            bracket = bracket.split(at, jnp.where(true, jnp.uint32(0), jnp.uint32(9)), true)
        assert int(bracket.high[0, 0]) == bound and int(bracket.low[0, 0]) == bound - 1


@functools.cache
def on_mesh(devices: int, function):
    """The function of (logits, *rest) on vocabulary shards; scores come back whole."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("model",))
    split, whole = PartitionSpec(None, None, "model"), PartitionSpec()
    sharded = functools.partial(function, parallel=Parallel("model"))
    out = whole if function is choose else split
    return jax.jit(
        jax.shard_map(
            lambda *args: sharded(*args),
            mesh=mesh,
            in_specs=(split, whole, whole),
            out_specs=out,
            check_vma=False,
        )
    )


@pytest.mark.parametrize(
    "devices", [1, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_shards_have_the_bits_of_the_whole(devices, rng):
    shape = (3, 4, 8 * 37)
    whole = jax.jit(sampling_sorted.scores)
    for _ in range(12):
        logits, top_p, top_k = draw(rng, shape)
        request = make_request(
            3, limit=9, temperature=rng.choice([0.7, 1.0, 1.7], 3), top_p=top_p, top_k=top_k,
            seed=int(rng.integers(2**32)), sequence=rng.integers(0, 99, 3),
        )  # fmt: skip
        positions = rng.integers(0, 2**20, (3, 1)) + np.arange(4)
        args = jnp.asarray(logits), jnp.asarray(positions, jnp.int32), request
        alone = np.asarray(jax.jit(scores)(*args))
        np.testing.assert_array_equal(np.asarray(on_mesh(devices, scores)(*args)), alone)
        expected = np.argmax(alone, axis=-1)
        np.testing.assert_array_equal(np.asarray(on_mesh(devices, choose)(*args)), expected)
        # The noise is the sorted program's, too, for all tokens that both keep.
        both = np.isfinite(alone) & np.isfinite(np.asarray(whole(*args)))
        assert both.any(axis=-1).all()
        np.testing.assert_allclose(alone[both], np.asarray(whole(*args))[both], 1e-6, 2e-6)


@pytest.mark.parametrize("restricted", [False, True])
def test_sampled_tokens_have_the_exact_distribution(restricted, rng):
    """40,000 draws; that a fair sampler fails has a probability of 1e-12."""
    w, draws = 13, 40_000
    row = rng.permutation(np.linspace(-2.2, 2.2, w)) + 0.1 * rng.random(w)
    row = row.astype(np.float32)
    temperature, top_p, top_k = (0.8, 0.9, 9) if restricted else (1.3, 1.0, 0)
    scaled = np.float64(row / np.float32(temperature))
    stays = np.asarray(
        run_kept(np.float32(scaled)[None, None], np.float32([top_p]), np.int32([top_k]))
    )[0, 0]
    exact = np.where(stays, np.exp(scaled - scaled.max()), 0.0)
    exact /= exact.sum()
    request = make_request(
        1, limit=9, temperature=temperature, top_p=top_p, top_k=top_k, seed=int(rng.integers(2**32))
    )
    logits = jnp.broadcast_to(jnp.asarray(row), (1, draws, w))
    positions = jnp.arange(draws, dtype=jnp.int32)[None]
    tokens = np.asarray(jax.jit(choose, static_argnums=3)(logits, positions, request, Parallel()))
    observed = np.bincount(tokens[0], minlength=w).astype(float)
    assert observed[exact == 0].sum() == 0
    assert p_value(observed, exact * draws) > 1e-12
    slightly = np.where(stays, np.exp((scaled - scaled.max()) * 1.15), 0.0)
    assert p_value(observed, slightly / slightly.sum() * draws) < 1e-12


def p_value(observed, expected) -> float:
    """Of the chi-square test, cells with an expectation below 20 taken together."""
    rare = expected < 20
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    return stats.chi2.sf(np.sum((observed - expected) ** 2 / expected), df=len(expected) - 1)


def test_a_vocabulary_that_is_too_wide_is_refused():
    args = (1, 1, WIDEST + 1), (1,), (1,)
    types = jnp.float32, jnp.float32, jnp.int32
    shapes = [jax.ShapeDtypeStruct(*each) for each in zip(args, types, strict=True)]
    with pytest.raises(MimoError, match=f"at most {WIDEST}"):
        jax.eval_shape(kept, *shapes)
