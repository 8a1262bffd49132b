"""Causal attention of whole sequences to themselves, without a cache: training and evaluation.

Written for GPUs, where memory decides: queries are taken in blocks, against no keys but those that
a block may see; products have their rows and columns last, so that none is transposed; and the
backward pass is written by hand (as in FlashAttention, arXiv 2205.14135): weights come out of the
scores and the logarithm of their sum, in one pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.sequence_attention import sequence_attention
from pallas_kernels.softmax import MASKED

CHUNK = 512
"""Queries of a block, where no window divides the sequence."""

ALIGN = 64
"""Blocks of keys begin at a multiple of it: products of odd sizes are slow."""


def attend_sequence(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k v"],
    window: int | None,
    sink: Float[Array, "n"] | None,
    chunk: int = CHUNK,
    implementation: str = "blocks",
) -> Float[Array, "b t n v"]:
    """What `attend` gives for tokens at positions 0 to t-1 that see themselves and those before.

    Args:
      q: queries; head i attends with key/value head i // (n / k).
      k: rotated keys.
      v: values.
      window: keys that a query sees, its own included; None is all.
      sink: unscaled logits, one more a head.
      chunk: queries of a block.
      implementation: "blocks", jnp alone; "triton", the kernels of `pallas_kernels`, for one GPU
        and sequences that they fit; "interpreted", these kernels on any device, slowly.

    Raises:
      ValueError: if the kernels do not take such arrays.
    """
    b, t, n, _ = q.shape
    groups = k.shape[2]
    sink = jnp.full(n, MASKED, jnp.float32) if sink is None else sink.astype(jnp.float32)
    sink = sink.reshape(groups, n // groups)
    q = q.reshape(b, t, groups, n // groups, -1).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    if implementation != "blocks":
        out = sequence_attention(q, k, v, sink, window=window, implementation=implementation)
    elif window is None or t <= 2 * window or t % window:
        out = _attend(q, k, v, sink, 0, window, chunk)
    else:
        out = _in_windows(q, k, v, sink, window, chunk)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)


def _in_windows(q, k, v, sink, window: int, chunk: int) -> Float[Array, "b k g t v"]:
    """Blocks of a window's length: the first sees itself, each other the one before it too."""
    b, groups, heads, t, _ = q.shape
    blocks = t // window - 1

    def fold(x):
        """[b, ..., blocks * window, c] as [b * blocks, ..., window, c]."""
        x = x.reshape(*x.shape[:-2], blocks, window, x.shape[-1])
        return jnp.moveaxis(x, -3, 1).reshape(b * blocks, *x.shape[1:-3], window, x.shape[-1])

    def pairs(x):
        return jnp.concatenate([fold(x[..., :-window, :]), fold(x[..., window:, :])], axis=-2)

    first = (x[..., :window, :] for x in (q, k, v))
    begin = _attend(*first, sink, 0, window, chunk)
    rest = _attend(fold(q[..., window:, :]), pairs(k), pairs(v), sink, window, window, chunk)
    rest = jnp.moveaxis(rest.reshape(b, blocks, groups, heads, window, -1), 1, 3)
    return jnp.concatenate([begin, rest.reshape(b, groups, heads, t - window, -1)], axis=-2)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, sink, offset: int, window: int | None, chunk: int):
    """Query i, at position offset + i, sees the keys j of its window up to it, and a sink.

    q is [b, k, g, t, h], k and v are [b, k, s, h and v], sink is [k, g] float32.
    """
    return _forward(q, k, v, sink, offset, window, chunk)[0]


