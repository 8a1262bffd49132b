"""The pieces that target and drafter share: products, RMS norm, rotary embedding, dense MLP."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from mimo_jax.sharding import Parallel, constant, normal, param

INIT_SCALE = 0.02


def linear(x: Float[Array, "*rows i"], weight: Float[Array, "o i"]) -> Float[Array, "*rows o"]:
    """x @ weight^T with float32 accumulation; the result has x's dtype."""
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32).astype(
        x.dtype
    )


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


def embed(table: Shaped[Array, "w d"], tokens: Int32[Array, "b t"], parallel: Parallel):
    """Looks up rows of a table whose vocabulary is divided over the devices: [b, t, d]."""
    local = tokens - parallel.index * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    rows = table[jnp.where(mine, local, 0)]
    return parallel.sum(jnp.where(mine[..., None], rows, jnp.zeros((), table.dtype)))


class RMSNorm(nnx.Module):
    """Root-mean-square norm; the weight multiplies as it is (not 1 + weight)."""

    def __init__(self, size: int, epsilon: float, dtype, rngs: nnx.Rngs):
        self.weight = param(rngs, (size,), (None,), dtype, constant(1.0))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Normalises the last axis."""
        return rms_norm(x, self.weight[...], self.epsilon)


class DenseMLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x). Its width is divided over the devices."""

    def __init__(self, d: int, f: int, dtype, rngs: nnx.Rngs):
        init = normal(INIT_SCALE)
        self.gate_up = param(rngs, (2, f, d), (None, "mlp", None), dtype, init)
        self.down = param(rngs, (d, f), (None, "mlp"), dtype, init)

    def __call__(self, x: Float[Array, "b t d"], parallel: Parallel) -> Float[Array, "b t d"]:
        """Returns the sum over all devices."""
        gate, up = (linear(x, matrix) for matrix in self.gate_up[...])
        return parallel.sum(linear(jax.nn.silu(gate) * up, self.down[...]))
