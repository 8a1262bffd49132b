"""Random blocks and caches as a decode loop leaves them, and the comparison with the reference."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.attention.reference import decode_attention_reference

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
