"""Random blocks and caches as a decode loop leaves them, and the comparison with the reference."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mimo_jax.model.attention import attend, causal
from pallas_kernels.attention.reference import decode_attention_reference, positions

BF16 = ml_dtypes.bfloat16


def normal(rng, *shape):
    return rng.normal(size=shape).astype(BF16)


def history(rng, k, h, v, length):
    """Keys and values of all positions of one sequence."""
    return normal(rng, k, length, h), normal(rng, k, length, v)


def cache(past, rows, end, garbage=np.nan):
    """A cache of `rows` rows after all positions before `end`; the others hold garbage."""
    found = []
    for x in past:
        held = np.full((x.shape[0], rows, x.shape[2]), garbage, BF16)
        for p in range(max(0, end - rows), end):
            held[:, p % rows] = x[:, p]
        found.append(held)
    return found


def distance(out, ref):
    out, ref = np.asarray(out, np.float64), np.asarray(ref, np.float64)
    return np.linalg.norm(out - ref) / np.linalg.norm(ref)


def reference(q, keys, values, start, live, window, sink):
    arrays = [jnp.asarray(x) for x in (q, keys, values, start, live)]
    return np.asarray(
        decode_attention_reference(*arrays, window, None if sink is None else jnp.asarray(sink))
    )


def of_the_model(q, keys, values, start, live, window, sink):
    """What XLA's programs give, which round weights to bfloat16 where the kernels do."""
    start, end = jnp.asarray(start), jnp.asarray(start + live)
    places = positions(end, keys.shape[2])
    rows = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
    arrays = [jnp.nan_to_num(jnp.asarray(x)) for x in (q, keys, values)]
    sink = None if sink is None else jnp.asarray(sink)
    return np.asarray(attend(*arrays, causal(rows, places, window), sink))
