"""The pieces that target and drafter share: products, RMS norm, rotary embedding, dense MLP."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from mimo_jax.quant import fp8
from mimo_jax.sharding import Parallel, constant, normal, param

INIT_SCALE = 0.02


def linear(
    x: Float[Array, "*rows i"], weight: Float[Array, "o i"], dtype=None
) -> Float[Array, "*rows o"]:
    """x @ weight^T with float32 accumulation; the result has x's dtype, or the one given.

    So has its gradient: left to itself, JAX would multiply float32 matrices backwards.
    """
    return _linear(x, weight, x.dtype if dtype is None else jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x, weight, dtype):
    return _product("...i,oi->...o", x, weight).astype(dtype)


def _linear_forward(x, weight, dtype):
    return _linear(x, weight, dtype), (x, weight)


def _linear_backward(dtype, saved, gradient):
    x, weight = saved
    gradient = gradient.astype(x.dtype)
    of_x = _product("...o,oi->...i", gradient, weight)
    of_weight = _product("...o,...i->oi", gradient, x)
    return of_x.astype(x.dtype), of_weight.astype(weight.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def _product(axes: str, x: Array, y: Array) -> Array:
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


@jax.named_scope("norm")
def rms_norm(
    x: Float[Array, "*rows d"], weight: Float[Array, "d"], epsilon: float
) -> Float[Array, "*rows d"]:
    """x / rms(x) in float32, rounded to x's dtype, then times the weight."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype) * weight


def rope(
    x: Float[Array, "b t n h"], positions: Int32[Array, "b t"], theta: float, rotary: int
) -> Float[Array, "b t n h"]:
    """Rotates the first `rotary` of h dimensions, in pairs (i, i + rotary/2); the others pass."""
    frequencies = theta ** (-jnp.arange(0, rotary, 2, dtype=jnp.float32) / rotary)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x[..., :rotary].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., rotary:]], axis=-1)


@jax.named_scope("embed")
def embed(table: Shaped[Array, "w d"], tokens: Int32[Array, "b t"], parallel: Parallel):
    """Looks up rows of a table whose vocabulary is divided over the devices: [b, t, d]."""
    local = parallel.local(tokens, table.shape[0])
    mine = (local >= 0) & (local < table.shape[0])
    rows = table[jnp.where(mine, local, 0)]
    return parallel.sum(jnp.where(mine[..., None], rows, jnp.zeros((), table.dtype)))


def decoded(
    weight: nnx.Param,
    scale: nnx.Param | None,
    x: Float[Array, "*rows i"],
    unit: int = fp8.TILE,
) -> Float[Array, "*lead r c"]:
    """A weight's values for a product with x, in its dtype if the weight is FP8 and has scales.

    Args:
      weight: FP8 codes, or values that are returned as they are.
      scale: a float32 scale for `unit` rows and 128 columns; None for values.
      x: what the weight will be multiplied with.
      unit: rows that share a scale.
    """
    if scale is None:
        return weight[...]
    # Bound to x, decoding stays inside the loop: XLA would move it out, once and for all, and the
    # decoded weights would be held besides the codes.
    codes, scales, _ = lax.optimization_barrier((weight[...], scale[...], x))
    return fp8.decode(codes, scales, unit, x.dtype)


def tile_scales(rngs: nnx.Rngs, shape, axes, quantized: bool) -> nnx.Param | None:
    """Declares the scales of an FP8 weight, if it is one."""
    return param(rngs, shape, axes, jnp.float32, constant(1.0)) if quantized else None


class RMSNorm(nnx.Module):
    """Root-mean-square norm; the weight multiplies as it is (not 1 + weight)."""

    def __init__(self, size: int, epsilon: float, dtype, rngs: nnx.Rngs):
        self.weight = param(rngs, (size,), (None,), dtype, constant(1.0))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Normalises the last axis."""
        return rms_norm(x, self.weight[...], self.epsilon)


class DenseMLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x). Its width is divided over the devices.

    Args:
      d: size of input and output.
      f: width.
      dtype: of the weights.
      rngs: streams of random keys for the initial values.
      quantized: whether the weights are FP8, with scales beside them, a device's part whole tiles.
    """

    def __init__(self, d: int, f: int, dtype, rngs: nnx.Rngs, quantized: bool = False):
        init, dtype = normal(INIT_SCALE), fp8.CODES if quantized else dtype
        tiles_d, tiles_f = fp8.tiles(d), fp8.tiles(f)
        up_axes, down_axes = (None, "mlp", None), (None, "mlp")
        self.gate_up = param(rngs, (2, f, d), up_axes, dtype, init)
        self.gate_up_scale = tile_scales(rngs, (2, tiles_f, tiles_d), up_axes, quantized)
        self.down = param(rngs, (d, f), down_axes, dtype, init)
        self.down_scale = tile_scales(rngs, (tiles_d, tiles_f), down_axes, quantized)

    @jax.named_scope("dense_mlp")
    def __call__(self, x: Float[Array, "b t d"], parallel: Parallel) -> Float[Array, "b t d"]:
        """Returns the sum over all devices."""
        gate, up = (linear(x, matrix) for matrix in decoded(self.gate_up, self.gate_up_scale, x))
        down = decoded(self.down, self.down_scale, x)
        return parallel.sum(linear(jax.nn.silu(gate) * up, down))
