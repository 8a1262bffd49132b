"""MXFP4 against ml_dtypes' casts, bit for bit, and the promises of mimo_jax.quant.mxfp4."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mimo_jax.errors import MimoError
from mimo_jax.quant import mxfp4

F32 = np.finfo(np.float32)
quick = hypothesis.settings(max_examples=60, deadline=None)


def oracle_codes(w, scales):
    """Unpacked nibbles by ml_dtypes' own rounding of w / 2^(b - 127), in float64."""
    blocks = w.astype(np.float64).reshape(*scales.shape, 32)
    ratio = blocks / np.exp2(scales.astype(np.float64) - 127)[..., None]
    return ratio.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(w.shape) & 15


def oracle_floor(w):
    """Scale bytes by the OCP floor rule, kept in the range that quantize documents."""
    largest = np.abs(w.astype(np.float64)).reshape(*w.shape[:-1], -1, 32).max(axis=-1)
    exponent = np.frexp(largest)[1] - 1
    bytes_ = np.where(largest > 0, exponent - 2 + 127, mxfp4.MIN_SCALE)
    return np.clip(bytes_, mxfp4.MIN_SCALE, mxfp4.MAX_SCALE).astype(np.uint8)


def oracle_decode(codes, scales):
    """float64 values from the definition: sign, magnitude table, power of two."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = np.stack([codes % 16, codes // 16], -1).reshape(*scales.shape, 32)
    values = np.where(nibbles & 8, -1, 1) * table[nibbles & 7]
    return (values * 2.0 ** (scales.astype(np.float64) - 127)[..., None]).reshape(
        *codes.shape[:-1], -1
    )


def fresh_rng():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def any_bits(rng, shape):
    """Finite float32 of all exponents, subnormals among them; every block in a range of its own."""
    top = rng.integers(0, 255, (*shape[:-1], shape[-1] // 32, 1))
    exponent = np.maximum(top - rng.integers(0, 9, (*top.shape[:-1], 32)), 0)
    mantissa = rng.integers(0, 1 << 23, exponent.shape)
    mantissa = np.where(rng.random(exponent.shape) < 0.5, mantissa & 0x700000, mantissa)  # ties
    sign = rng.integers(0, 2, exponent.shape)
    bits = (sign << 31 | exponent << 23 | mantissa).astype(np.uint32)
    return bits.view(np.float32).reshape(shape)


# Few shapes, as each is compiled anew.
odd_shapes = st.sampled_from([(32,), (1, 96), (3, 1, 64), (2, 5, 32), (7, 160), (1, 1, 1, 224)])
finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("shape", [(32,), (3, 96), (2, 5, 7, 160), (1, 4096)])
def test_floor_rule_equals_ml_dtypes(shape, jit):
    w = any_bits(fresh_rng(), shape)
    quantize = jax.jit(mxfp4.quantize) if jit else mxfp4.quantize
    codes, scales = quantize(jnp.asarray(w))
    np.testing.assert_array_equal(scales, oracle_floor(w))
    np.testing.assert_array_equal(mxfp4.unpack(codes), oracle_codes(w, np.asarray(scales)))


@quick
@hypothesis.given(st.data(), odd_shapes)
def test_property_floor_rule(data, shape):
    w = data.draw(hnp.arrays(np.float32, shape, elements=finite_floats))
    codes, scales = jax.jit(mxfp4.quantize)(jnp.asarray(w))
    np.testing.assert_array_equal(scales, oracle_floor(w))
    np.testing.assert_array_equal(jax.jit(mxfp4.unpack)(codes), oracle_codes(w, np.asarray(scales)))
    assert mxfp4.validate(codes, scales) is None


def test_all_float32_midpoints_round_to_even():
    # The floats at and beside every midpoint, at every scale byte that quantize writes.
    bytes_ = np.arange(mxfp4.MIN_SCALE, mxfp4.MAX_SCALE + 1)
    unit = 2.0 ** (bytes_[:, None] - 127.0)
    centre = (np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]) * unit).astype(np.float32)
    near = [np.nextafter(centre, np.float32(0)), centre, np.nextafter(centre, F32.max)]
    largest = np.full((len(bytes_), 11), 4 * unit, np.float32)  # fixes the floor rule's scale
    w = np.concatenate([*near, -largest], axis=1)
    codes, scales = mxfp4.quantize(jnp.asarray(w))
    np.testing.assert_array_equal(scales[:, 0], bytes_)
    np.testing.assert_array_equal(mxfp4.unpack(codes), oracle_codes(w, np.asarray(scales)))


def test_the_midpoint_test_sees_rounding_up(monkeypatch):
    monkeypatch.setattr(mxfp4, "_STEPS_UP", mxfp4._MIDPOINTS - 1)
    mxfp4._nearest.clear_cache()
    try:
        with pytest.raises(AssertionError):
            test_all_float32_midpoints_round_to_even()
    finally:
        mxfp4._nearest.clear_cache()


@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_bfloat16_weights_equal_their_float32(rule):
    w = jnp.asarray(any_bits(fresh_rng(), (5, 224))).astype(jnp.bfloat16)
    if not bool(jnp.isfinite(w).all()):  # rounding to bfloat16 may overflow
        w = jnp.where(jnp.isfinite(w), w, jnp.bfloat16(1))
    wide = np.asarray(w).astype(np.float32)
    for got, expected in zip(
        mxfp4.quantize(w, rule), mxfp4.quantize(jnp.asarray(wide), rule), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_error_minimising_rule_is_the_best_of_three():
    rng = fresh_rng()
    w = rng.standard_normal((61, 352)).astype(np.float32)
    w *= np.exp2(rng.integers(-100, 100, (61, 1))).astype(np.float32)
    codes, scales = mxfp4.quantize(jnp.asarray(w), "mse")
    floor = oracle_floor(w)

    def squared_error(bytes_):
        grid = oracle_codes(w, bytes_).reshape(*bytes_.shape, 16, 2)
        values = oracle_decode(
            (grid[..., 0] | grid[..., 1] << 4).reshape(*w.shape[:-1], -1), bytes_
        )
        return np.square(values - w.astype(np.float64)).reshape(*bytes_.shape, 32).sum(-1)

    errors = np.stack([squared_error((floor.astype(int) + d).astype(np.uint8)) for d in (-1, 0, 1)])
    chosen = squared_error(np.asarray(scales))
    assert (chosen <= errors.min(axis=0) * (1 + 1e-5)).all()
    assert {-1, 0, 1} >= set(np.unique(np.asarray(scales).astype(int) - floor)) > {0}
    assert chosen.sum() < errors[1].sum()
    np.testing.assert_array_equal(mxfp4.unpack(codes), oracle_codes(w, np.asarray(scales)))


@pytest.mark.parametrize("size", [2.0**-149, 2.0**-126, 1e-30, 1.0, 1e30, float(F32.max)])
def test_error_minimising_rule_at_the_ends_of_the_range(size):
    w = np.float32(size) * fresh_rng().uniform(-1, 1, (7, 96)).astype(np.float32)
    codes, scales = jax.jit(mxfp4.quantize, static_argnums=1)(jnp.asarray(w), "mse")
    assert mxfp4.validate(codes, scales) is None
    np.testing.assert_array_equal(mxfp4.unpack(codes), oracle_codes(w, np.asarray(scales)))


def test_zero_blocks_are_zero():
    for rule in mxfp4.RULES:
        codes, scales = mxfp4.quantize(jnp.zeros((3, 64)), rule)
        assert not np.asarray(codes).any()
        assert not np.asarray(mxfp4.dequantize(codes, scales)).any()


def every_code_and_scale():
    """All 16 codes under each scale byte 0..254: codes [255, 16], scales [255, 1]."""
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    packed = (codes[0::2] | codes[1::2] << 4).astype(np.uint8)
    return np.tile(packed, (255, 1)), np.arange(255, dtype=np.uint8)[:, None]


def test_every_code_and_scale_is_exact_in_float64():
    codes, scales = every_code_and_scale()
    np.testing.assert_array_equal(
        mxfp4.dequantize_float64(codes, scales), oracle_decode(codes, scales)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_every_code_and_scale_is_exact_or_refused(dtype, jit):
    codes, scales = every_code_and_scale()
    decode = jax.jit(mxfp4.dequantize, static_argnums=2) if jit else mxfp4.dequantize
    got = np.asarray(decode(jnp.asarray(codes), jnp.asarray(scales), dtype)).astype(np.float64)
    exact = oracle_decode(codes, scales)
    normal = (exact == 0) | ((np.abs(exact) >= F32.tiny) & (np.abs(exact) <= F32.max))
    np.testing.assert_array_equal(got[normal], exact[normal])
    np.testing.assert_array_equal(np.signbit(got[normal]), np.signbit(oracle_signed(codes)[normal]))


def test_validate_refuses_what_is_not_a_normal_float32():
    # Each value alone in its block, so that validate is held to it value by value.
    for byte in [*range(5), 126, 127, 128, *range(250, 255)]:
        for code in range(1, 8):
            codes = np.zeros(16, np.uint8)
            codes[5] = code << 4
            scales = np.array([byte], np.uint8)
            value = oracle_decode(codes, scales)[11]
            refused = mxfp4.validate(codes, scales) is not None
            assert refused == (not F32.tiny <= value <= F32.max), (byte, code)


def oracle_signed(codes):
    """-1 or 1 for the sign bit of each nibble, tiled as every_code_and_scale does."""
    nibbles = np.stack([codes % 16, codes // 16], -1).reshape(codes.shape[0], -1)
    return np.where(nibbles & 8, -1.0, 1.0)


def test_validate_names_the_block_and_what_is_wrong():
    codes = np.full((4, 6, 48), 0x77, np.uint8)
    scales = np.full((4, 6, 3), 120, np.uint8)
    assert mxfp4.validate(codes, scales) is None
    for byte, words in ((255, "nan"), (254, "1.02085e+39"), (0, "scale byte 0")):
        broken = scales.copy()
        broken[2, 5, 1] = byte
        low = codes if byte else np.where(codes, np.uint8(0x11), codes)
        error = mxfp4.validate(low, broken, name="down_proj")
        assert isinstance(error, MimoError)
        assert "down_proj" in str(error) and "(2, 5, 1)" in str(error) and words in str(error)


@quick
@hypothesis.given(hnp.arrays(np.uint8, odd_shapes, elements=st.integers(0, 15)))
def test_property_unpack_undoes_pack(nibbles):
    packed = mxfp4.pack(jnp.asarray(nibbles))
    assert packed.shape == (*nibbles.shape[:-1], nibbles.shape[-1] // 2)
    np.testing.assert_array_equal(packed, nibbles[..., 0::2] + 16 * nibbles[..., 1::2])
    np.testing.assert_array_equal(mxfp4.unpack(packed), nibbles)


@pytest.mark.parametrize("rule", mxfp4.RULES)
@quick
@hypothesis.given(data=st.data(), shape=odd_shapes)
def test_property_fake_quantize_is_quantise_then_dequantise(rule, data, shape):
    w = jnp.asarray(data.draw(hnp.arrays(np.float32, shape, elements=finite_floats)))
    fake_quantize = jax.jit(mxfp4.fake_quantize, static_argnums=1)
    codes, scales = jax.jit(mxfp4.quantize, static_argnums=1)(w, rule)
    expected = jax.jit(mxfp4.dequantize)(codes, scales)
    np.testing.assert_array_equal(fake_quantize(w, rule), expected)
    again = fake_quantize(expected, rule)
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_fake_quantize_passes_gradients_straight_through(rule, dtype):
    rng = fresh_rng()
    w = jnp.asarray(rng.standard_normal((3, 5, 96)), dtype)
    pull = jnp.asarray(rng.standard_normal(w.shape), dtype)

    @jax.jit
    def step(w):
        return jax.value_and_grad(lambda w: (mxfp4.fake_quantize(w, rule) * pull).sum())(w)

    _, gradient = step(w)
    np.testing.assert_array_equal(gradient, pull)
    value = jax.jit(mxfp4.fake_quantize, static_argnums=1)(w, rule)
    assert value.dtype == dtype
    expected = mxfp4.dequantize(*mxfp4.quantize(w, rule), dtype)
    np.testing.assert_array_equal(value, expected)
    mapped = jax.vmap(lambda x: mxfp4.fake_quantize(x, rule))(w)
    np.testing.assert_array_equal(mapped, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [mxfp4.quantize, mxfp4.fake_quantize])
def test_non_finite_weights_are_refused(function, bad):
    w = jnp.ones((3, 64)).at[1, 40].set(bad)
    with pytest.raises(MimoError, match="1 non-finite"):
        function(w)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", mxfp4.RULES)
def test_non_finite_weights_stay_visible_under_jit(rule, bad):
    w = jnp.ones((3, 64)).at[1, 40].set(bad)
    codes, scales = jax.jit(mxfp4.quantize, static_argnums=1)(w, rule)
    assert np.argwhere(np.asarray(scales) == mxfp4.NAN_SCALE).tolist() == [[1, 1]]
    assert "(1, 1)" in str(mxfp4.validate(codes, scales))
    for values in (
        mxfp4.dequantize(codes, scales),
        jax.jit(mxfp4.fake_quantize, static_argnums=1)(w, rule),
    ):
        finite = np.isfinite(np.asarray(values))
        assert not finite[1, 32:].any() and finite.sum() == 3 * 64 - 32


def test_unfit_arguments_are_refused():
    with pytest.raises(MimoError, match="blocks of 32"):
        mxfp4.quantize(jnp.ones((2, 33)))
    with pytest.raises(MimoError, match="dtype float16"):
        mxfp4.quantize(jnp.ones((2, 32), jnp.float16))
    with pytest.raises(MimoError, match="rule='nearest'"):
        mxfp4.fake_quantize(jnp.ones((2, 32)), "nearest")
    with pytest.raises(MimoError, match="odd number"):
        mxfp4.pack(jnp.ones((2, 3), jnp.uint8))
    codes, scales = mxfp4.quantize(jnp.ones((2, 64)))
    with pytest.raises(MimoError, match="do not fit"):
        mxfp4.dequantize(codes, scales[:, :1])
    with pytest.raises(MimoError, match="do not fit"):
        mxfp4.validate(codes, scales[:1])
    with pytest.raises(MimoError, match="float16"):
        mxfp4.dequantize(codes, scales, jnp.float16)
    with pytest.raises(MimoError, match="uint8"):
        mxfp4.validate(np.asarray(codes).astype(np.int32), scales)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_decoding_on_the_host_is_exact(dtype, rng):
    codes = rng.integers(0, 256, (3, 5, 48), dtype=np.uint8)
    scales = rng.integers(mxfp4.MIN_SCALE, mxfp4.MAX_SCALE + 1, (3, 5, 3), dtype=np.uint8)
    scales[0, 0] = (mxfp4.MIN_SCALE, mxfp4.MAX_SCALE, 127)
    values = mxfp4.dequantize_on_host(codes[:, ::2, :], scales[:, ::2], dtype)
    assert values.dtype == dtype
    expected = mxfp4.dequantize_float64(codes[:, ::2], scales[:, ::2])
    assert np.array_equal(values.astype(np.float64), expected)
    assert np.array_equal(np.signbit(values.astype(np.float64)), np.signbit(expected))
