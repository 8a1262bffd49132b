"""Random chunks against caches, and the oracle: a query at a time, in numpy and float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16


def normal(rng, *shape, dtype=BF16):
    return rng.normal(size=shape).astype(dtype)


def make(rng, *, t, n, h, v, k, s, start, live, first=None, window=None, dtype=BF16):
    """Arguments by name; rows of keys that no query sees are NaN."""
    start, live = (np.asarray(x, np.int32) for x in (start, live))
    b = len(start)
    first = None if first is None else np.asarray(first, np.int32)
    found = dict(
        q=normal(rng, b, t, n, h, dtype=dtype),
        keys=normal(rng, b, k, s, h, dtype=dtype),
        values=normal(rng, b, k, s, v, dtype=dtype),
        start=start,
        live=live,
        first=first,
        sink=rng.normal(size=n).astype(np.float32),
    )
    for i in range(b):
        place = np.arange(s) + (0 if first is None else first[i])
        hidden = (place < 0) | (place >= start[i] + live[i])
        if window is not None:
            hidden |= place <= start[i] - window
        found["keys"][i][:, hidden] = np.nan
        found["values"][i][:, hidden] = np.nan
    return found


def oracle(*, q, keys, values, start, live, first, sink, window):
    """[b, t, n, v] in float64; NaN for rows that do not count."""
    b, t, n, h = q.shape
    group = n // keys.shape[1]
    out = np.full((b, t, n, values.shape[3]), np.nan)
    for i in range(b):
        base = 0 if first is None else int(first[i])
        for j in range(live[i]):
            at = int(start[i]) + j
            low = 0 if window is None else max(0, at - window + 1)
            rows = slice(max(low - base, 0), at - base + 1)
            for head in range(n):
                near = keys[i, head // group, rows].astype(np.float64)
                scores = near @ q[i, j, head].astype(np.float64) / np.sqrt(h)
                logits = scores if sink is None else np.append(scores, sink[head])
                weights = np.exp(scores - logits.max())
                total = np.exp(logits - logits.max()).sum()
                mixed = weights @ values[i, head // group, rows].astype(np.float64)
                out[i, j, head] = mixed / total
    return out


def distance(out, wanted):
    """Relative, over the rows that count."""
    out, wanted = np.asarray(out, np.float64), np.asarray(wanted, np.float64)
    there = ~np.isnan(wanted)
    return np.linalg.norm(out[there] - wanted[there]) / np.linalg.norm(wanted[there])


def arrays(arguments):
    """On the device, as `prefill_attention` takes them: positional, then by name."""
    found = {k: None if x is None else jnp.asarray(x) for k, x in arguments.items()}
    names = ("q", "keys", "values", "start", "live")
    return [found.pop(name) for name in names], found
