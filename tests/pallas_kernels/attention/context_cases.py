"""Random rows of several layers' contexts, rings before them, and what the reference writes."""

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import BF16, distance, normal

from pallas_kernels.attention.reference import write_context_reference

SCALE, EPSILON = 0.612, 1e-3
"""An epsilon that shows in what it is added to."""
TOLERANCE = 5e-3
SMALL = dict(b=2, t=5, layers=3, k=7, h=48, v=32, s=29, half=8)
PRO = dict(b=1, t=8, layers=5, k=1, h=128, v=128, s=1031, half=32)
CASES = {
    "pro": (PRO, (1028,), (8,)),
    "small": (SMALL, (0, 70), (5, 2)),
    "dead": (dict(SMALL, b=3), (27, 41, 9), (0, 5, 1)),
    "half16": (dict(SMALL, h=80, v=96, half=16, layers=4, k=1), (27, 6), (3, 5)),
    "half64": (dict(SMALL, h=144, v=64, half=64, t=16, k=2), (27, 6), (16, 11)),
    "most layers": (dict(SMALL, b=1, t=3, layers=16, k=1), (27,), (2,)),
    "ring of a block": (dict(SMALL, t=6, s=6), (4, 17), (6, 5)),
}


def make(rng, sizes, starts, lives):
    """Arguments of `write_context`; some rows of the rings are NaN."""
    b, t, layers, k, h, v, s, half = (sizes[name] for name in "b t layers k h v s half".split())
    kv = (normal(rng, b, t, layers, k, h + v) * BF16(rng.uniform(0.1, 3))).astype(BF16)
    norms = (1 + 0.3 * rng.normal(size=(layers, h))).astype(BF16)
    angles = rng.uniform(0, 7, size=(b, t, half))
    rings = [[normal(rng, b, k, s, size) for _ in range(layers)] for size in (h, v)]
    for ring in (ring for own in rings for ring in own):
        ring[:, :, int(rng.integers(s))] = np.nan
    turns = [f(angles).astype(np.float32) for f in (np.cos, np.sin)]
    numbers = [np.asarray(x, np.int32) for x in (starts, lives)]
    return kv, norms, *turns, *map(tuple, rings), *numbers


@jax.jit
def _reference(arguments):
    return write_context_reference(*arguments, value_scale=SCALE, epsilon=EPSILON)


def wrong(arguments, found) -> str | None:
    """What is wrong with keys and values."""
    starts, lives = arguments[6:]
    wanted = jax.tree.map(np.asarray, _reference(jax.tree.map(jnp.asarray, arguments)))
    for name, before, own, right in zip(
        ("keys", "values"), arguments[4:6], found, wanted, strict=True
    ):
        for i, (old, new, ref) in enumerate(zip(before, own, right, strict=True)):
            rows = np.zeros((old.shape[0], old.shape[2]), bool)
            for sequence, (start, live) in enumerate(zip(starts, lives, strict=True)):
                rows[sequence, (start + np.arange(live)) % old.shape[2]] = True
            bits = [x.swapaxes(1, 2).view(np.uint16) for x in map(np.asarray, (old, new))]
            if (bits[0][~rows] != bits[1][~rows]).any():
                return f"rows of {name} {i} that are not live were written"
            new, ref = (np.asarray(x).swapaxes(1, 2)[rows] for x in (new, ref))
            if not distance(new, ref) < TOLERANCE:
                return f"{name} {i}"
            if name == "values" and (new.view(np.uint16) != ref.view(np.uint16)).any():
                return "values are multiplied and rounded once: their bits"
    return None
