"""FP8 tiles against float64, every code; what cannot be trusted; FP8 weights inside the model."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model
from tolerances import assert_close

from mimo_jax.decode.program import make_plan
from mimo_jax.errors import MimoError
from mimo_jax.model.attention import Attention
from mimo_jax.model.layers import DenseMLP
from mimo_jax.quant import fp8
from mimo_jax.sharding import Parallel, make_mesh

E4M3 = ml_dtypes.float8_e4m3fn
FINITE = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)


def random_tiles(rng, shape, unit):
    """Random finite codes, and scales that are no powers of two."""
    codes = rng.choice(FINITE, shape).view(E4M3)
    tiles = (*shape[:-2], -(-shape[-2] // unit), -(-shape[-1] // 128))
    return codes, np.exp(rng.uniform(-9, 3, tiles)).astype(np.float32)


def product(codes, scales, unit):
    """Code times scale in float64, element by element."""
    out = np.empty(codes.shape)
    for at in np.ndindex(codes.shape):
        *lead, row, column = at
        scale = scales[(*lead, row // unit, column // 128)]
        out[at] = np.float64(codes[at]) * np.float64(scale)
    return out


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_decoding_is_the_rounded_product_on_host_and_device(dtype, rng):
    codes, scales = random_tiles(rng, (2, 70, 150), 32)
    exact = product(codes, scales, 32)
    # One rounding to float32, and one to the dtype.
    expected = exact.astype(np.float32).astype(dtype)
    host = fp8.decode_on_host(codes, scales, 32, dtype)
    device = jax.jit(fp8.decode, static_argnums=(2, 3))(codes, scales, 32, dtype)
    assert host.dtype == device.dtype == expected.dtype
    np.testing.assert_array_equal(host, expected)
    np.testing.assert_array_equal(np.asarray(device), expected)


def test_rounding_survives_a_product_in_float32(rng):
    """XLA may leave out a conversion to bfloat16 and back; then weights would not be the stored."""
    codes, scales = random_tiles(rng, (64, 128), 64)
    x = rng.standard_normal((3, 128)).astype(ml_dtypes.bfloat16)

    @jax.jit
    def at_use(x, codes, scales):
        w = fp8.decode(codes, scales, 64, jnp.bfloat16)
        return jnp.einsum("ti,oi->to", x, w, preferred_element_type=jnp.float32)

    @jax.jit
    def at_load(x, w):
        return jnp.einsum("ti,oi->to", x, w, preferred_element_type=jnp.float32)

    decoded = fp8.decode_on_host(codes, scales, 64, ml_dtypes.bfloat16)
    assert_close(at_use(x, codes, scales), at_load(x, decoded), "float32")


def test_the_limits_of_scales_keep_weights_normal():
    codes = np.array([[0x01, 0x7E]], np.uint8).view(E4M3)  # 2^-9 and 448
    for scale in (fp8.MIN_SCALE, fp8.MAX_SCALE):
        scales = np.array([[scale]], np.float32)
        assert fp8.validate(codes, scales) is None
        for dtype in (np.float32, ml_dtypes.bfloat16):
            values = fp8.decode_on_host(codes, scales, 1, dtype).astype(np.float64)
            assert np.isfinite(values).all()
            assert (values >= np.finfo(np.float32).tiny).all()
            on_device = jax.jit(fp8.decode, static_argnums=(2, 3))(codes, scales, 1, dtype)
            assert np.array_equal(np.asarray(on_device).astype(np.float64), values)


@pytest.mark.parametrize("quantize", [fp8.quantize, fp8.quantize_on_device])
@pytest.mark.parametrize("unit", [128, 64, 3])
def test_quantising_reaches_448_and_errs_by_a_sixteenth(unit, quantize, rng):
    size = np.exp(rng.uniform(-3, 3, (2, 150, 140)))
    w = (rng.standard_normal((2, 150, 140)) * size).astype(np.float32)
    w[1, :unit, 128:] = 0
    given = w if quantize is fp8.quantize else jnp.asarray(w)
    codes, scales = map(np.asarray, quantize(given, unit))
    assert scales.dtype == np.float32 and codes.dtype == E4M3
    magnitudes = np.abs(codes.astype(np.float32))
    for tile in np.ndindex(scales.shape):
        lead, i, j = tile
        at = (lead, slice(i * unit, (i + 1) * unit), slice(j * 128, (j + 1) * 128))
        zero = not w[at].any()
        assert magnitudes[at].max() == (0 if zero else 448)
        error = np.abs(product(codes[at][None], scales[tile].reshape(1, 1, 1), 999)[0] - w[at])
        # Half a step of three bits of mantissa; below 2^-6 steps are 2^-9 wide.
        assert (error <= np.maximum(np.abs(w[at]) / 16, scales[tile] * 2**-10) * 1.0001).all()
    assert fp8.validate(codes, scales) is None


def test_quantising_what_is_quantised_changes_nothing(rng):
    codes, scales = fp8.quantize(rng.standard_normal((130, 260)).astype(np.float32))
    values = fp8.decode_on_host(codes, scales, 128, np.float32)
    again, same = fp8.quantize(values)
    assert np.array_equal(again.view(np.uint8) & 0x7F, codes.view(np.uint8) & 0x7F)
    np.testing.assert_allclose(same, scales, rtol=1e-6)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_is_refused(code, rng):
    codes, scales = random_tiles(rng, (4, 5), 128)
    codes.view(np.uint8)[2, 3] = code
    error = fp8.validate(codes, scales, "layer 7")
    assert "layer 7: the code at (2, 3) is NaN; 1 such" in str(error)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e-38, 1e38])
def test_a_bad_scale_is_refused(scale, rng):
    codes, scales = random_tiles(rng, (130, 5), 128)
    scales[1, 0] = scale
    assert f"the scale at (1, 0) is {np.float32(scale):g}" in str(fp8.validate(codes, scales))


@pytest.mark.parametrize(
    ("w", "words"),
    [
        (np.full((2, 2), np.inf, np.float32), "4 non-finite"),
        (np.ones((2, 2), np.float64), "float64"),
        (np.ones(2, np.float32), r"\(2,\)"),
    ],
)
def test_weights_that_cannot_be_quantised(w, words):
    with pytest.raises(MimoError, match=words):
        fp8.quantize(w)


def test_a_mesh_that_would_cut_a_tile_is_refused():
    config = tiny_model(np.random.default_rng(0), 4, intermediate_size=768)
    make_plan(config, None, make_mesh(2), fp8=True, dtype=jnp.float32)
    make_plan(config, None, make_mesh(4), fp8=False, dtype=jnp.float32)
    with pytest.raises(MimoError, match=r"down .* into whole FP8 tiles of 128.*\[1, 2, 3, 6\]"):
        make_plan(config, None, make_mesh(4), fp8=True, dtype=jnp.float32)


def test_modules_decode_at_use_what_would_be_decoded_at_load(rng):
    """Attention's projection, and a dense MLP."""
    shapes = dataclasses.replace(
        tiny_model(rng, 1).attention(0), hidden_size=200, head_dim=48, v_head_dim=32
    )
    kept = {
        "attention": Attention(shapes, shapes.num_kv_heads, jnp.bfloat16, nnx.Rngs(0), True),
        "mlp": DenseMLP(200, 300, jnp.bfloat16, nnx.Rngs(0), True),
    }
    weights = (("attention", "qkv", 16), ("mlp", "gate_up", 128), ("mlp", "down", 128))
    for module, name, unit in weights:
        shape = getattr(kept[module], name).shape
        codes, scales = random_tiles(rng, shape, unit)
        assert getattr(kept[module], f"{name}_scale").shape == scales.shape
        getattr(kept[module], name).set_value(jnp.asarray(codes))
        getattr(kept[module], f"{name}_scale").set_value(jnp.asarray(scales / 100))
    decoded = copy.deepcopy(kept)
    for module, name, unit in weights:
        weight, scale = (getattr(decoded[module], n) for n in (name, f"{name}_scale"))
        values = fp8.decode_on_host(
            *map(np.asarray, (weight[...], scale[...])), unit, ml_dtypes.bfloat16
        )
        weight.set_value(jnp.asarray(values))
        setattr(decoded[module], f"{name}_scale", None)
    x = jnp.asarray(rng.standard_normal((1, 5, 200)), jnp.bfloat16)
    run = nnx.jit(
        lambda m, x: (
            m["attention"].project(x, jnp.arange(5, dtype=jnp.int32)[None]),
            m["mlp"](x, Parallel()),
        )
    )
    ours, theirs = jax.tree.leaves(run(kept, x)), jax.tree.leaves(run(decoded, x))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, "bfloat16")


def test_dataclasses_know_their_unit():
    config = tiny_model(np.random.default_rng(0), 1)
    real = dataclasses.replace(config.attention(0), head_dim=192, v_head_dim=128)
    assert real.scale_unit == 64
    assert dataclasses.replace(real, head_dim=20, v_head_dim=12).scale_unit == 4
