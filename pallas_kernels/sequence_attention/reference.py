"""What attention of whole sequences means: all scores at once, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def sequence_attention_reference(
    q: Float[Array, "b k g t h"],
    k: Float[Array, "b k t h"],
    v: Float[Array, "b k t v"],
    sink: Float[Array, "k g"],
    window: int | None = None,
) -> Float[Array, "b k g t v"]:
    """Softmax over the keys that a query sees and its sink, which adds mass and no value.

    Query i sees the keys i - window + 1 to i; all before it without a window.
    """
    t, size = q.shape[-2:]
    i, j = jnp.arange(t)[:, None], jnp.arange(t)
    visible = (j <= i) if window is None else (j <= i) & (j > i - window)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, precision="highest") * jnp.float32(size**-0.5)
    scores = jnp.where(visible, scores, -jnp.inf)
    sinks = sink[None, :, :, None, None]
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), sinks)
    weights = jnp.exp(scores - top)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - top))
    return jnp.einsum("bkgts,bksv->bkgtv", weights, v, precision="highest")
