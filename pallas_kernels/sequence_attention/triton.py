"""The kernels, in Pallas for Triton: a tile of queries or keys each, scores never in memory.

As in FlashAttention-2 (arXiv 2307.08691): forwards, a tile of queries walks over the tiles of keys
that it sees with a running maximum and sum; backwards, one kernel walks likewise for the queries'
gradient, and one walks over the queries that see a tile of keys, head by head of its group, so that
sums have a fixed order and nothing is added atomically. Sizes of heads are filled up to powers of
two, as Triton's tiles are; the places filled up are zeros.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

BLOCK = 64
"""Rows of a tile, of queries and of keys; sequences are multiples of it."""
LARGEST = 128
"""Size of a head, at most: tiles of more would not fit."""
HIDDEN = -1e30
LOG2E = math.log2(math.e)


def forward(q, k, v, window: int | None, interpret: bool):
    """Attention without sinks: outputs [n, g, t, v] and logarithms of sums [n, g, t], float32.

    Args:
      q: [n, g, t, h].
      k: [n, t, h].
      v: [n, t, v].
      window: keys that a query sees; None is all before it.
      interpret: run as jnp operations, on any device.
    """
    n, g, t, h = q.shape
    size = v.shape[2]
    tile, whole = _specs(t)
    row = pl.BlockSpec((None, None, BLOCK), lambda i, head, at: (at, head, i))
    return pl.pallas_call(
        partial(_forward_kernel, sizes=(h, size), window=window),
        grid=(t // BLOCK, g, n),
        in_specs=[tile(h), whole(h), whole(size)],
        out_specs=[tile(size), row],
        out_shape=[
            jax.ShapeDtypeStruct((n, g, t, size), jnp.float32),
            jax.ShapeDtypeStruct((n, g, t), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="sequence_attention",
    )(q, k, v)


def backward(q, k, v, gradient, sums, mean, window: int | None, interpret: bool):
    """Gradients of q, k and v.

    Args:
      q: [n, g, t, h].
      k: [n, t, h].
      v: [n, t, v].
      gradient: of the outputs, [n, g, t, v].
      sums: logarithms of the weights' sums, sinks included, [n, g, t] float32.
      mean: products of outputs and their gradients, [n, g, t] float32.
      window: as in `forward`.
      interpret: likewise.
    """
    n, g, t, h = q.shape
    size = v.shape[2]
    tile, whole = _specs(t)
    row = pl.BlockSpec((None, None, BLOCK), lambda i, head, at: (at, head, i))
    options = {
        "compiler_params": plgpu.CompilerParams(num_warps=4, num_stages=2),
        "interpret": interpret,
    }
    of_q = pl.pallas_call(
        partial(_query_kernel, sizes=(h, size), window=window),
        grid=(t // BLOCK, g, n),
        in_specs=[tile(h), whole(h), whole(size), tile(size), row, row],
        out_specs=tile(h),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="sequence_attention_queries",
        **options,
    )(q, k, v, gradient, sums, mean)

    def heads(c):
        return pl.BlockSpec((None, g, t, _filled(c)), lambda i, at: (at, 0, 0, 0))

    def part(c):
        return pl.BlockSpec((None, BLOCK, _filled(c)), lambda i, at: (at, i, 0))

    rows = pl.BlockSpec((None, g, t), lambda i, at: (at, 0, 0))
    of_k, of_v = pl.pallas_call(
        partial(_key_kernel, sizes=(h, size), heads=g, length=t, window=window),
        grid=(t // BLOCK, n),
        in_specs=[heads(h), part(h), part(size), heads(size), rows, rows],
        out_specs=[part(h), part(size)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        name="sequence_attention_keys",
        **options,
    )(q, k, v, gradient, sums, mean)
    return of_q, of_k, of_v


def _filled(size: int) -> int:
    """A head's size in a tile: a power of two, and at least what a product takes."""
    return max(16, pl.next_power_of_2(size))


def _specs(t: int):
    """Blocks of a grid (tile, head, n): a tile of one head, and a whole sequence of keys."""

    def tile(c):
        return pl.BlockSpec((None, None, BLOCK, _filled(c)), lambda i, head, at: (at, head, i, 0))

    def whole(c):
        return pl.BlockSpec((None, t, _filled(c)), lambda i, head, at: (at, 0, 0))

    return tile, whole


def _load(ref, size: int):
    """A tile of rows, zeros where it is filled up."""
    return plgpu.load(ref, mask=_inside(ref.shape[-1], size), other=0.0)


def _store(ref, value, size: int) -> None:
    plgpu.store(ref, value.astype(ref.dtype), mask=_inside(ref.shape[-1], size))


def _inside(filled: int, size: int):
    return (jnp.arange(filled) < size)[None, :]


