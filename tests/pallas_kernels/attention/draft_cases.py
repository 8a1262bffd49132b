"""Random blocks of a drafter, contexts before them, and what the reference makes of both."""

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import BF16, cache, history, normal

from pallas_kernels.attention.reference import draft_attention_reference

NAMES = ("q", "own_keys", "own_values", "keys", "values", "start", "sink")
SMALL = dict(b=2, t=5, n=6, h=48, v=32, k=3, s=28 + 5, window=24)


def make(rng, shape, starts):
    """Rows of the ring that hold no position are NaN."""
    ends = [cache(history(rng, shape.k, shape.h, shape.v, s), shape.held, s) for s in starts]
    own = [normal(rng, shape.b, shape.t, shape.k, d) for d in (shape.h, shape.v)]
    sink = rng.normal(size=shape.n).astype(BF16) if shape.sink else None
    q = normal(rng, shape.b, shape.t, shape.n, shape.h)
    held = (np.stack(x) for x in zip(*ends, strict=True))
    return q, *own, *held, np.asarray(starts, np.int32), sink


def reference(shape, arguments):
    arrays = jax.tree.map(jnp.asarray, arguments)
    options = dict(window=shape.window, causal=shape.causal)
    return np.asarray(draft_attention_reference(*arrays, **options))
