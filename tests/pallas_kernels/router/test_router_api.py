"""What the router's public function accepts, refuses and falls back to, in words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from router_cases import choose, close_calls, normed, random_case, scores

from pallas_kernels.router import new_counter, route

NEW_JAX = jax.__version_info__ >= (0, 11, 2)
OPTIONS = dict(choices=5, epsilon=1e-5, normalise=True, scale=1.5)


@pytest.fixture
def case(rng):
    return random_case(rng, 7, 256, 21, True)


def call(case, implementation="auto"):
    """The router under jit."""
    arrays = [None if part is None else jnp.asarray(part) for part in case]
    given = dict(live=arrays[4], counter=new_counter())
    run = functools.partial(route, **OPTIONS, implementation=implementation)
    return jax.jit(run)(*arrays[:4], **given)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_cpu_runs_the_reference(implementation, case):
    h, norm, weight, bias, live = case
    found = call(case, implementation)
    x = normed(h, norm, 1e-5)
    # XLA leaves out roundings to bfloat16 between what it fuses: of x for the scores, too.
    np.testing.assert_allclose(np.float32(found.x), np.float32(x), rtol=2**-6, atol=2**-12)
    exact, ids = scores(x, weight), np.asarray(found.ids)
    assert (ids[~live] == -1).all()
    best, weights = choose(exact, bias, 5, True, 1.5)
    assert close_calls(exact, bias, np.where(live[:, None], ids, best), 0.01).all()
    same = (ids == best).all(1)
    np.testing.assert_allclose(np.asarray(found.weights)[same], weights[same], rtol=0.02)


def test_without_live_all_rows_choose(case):
    assert (np.asarray(call((*case[:4], None)).ids) >= 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(h=np.float32), "rows and norm in bfloat16, .* not float32, bfloat16, float32"),
        (dict(t=17), "takes 1 to 16 tokens, not 17"),
        (dict(d=192), "rows that can be cut among warps, not of 192"),
        (dict(counter=None), r"not none: make one with new_counter\(\)"),
    ],
)
def test_the_kernel_by_name_says_what_it_cannot_take(change, words, rng):
    t, d = change.get("t", 3), change.get("d", 256)
    h, norm, weight, bias, *_ = map(jnp.asarray, random_case(rng, t, d, 21, True))
    counter = change.get("counter", new_counter())
    with pytest.raises(ValueError, match=words):
        route(
            *(h.astype(change.get("h", h.dtype)), norm, weight, bias),
            **OPTIONS,
            counter=counter,
            implementation="mosaic_gpu",
        )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU says")
def test_the_kernel_by_name_refuses_a_cpu_in_words(case):
    words = "this program is for cpu" if NEW_JAX else "needs jax >= 0.11.2, on Python 3.12"
    with pytest.raises(NotImplementedError, match=words):
        call(case, "mosaic_gpu")


def test_what_means_nothing_is_refused(case):
    h, norm, weight, bias, _ = map(jnp.asarray, case)
    with pytest.raises(ValueError, match=r"bias is bfloat16 \(21,\); it must be float32 \[21\]"):
        route(h, norm, weight, bias.astype(jnp.bfloat16), **OPTIONS)
    with pytest.raises(ValueError, match="choices=22 is not 1 to 21"):
        route(h, norm, weight, bias, **OPTIONS | dict(choices=22))
    with pytest.raises(ValueError, match="implementation='fast'"):
        route(h, norm, weight, bias, **OPTIONS, implementation="fast")