def _forward(q, k, v, sink, offset, window, chunk):
    outputs, sums = [], []
    for first, last, low, high in _parts(q.shape[3], k.shape[2], offset, window, chunk):
        rows = _rows(q[..., first:last, :])
        here = _sinks(sink, last - first)
        scores = _scores(rows, k[:, :, low:high], offset + first - low, last - first, window)
        top = jnp.maximum(scores.max(axis=-1), here)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(axis=-1) + jnp.exp(here - top)
        mixed = _product("bkrs,bksv->bkrv", weights.astype(v.dtype), v[:, :, low:high])
        out = (mixed / total[..., None]).astype(q.dtype)
        outputs.append(out.reshape(*q.shape[:3], last - first, v.shape[-1]))
        sums.append(top + jnp.log(total))
    out = jnp.concatenate(outputs, axis=3)
    return out, (q, k, v, sink, out, sums)


def _backward(offset, window, chunk, saved, gradient):
    q, k, v, sink, out, sums = saved
    of_q, of_sink = [], jnp.zeros_like(sink)
    of_k, of_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    parts = _parts(q.shape[3], k.shape[2], offset, window, chunk)
    for (first, last, low, high), logs in zip(parts, sums, strict=True):
        rows, wanted, given = (_rows(x[..., first:last, :]) for x in (q, gradient, out))
        keys, values = k[:, :, low:high], v[:, :, low:high]
        scores = _scores(rows, keys, offset + first - low, last - first, window)
        weights = jnp.exp(scores - logs[..., None])
        # The gradient of a softmax: what a weight's value exceeds the weighted mean by.
        mean = (wanted.astype(jnp.float32) * given.astype(jnp.float32)).sum(axis=-1)
        each = _product("bkrv,bksv->bkrs", wanted, values)
        scale = jnp.float32(q.shape[-1] ** -0.5)
        of_scores = (weights * (each - mean[..., None]) * scale).astype(q.dtype)
        part = _product("bkrs,bksh->bkrh", of_scores, keys).astype(q.dtype)
        of_q.append(part.reshape(*q.shape[:3], last - first, -1))
        of_k = of_k.at[:, :, low:high].add(_product("bkrs,bkrh->bksh", of_scores, rows))
        of_v = of_v.at[:, :, low:high].add(
            _product("bkrs,bkrv->bksv", weights.astype(v.dtype), wanted)
        )
        mass = jnp.exp(_sinks(sink, last - first) - logs)
        of_sink -= (mass * mean).reshape(*q.shape[:3], -1).sum(axis=(0, 3))
    return jnp.concatenate(of_q, axis=3), of_k.astype(k.dtype), of_v.astype(v.dtype), of_sink


_attend.defvjp(_forward, _backward)


def _product(axes: str, x: Array, y: Array) -> Array:
    return jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)


def _parts(queries: int, keys: int, offset: int, window: int | None, chunk: int):
    """Blocks of queries, and the keys that any of a block sees: (first, last, low, high)."""
    for first in range(0, queries, chunk):
        last = min(first + chunk, queries)
        low = 0 if window is None else max(0, offset + first - window + 1) // ALIGN * ALIGN
        yield first, last, low, min(keys, offset + last)


def _rows(x: Float[Array, "b k g t c"]) -> Float[Array, "b k r c"]:
    """The heads of a group one below the other."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _sinks(sink: Float[Array, "k g"], t: int) -> Float[Array, "k r"]:
    """A sink's logit for each row of `_rows`."""
    return jnp.repeat(sink, t, axis=1)


def _scores(rows, keys, offset: int, t: int, window: int | None) -> Float[Array, "b k r s"]:
    """Scaled scores in float32; of keys that a row does not see, MASKED."""
    at = offset + jnp.tile(jnp.arange(t, dtype=jnp.int32), rows.shape[2] // t)[:, None]
    places = jnp.arange(keys.shape[2], dtype=jnp.int32)
    visible = places <= at
    if window is not None:
        visible &= places > at - window
    scale = jnp.float32(rows.shape[-1] ** -0.5)
    scores = _product("bkrh,bksh->bkrs", rows, keys) * scale
    return jnp.where(visible, scores, jnp.float32(MASKED))
