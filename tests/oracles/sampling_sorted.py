"""Top-k, top-p and Gumbel sampling as they are defined: over sorted logits, of one device."""

import jax
import jax.numpy as jnp
import numpy as np


def truncate(logits, top_p, top_k):
    """Sets tokens outside top-k, and then outside top-p of what is left, to -inf; ties stay."""
    width = logits.shape[-1]
    descending = -jnp.sort(-logits, axis=-1)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, width), width)[:, None, None]
    kept = jnp.where(jnp.arange(width) < count, descending, -jnp.inf)
    mass = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    inside = (before < top_p[:, None, None]) | (top_p >= 1.0)[:, None, None]
    inside = inside & jnp.isfinite(kept)
    # The likeliest token always stays, whatever top_p is.
    inside = inside.at[..., 0].set(True)
    lowest = jnp.where(inside, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def scores(logits, positions, request):
    """Truncated logits plus noise that depends on seed, sequence and position."""
    temperature = jnp.where(request.temperature > 0, request.temperature, 1.0)
    scaled = truncate(logits / temperature[:, None, None], request.top_p, request.top_k)
    root = jax.random.key(request.seed, impl="threefry2x32")

    def noise(sequence, position):
        key = jax.random.fold_in(jax.random.fold_in(root, sequence), position)
        return jax.random.gumbel(key, (logits.shape[-1],), jnp.float32)

    return scaled + jax.vmap(jax.vmap(noise, (None, 0)), (0, 0))(request.sequence, positions)


def lowest_kept(row: np.ndarray, top_p: float, top_k: int) -> tuple[float, float]:
    """The least logit that stays in one row, in float64, and how near another choice was.

    The second number is the least distance between top_p and the share of mass before a token.
    """
    descending = np.sort(row.astype(np.float64))[::-1][: top_k or None]
    with np.errstate(invalid="ignore"):
        weights = np.where(descending == descending[0], 1.0, np.exp(descending - descending[0]))
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]]) / weights.sum()
    if top_p >= 1.0:
        return float(descending[-1]), 1.0
    # The first of equals decides for all of them.
    first = np.concatenate([[True], descending[1:] != descending[:-1]])
    near = np.abs(before - np.float64(top_p))[first].min()
    inside = (before < np.float64(top_p)) & first
    inside[0] = True
    return float(descending[inside].min()), float(near)
