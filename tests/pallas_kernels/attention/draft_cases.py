"""Random blocks of a drafter, contexts before them, and what the reference makes of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import BF16, cache, history, normal
from numpy_cluster import NumpyCluster, Shared

from pallas_kernels.attention.reference import draft_attention_reference

NAMES = (
    "qkv", "query_norm", "key_norm", "cos", "sin", "keys", "values", "start", "sink",
)  # fmt: skip
SCALE, EPSILON = 0.612, 1e-3
"""An epsilon that shows in what it is added to."""
SMALL = dict(b=2, t=5, n=6, h=48, v=32, k=3, s=28, window=24, half=8)


def make(rng, shape, starts):
    """Rows of the ring that hold no position are NaN, and those that nobody sees."""
    width = (shape.group + 1) * shape.h + shape.v
    qkv = (normal(rng, shape.b, shape.t, shape.k, width) * BF16(rng.uniform(0.05, 4))).astype(BF16)
    norms = [(1 + 0.3 * rng.normal(size=shape.h)).astype(BF16) for _ in range(2)]
    angles = rng.uniform(0, 7, size=(shape.b, shape.t, shape.half))
    ends = [hidden(rng, shape, start) for start in starts]
    held = (np.stack(x) for x in zip(*ends, strict=True))
    sink = rng.normal(size=shape.n) if shape.sink else None
    if sink is not None:
        sink = sink.astype(BF16 if shape.sink_bytes == 2 else np.float32)
    turns = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    return qkv, *norms, *turns, *held, np.asarray(starts, np.int32), sink


def hidden(rng, shape, start):
    """Keys and values of a ring as positions before `start` leave it."""
    held = cache(history(rng, shape.k, shape.h, shape.v, start), shape.s, start)
    for position in range(max(0, start - shape.s), start - shape.window + 1):
        for x in held:
            x[:, position % shape.s] = np.nan
    return held


def reference(shape, arguments):
    options = dict(window=shape.window, causal=shape.causal)
    return np.asarray(_reference(jax.tree.map(jnp.asarray, arguments), **options))


@functools.partial(jax.jit, static_argnames=("window", "causal"))
def _reference(arguments, **options):
    options |= dict(value_scale=SCALE, epsilon=EPSILON)
    return draft_attention_reference(*arguments, **options)


def run(shape, arguments, order=None, missing=None):
    """All clusters, one after another, in any order; what nobody writes is NaN."""
    refs = {k: x for k, x in zip(NAMES, arguments, strict=True) if x is not None}
    refs["out"] = np.full((shape.b, shape.t, shape.n, shape.v), np.nan, BF16)
    clusters = range(shape.b * shape.k * shape.tiles)
    for cluster in clusters if order is None else order:
        machine = NumpyCluster(128 * shape.warpgroups, shape.ranks, missing)
        shared = {name: Shared(shape.ranks, size) for name, size in shape.shared.items()}
        shape.run(machine, machine.const(int(cluster)), refs | shared)
    return refs["out"]
