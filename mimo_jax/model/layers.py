"""The pieces that target and drafter share: products, RMS norm, rotary embedding, dense MLP."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from mimo_jax.quant import fp8
from mimo_jax.sharding import Parallel, constant, normal, param
from pallas_kernels import linear as kernels

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


def stored_linear(
    x: Float[Array, "*rows i"],
    weight: Shaped[Array, "o i"],
    scale: Float[Array, "units tiles"] | None,
    unit: int = fp8.TILE,
    dtype=None,
) -> Float[Array, "*rows o"]:
    """x @ weight^T of a weight as it is held: values, or FP8 codes that are decoded here.

    Args:
      x: rows.
      weight: values, or FP8 codes with `scale`.
      scale: float32, for `unit` rows and 128 columns each.
      unit: rows that share a scale.
      dtype: of the result; by default x's.
    """
    if scale is not None:
        # Bound to x, decoding stays inside the loop that x is of: XLA would move it out, once and
        # for all, and the decoded weights would be held besides the codes. It drops an operand of
        # the barrier whose result is not used: so x is taken from there.
        weight, scale, x = lax.optimization_barrier((weight, scale, x))
        weight = fp8.decode(weight, scale, unit, x.dtype)
    return linear(x, weight, dtype)


def few_token_linear(
    x: Float[Array, "b t i"],
    weight: Shaped[Array, "*lead i"],
    scale: Float[Array, "*units tiles"] | None = None,
    *,
    unit: int = fp8.TILE,
    norm: "RMSNorm | None" = None,
    residual: Float[Array, "b t o"] | None = None,
    ahead: nnx.Param | None = None,
    dtype=None,
) -> Float[Array, "b t o"]:
    """residual + norm(x) @ weight^T, for the few rows of a decoded block.

    In programs for a Hopper GPU that is one kernel, which streams the weights as they are stored;
    elsewhere, and for more rows or other types, XLA's own products.

    Args:
      x: rows.
      weight: values, or FP8 codes with `scale`; all but the last dimension are outputs.
      scale: for `unit` rows and 128 columns each.
      unit: rows that share a scale.
      norm: of x.
      residual: added to the product.
      ahead: weights that a later kernel reads, brought nearer meanwhile.
      dtype: of the result; by default x's.
    """
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    weight = weight.reshape(-1, weight.shape[-1])
    scale = None if scale is None else scale.reshape(-1, scale.shape[-1])
    epsilon = 0.0 if norm is None else norm.epsilon

    def elsewhere(x, weight, scale, norm, residual):
        x = x if norm is None else rms_norm(x, norm, epsilon)
        if residual is None:
            return stored_linear(x, weight, scale, unit, dtype)
        y = residual.astype(jnp.float32) + stored_linear(x, weight, scale, unit, jnp.float32)
        return y.astype(dtype)

    norm = None if norm is None else norm.weight[...]
    if _fits(x, weight, scale, unit, residual):
        rows = x.reshape(-1, x.shape[-1])
        flat = None if residual is None else residual.reshape(-1, residual.shape[-1])
        options = dict(norm=norm, epsilon=epsilon, residual=flat, out_dtype=dtype)
        options |= dict(ahead=value(ahead))
        y = kernels.linear(rows, weight, scale, **options, elsewhere=elsewhere)
        return y.reshape(*x.shape[:-1], -1)
    return elsewhere(x, weight, scale, norm, residual)


def _fits(x, weight, scale, unit, residual) -> bool:
    """Whether the kernel may be asked; what it takes besides, it knows itself."""
    few = math.prod(x.shape[:-1]) <= kernels.MOST_TOKENS and x.dtype == jnp.bfloat16
    tiles = scale is None or (unit in kernels.UNITS and weight.shape[0] % unit == 0)
    return few and tiles and (residual is None or residual.dtype == jnp.bfloat16)


@jax.named_scope("norm")
def rms_norm(
    x: Float[Array, "*rows d"], weight: Float[Array, "d"], epsilon: float
) -> Float[Array, "*rows d"]:
    """x / rms(x) in float32, rounded to x's dtype, then times the weight."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype) * weight


def rotary_angles(
    positions: Int32[Array, "b t"], theta: float, rotary: int
) -> tuple[Float[Array, "b t r"], Float[Array, "b t r"]]:
    """Cosines and sines for `rope`, one for each pair."""
    frequencies = theta ** (-jnp.arange(0, rotary, 2, dtype=jnp.float32) / rotary)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rope(
    x: Float[Array, "b t n h"], positions: Int32[Array, "b t"], theta: float, rotary: int
) -> Float[Array, "b t n h"]:
    """Rotates the first `rotary` of h dimensions, in pairs (i, i + rotary/2); the others pass."""
    cos, sin = (x[:, :, None] for x in rotary_angles(positions, theta, rotary))
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


def value(variable: nnx.Param | None) -> Array | None:
    """The array of a parameter that a model may not have."""
    return None if variable is None else variable[...]


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
    def decode(self, h: Float[Array, "b t d"], norm: RMSNorm, parallel: Parallel, ahead=None):
        """h + down(silu(gate x) * up x) with x = norm(h), for the few rows of a decoded block."""
        scale = value(self.gate_up_scale)
        # In whole tiles, gate and up are one matrix; else XLA decodes them one by one.
        if scale is not None and self.gate_up.shape[1] % fp8.TILE:
            return h + self(norm(h), parallel)
        both = few_token_linear(h, self.gate_up[...], scale, norm=norm, ahead=self.down)
        gate, up = jnp.split(both, 2, axis=-1)
        scale = value(self.down_scale)
        hidden = jax.nn.silu(gate) * up
        return parallel.add(
            h,
            lambda residual: few_token_linear(
                hidden, self.down[...], scale, residual=residual, ahead=ahead
            ),
        )

    @jax.named_scope("dense_mlp")
    def __call__(self, x: Float[Array, "b t d"], parallel: Parallel) -> Float[Array, "b t d"]:
        """Returns the sum over all devices."""
        both, scales = self.gate_up[...], value(self.gate_up_scale)
        scales = (None, None) if scales is None else scales
        gate, up = (stored_linear(x, both[i], scales[i]) for i in range(2))
        down, scale = self.down[...], value(self.down_scale)
        return parallel.sum(stored_linear(jax.nn.silu(gate) * up, down, scale))
