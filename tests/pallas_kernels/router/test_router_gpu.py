"""The router on a real GPU: right choices, the same bits whatever is around."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_memory import poison
from router_cases import choose, close_calls, normed, random_case, scores

from pallas_kernels.choice import kernel_absence
from pallas_kernels.router import new_counter, route
from pallas_kernels.router.shapes import SHAPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(kernel_absence()), reason=str(kernel_absence())),
]
TIE = 1e-6
OPTIONS = dict(epsilon=1e-5, implementation="mosaic_gpu")


def make(rng, name, t):
    """Arrays of the host, a function of rows, and the counter."""
    shape = SHAPES[name]
    case = random_case(rng, t, shape.d, shape.e, shape.wide)
    _, norm, weight, bias, _ = map(jnp.asarray, case)
    run = jax.jit(functools.partial(route, choices=shape.c, **OPTIONS))
    counter = new_counter()

    def call(h, live=None):
        return run(jnp.asarray(h), norm, weight, bias, live=live, counter=counter)

    return case, call, counter


def same(a, b, slot, row):
    """Whether all outputs of two rows have the same bits."""
    return all(
        np.array_equal(np.asarray(x)[slot], np.asarray(y)[row]) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("t", [1, 8, 13])
def test_matches_float64(name, t, rng):
    (h, norm, weight, bias, live), call, counter = make(rng, name, t)
    poison()
    found = call(h, jnp.asarray(live))
    x = np.asarray(found.x)
    assert (x != normed(h, norm, 1e-5)).mean() < 2e-3
    exact, c = scores(x, weight), SHAPES[name].c
    ids = np.asarray(found.ids)
    assert (ids[~live] == -1).all()
    best, weights = choose(exact, bias, c, True, 1.0)
    assert close_calls(exact, bias, np.where(live[:, None], ids, best), TIE).all()
    equal = (ids == best).all(1)
    np.testing.assert_allclose(np.asarray(found.weights)[equal], weights[equal], rtol=1e-5)
    assert int(counter[0]) == 0


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_fifty_runs_give_the_same_bits(name, rng):
    (h, *_), call, _ = make(rng, name, 8)
    first = call(h)
    for _ in range(50):
        poison()
        assert same(call(h), first, slice(None), slice(None))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_row_keeps_its_bits_among_any_rows(name, rng):
    (h, *_), call, _ = make(rng, name, 8)
    first = call(h)
    for t in range(1, 17):
        row, slot = rng.integers(8), rng.integers(t)
        others = random_case(rng, t, SHAPES[name].d, 1, False)
        others[0][slot] = h[row]
        assert same(call(others[0]), first, slot, row)


def test_ties_go_to_the_lowest_id(rng):
    shape = SHAPES["pro"]
    (h, norm, weight, *_), _, _ = make(rng, "pro", 8)
    weight = jnp.asarray(weight[rng.integers(0, 40, shape.e)])
    bias = jnp.full(shape.e, 0.25)
    found = route(
        *map(jnp.asarray, (h, norm)), weight, bias, choices=12, **OPTIONS, counter=new_counter()
    )
    exact = scores(np.asarray(found.x), np.asarray(weight)).astype(np.float32)
    for ids, row in zip(np.asarray(found.ids), exact, strict=True):
        groups = [np.flatnonzero(np.abs(row - row[i]) < 1e-7) for i in ids]
        for i, group in zip(ids, groups, strict=True):
            assert set(group[group < i]) <= set(ids)
