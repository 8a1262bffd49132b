"""What the router means, in plain jnp and float32."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from pallas_kernels.linear.reference import rms_norm


def route_reference(
    h: Float[Array, "t d"],
    norm: Float[Array, "d"],
    weight: Shaped[Array, "e d"],
    bias: Float[Array, " e"],
    live: Bool[Array, " t"] | None = None,
    *,
    choices: int,
    epsilon: float,
    normalise: bool = True,
    scale: float = 1.0,
):
    """Normed rows, ids and weights of their experts: see `api.route`."""
    x = rms_norm(h, norm, epsilon)
    wide = x.astype(jnp.float32), weight.astype(jnp.float32)
    scores = jax.nn.sigmoid(jnp.einsum("td,ed->te", *wide, precision=lax.Precision.HIGHEST))
    _, ids = lax.top_k(scores + bias, choices)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if normalise:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    if live is not None:
        ids = jnp.where(live[:, None], ids, -1)
    return x, ids, weights * scale
