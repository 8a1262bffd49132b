"""What the few-token linear means, in plain jnp and float32."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from pallas_kernels.linear.plan import SEGMENT


def linear_reference(
    x: Float[Array, "t d"],
    weight: Shaped[Array, "n d"],
    scale: Float[Array, "units tiles"] | None = None,
    norm: Float[Array, "d"] | None = None,
    epsilon: float = 0.0,
    residual: Float[Array, "t n"] | None = None,
    *,
    out_dtype=jnp.float32,
) -> Float[Array, "t n"]:
    """residual + norm(x) @ (weight * scale)^T; rounded are the normed x and the result alone."""
    x = x if norm is None else rms_norm(x, norm, epsilon)
    weight = weight.astype(jnp.float32)
    if scale is not None:
        unit = weight.shape[0] // scale.shape[0]
        wide = jnp.repeat(jnp.repeat(scale, unit, axis=0), SEGMENT, axis=1)
        weight = weight * wide[:, : weight.shape[1]]
    y = jnp.einsum("td,nd->tn", x.astype(jnp.float32), weight, precision=lax.Precision.HIGHEST)
    y = y if residual is None else y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def rms_norm(x: Float[Array, "t d"], weight: Float[Array, "d"], epsilon: float):
    """x / rms(x) in float32, rounded to x's dtype, then times the weight in that dtype."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)