def _dot(x, y, axes: tuple[int, int]):
    """The product of two tiles over these axes, in float32."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


def _visible(queries, keys, window: int | None):
    """Which keys a query sees; both are positions that broadcast."""
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


def _keys_of(i, window: int | None):
    """Tiles of keys that tile i of queries sees: the first, and the one behind the last."""
    return (0 if window is None else jnp.maximum(i * BLOCK - window + 1, 0) // BLOCK), i + 1


def _forward_kernel(q_ref, k_ref, v_ref, out_ref, logs_ref, *, sizes, window):
    i, (h, size) = pl.program_id(0), sizes
    q = _load(q_ref, h)
    rows = i * BLOCK + jnp.arange(BLOCK)

    def body(j, carry):
        out, top, total = carry
        here = pl.ds(j * BLOCK, BLOCK)
        keys, values = _load(k_ref.at[here, :], h), _load(v_ref.at[here, :], size)
        scores = _dot(q, keys, (1, 1)) * jnp.float32(LOG2E * h**-0.5)
        places = j * BLOCK + jnp.arange(BLOCK)
        scores = jnp.where(_visible(rows[:, None], places[None, :], window), scores, HIDDEN)
        # Rows that have seen no key yet have weights of 1 here, which their first key makes 0 of.
        higher = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2(scores - higher[:, None])
        shrink = jnp.exp2(top - higher)
        out = out * shrink[:, None] + _dot(weights.astype(values.dtype), values, (1, 0))
        return out, higher, total * shrink + weights.sum(axis=1)

    low, high = _keys_of(i, window)
    zeros = jnp.zeros((BLOCK, _filled(size)), jnp.float32)
    first = zeros, jnp.full(BLOCK, HIDDEN, jnp.float32), jnp.zeros(BLOCK, jnp.float32)
    out, top, total = lax.fori_loop(low, high, body, first)
    _store(out_ref, out / total[:, None], size)
    logs_ref[...] = (top + jnp.log2(total)) * jnp.float32(1 / LOG2E)


def _query_kernel(q_ref, k_ref, v_ref, g_ref, sums_ref, mean_ref, of_q_ref, *, sizes, window):
    i, (h, size) = pl.program_id(0), sizes
    q, wanted = _load(q_ref, h), _load(g_ref, size)
    sums, mean = sums_ref[...] * jnp.float32(LOG2E), mean_ref[...]
    rows = i * BLOCK + jnp.arange(BLOCK)

    def body(j, of_q):
        here = pl.ds(j * BLOCK, BLOCK)
        keys, values = _load(k_ref.at[here, :], h), _load(v_ref.at[here, :], size)
        scores = _dot(q, keys, (1, 1)) * jnp.float32(LOG2E * h**-0.5)
        places = j * BLOCK + jnp.arange(BLOCK)
        visible = _visible(rows[:, None], places[None, :], window)
        weights = jnp.where(visible, jnp.exp2(scores - sums[:, None]), 0.0)
        each = _dot(wanted, values, (1, 1))
        of_scores = weights * (each - mean[:, None])
        return of_q + _dot(of_scores.astype(keys.dtype), keys, (1, 0))

    low, high = _keys_of(i, window)
    of_q = lax.fori_loop(low, high, body, jnp.zeros((BLOCK, _filled(h)), jnp.float32))
    _store(of_q_ref, of_q * jnp.float32(h**-0.5), h)


def _key_kernel(
    q_ref, k_ref, v_ref, g_ref, sums_ref, mean_ref, of_k_ref, of_v_ref,
    *, sizes, heads, length, window,
):  # fmt: skip
    j, (h, size) = pl.program_id(0), sizes
    keys, values = _load(k_ref, h), _load(v_ref, size)
    places = j * BLOCK + jnp.arange(BLOCK)
    tiles = length // BLOCK
    # Tiles of queries that see a key of this one: from its own on.
    last = (
        tiles
        if window is None
        else jnp.minimum((j * BLOCK + BLOCK + window - 2) // BLOCK + 1, tiles)
    )

    def body(head, i, carry):
        of_k, of_v = carry
        here = pl.ds(i * BLOCK, BLOCK)
        q, wanted = _load(q_ref.at[head, here, :], h), _load(g_ref.at[head, here, :], size)
        sums, mean = sums_ref[head, here] * jnp.float32(LOG2E), mean_ref[head, here]
        rows = i * BLOCK + jnp.arange(BLOCK)
        # Keys are rows here, queries columns: nothing is transposed.
        scores = _dot(keys, q, (1, 1)) * jnp.float32(LOG2E * h**-0.5)
        visible = _visible(rows[None, :], places[:, None], window)
        weights = jnp.where(visible, jnp.exp2(scores - sums[None, :]), 0.0)
        of_v = of_v + _dot(weights.astype(wanted.dtype), wanted, (1, 0))
        each = _dot(values, wanted, (1, 1))
        of_scores = weights * (each - mean[None, :])
        return of_k + _dot(of_scores.astype(q.dtype), q, (1, 0)), of_v

    carry = tuple(jnp.zeros((BLOCK, _filled(c)), jnp.float32) for c in (h, size))
    for head in range(heads):
        carry = lax.fori_loop(j, last, partial(body, jnp.int32(head)), carry)
    _store(of_k_ref, carry[0] * jnp.float32(h**-0.5), h)
    _store(of_v_ref, carry[1], size)
