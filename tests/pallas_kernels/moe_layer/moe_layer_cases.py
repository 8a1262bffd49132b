"""Random mixtures of experts with their routers, and how far two results are apart."""

import jax
import jax.numpy as jnp
import numpy as np
from expert_cases import oracle, random_experts
from router_cases import BF16, choose, normed, random_case, scores

EPSILON = 1e-5
MARGIN = 1e-4
"""Between the last expert that a token chooses and the next one: no rounding closes it."""


def options(c, **more) -> dict:
    """The rest of the arguments of `moe_layer`."""
    return dict(choices=c, epsilon=EPSILON, normalise=True, scale=1.5) | more


def make(rng, t, d, f, experts, c, wide=False) -> dict:
    """Arguments by name, weights in the checkpoint's order; no choice is a close call."""
    given = dict(weights=random_experts(rng, experts, d, f))
    while True:
        h, norm, router, bias, live = random_case(rng, t, d, experts, wide)
        # Not so large that what the experts add is lost in the stream.
        h = (h.astype(np.float32) / h.astype(np.float32).std() * rng.uniform(0.1, 0.5)).astype(BF16)
        total = np.sort(scores(normed(h, norm, EPSILON), router) + bias, axis=1)
        if (total[:, -c] - total[:, -c - 1]).min() > MARGIN:
            break
    live[0] = True
    arrays = dict(h=h, norm=norm, router=router, bias=bias, live=live)
    return given | {name: jnp.asarray(array) for name, array in arrays.items()}


def expected(given, c, stream=True):
    """[t, d] in float64, but for the norm, which rounds to bfloat16 twice."""
    h, norm, router, bias = (np.asarray(given[name]) for name in ("h", "norm", "router", "bias"))
    x = normed(h, norm, EPSILON)
    ids, weights = choose(scores(x, router), bias, c, True, 1.5)
    if given.get("live") is not None:
        ids = np.where(np.asarray(given["live"])[:, None], ids, -1)
    y = oracle(x, given["weights"], ids, weights)
    return y + h.astype(np.float64) if stream else y


def others(rng, t, d):
    """Rows to put beside one."""
    return (rng.normal(size=(t, d)) * rng.uniform(0.1, 30)).astype(BF16)


def poison(gib=1):
    """Memory that the next program gets holds NaN."""
    jax.block_until_ready(jnp.full(gib << 28, jnp.nan, jnp.float32)).delete()
