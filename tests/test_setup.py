"""The tests' own ground: devices, strictness, checked annotations, comparisons that can fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import RELATIVE_NORM, assert_close, relative_norm

from pallas_kernels import mxfp4


def test_virtual_devices():
    if jax.default_backend() != "cpu":
        pytest.skip("on real devices")
    assert jax.device_count() == 8


def test_promotion_is_strict():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)


def test_annotations_are_checked():
    codes = jnp.ones((3, 16), jnp.int8)
    with pytest.raises(Exception, match="codes"):
        mxfp4.decode(codes, jnp.ones((3, 1), jnp.uint8))


@pytest.mark.parametrize("kind", RELATIVE_NORM)
def test_comparison_accepts_and_refuses(rng, kind):
    ref = rng.normal(size=(5, 7))
    noise = rng.normal(size=ref.shape)
    noise *= RELATIVE_NORM[kind] * np.linalg.norm(ref) / np.linalg.norm(noise)
    assert_close(ref + 0.9 * noise, ref, kind)
    with pytest.raises(AssertionError, match="relative norm"):
        assert_close(ref + 1.1 * noise, ref, kind)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_comparison_refuses_what_is_not_finite(rng, value):
    ref = rng.normal(size=11)
    bad = ref.copy()
    bad[rng.integers(11)] = value
    for out, reference in ((bad, ref), (ref, bad), (bad, bad)):
        with pytest.raises(AssertionError, match="not finite"):
            assert_close(out, reference, "float32")


def test_comparison_refuses_other_shapes_and_nothing(rng):
    ref = rng.normal(size=(3, 1))
    with pytest.raises(AssertionError, match="shape"):
        assert_close(ref.T, ref, "float32")
    with pytest.raises(AssertionError, match="nothing"):
        assert_close(np.ones((0, 2)), np.ones((0, 2)), "float32")


def test_relative_norm_beside_zero():
    assert relative_norm(np.zeros(3), np.zeros(3)) == 0
    assert relative_norm(np.ones(3), np.zeros(3)) == np.inf
