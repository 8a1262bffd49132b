"""What the exchanges mean, by XLA's own collectives."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped


def all_sum_reference(
    x: Shaped[Array, "..."], axis: str, residual: Shaped[Array, "..."] | None = None
) -> Shaped[Array, "..."]:
    """The sum over the devices in the order of their ranks, then a residual; floats in float32."""
    parts = lax.all_gather(x, axis)
    if jnp.issubdtype(x.dtype, jnp.floating):
        parts = parts.astype(jnp.float32)
    more = [] if residual is None else [residual.astype(parts.dtype)]
    return functools.reduce(jnp.add, [*parts, *more]).astype(x.dtype)


def all_gather_reference(x: Shaped[Array, "..."], axis: str) -> Shaped[Array, "devices ..."]:
    """The devices' arrays in the order of their ranks."""
    return lax.all_gather(x, axis)
