"""A mixture of experts with its router, plain: the references of both, one after the other."""

import jax.numpy as jnp

from pallas_kernels.expert_ffn.api import expert_ffn
from pallas_kernels.router.reference import route_reference


def moe_layer_reference(
    h, norm, router, bias, weights, live, *, choices, epsilon, normalise, scale, stream
):
    """See `api.moe_layer`."""
    options = dict(choices=choices, epsilon=epsilon, normalise=normalise, scale=scale)
    x, ids, routing = route_reference(h, norm, router, bias, live, **options)
    y = expert_ffn(x, weights, ids, routing, implementation="reference")
    return (y + h.astype(jnp.float32) if stream else y).astype(h.dtype)
