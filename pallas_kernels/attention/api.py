"""The public face of decode attention: argument checks and the choice of an implementation."""

import functools
from collections.abc import Callable

from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.checks import (
    check_block,
    check_context,
    check_decode,
    check_draft,
    refusal,
)
from pallas_kernels.attention.reference import (
    block_attention_reference,
    decode_attention_reference,
    draft_attention_reference,
    write_context_reference,
)
from pallas_kernels.choice import check_name, choose

MOST_TOKENS = 16
"""Rows of a block that the kernels take."""


def decode_attention(
    q: Float[Array, "b t n h"],
    keys: Float[Array, "b k s h"],
    values: Float[Array, "b k s v"],
    start: Int32[Array, "b"],
    live: Int32[Array, "b"],
    *,
    window: int | None = None,
    sink: Float[Array, "n"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "b t n v"]:
    """Causal attention of a block of tokens to a cache that already holds the block's own rows.

    The row of position p is p % s. With a `window` the cache is a ring, of at least window + t - 1
    rows; without one it holds all positions. A query sees the positions up to its own, those before
    start + live only, and with a window its last `window` ones. What else a row holds, NaN too,
    weighs nothing; so do rows of positions that were never written.

    "reference" is plain jnp in float32. "mosaic_gpu" is the kernel for Hopper: bfloat16, at most 16
    tokens. "auto" takes the kernel where it can run, which is decided when the program is lowered.
    On a GPU without the kernel, the reason is logged once.

    Within one implementation a row's bits depend on its query, its position and the rows it sees:
    not on its place in the block, on t, on other rows, or on what the cache holds besides.

    Args:
      q: rotated queries; head i attends with key/value head i // (n / k).
      keys: rotated keys.
      values: values.
      start: position of each sequence's first row.
      live: rows that count, first in the block; outputs of the others mean nothing, but are finite
        where their queries are.
      window: positions that a query sees, its own included.
      sink: one more logit a head, unscaled, which takes mass and adds no value.
      implementation: "auto", or the name of one, which then runs or raises.

    Returns:
      weighted means in q's dtype; zeros for a row that sees nothing.

    Raises:
      ValueError: on shapes or types that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    check_decode(q, keys, values, start, live, window, sink)
    return _run(
        "decode_attention_mosaic",
        dict(window=window),
        (q, keys, values, start, live, sink),
        reference=functools.partial(_reference, window=window),
        refused=_refusal(
            dict(q=q, keys=keys, values=values), "shape_of", q, keys, values, window, sink
        ),
        implementation=implementation,
    )


def block_attention(
    qkv: Float[Array, "b t k rows"],
    cos: Float[Array, "b t r"],
    sin: Float[Array, "b t r"],
    keys: Float[Array, "b k s h"],
    values: Float[Array, "b k s v"],
    start: Int32[Array, "b"],
    live: Int32[Array, "b"],
    *,
    window: int | None = None,
    sink: Float[Array, "n"] | None = None,
    value_scale: float = 1.0,
    implementation: str = "auto",
    elsewhere: Callable | None = None,
) -> tuple[Float[Array, "b t n v"], Float[Array, "b k s h"], Float[Array, "b k s v"]]:
    """`decode_attention` from the projection on: rotates, adds the block to the cache, attends.

    Queries and keys are rotated in float32 and rounded; values times `value_scale`, in their type.
    Rows that are not live are not written. On a GPU a ring takes one launch and a long cache three;
    neither is copied if the caller's arrays are not used afterwards, in a loop's carry either.

    Args:
      qkv: each key/value head's queries, its key and its value, side by side.
      cos: of each row's angles in float32; columns i and i + r of a head are a pair, those past 2 r
        are not rotated.
      sin: likewise.
      keys: rotated keys of the positions before `start`; the row of position p is p % s.
      values: their scaled values.
      start: position of each sequence's first row.
      live: rows that count, first in the block.
      window: as in `decode_attention`.
      sink: as in `decode_attention`.
      value_scale: of the block's values; rounded to their type.
      implementation: as in `decode_attention`.
      elsewhere: with "auto", what takes the reference's place: a function of `qkv`, `cos`, `sin`,
        `keys`, `values`, `start`, `live` and `sink`. A model has a way of its own, whose bits it
        keeps where there is no kernel.

    Returns:
      what `decode_attention` does, and keys and values with the block's.

    Raises:
      ValueError: on shapes or types that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    check_block(qkv, cos, sin, keys, values, start, live, window, sink)
    options = dict(window=window, value_scale=float(value_scale))
    shaping = qkv, cos, keys, values, window, sink, value_scale
    return _run(
        "block_attention_mosaic",
        options,
        (qkv, cos, sin, keys, values, start, live, sink),
        reference=functools.partial(block_attention_reference, **options),
        elsewhere=elsewhere,
        refused=_refusal(dict(qkv=qkv, keys=keys, values=values), "block_shape_of", *shaping),
        implementation=implementation,
    )


def draft_attention(
    qkv: Float[Array, "b t k rows"],
    query_norm: Float[Array, " h"],
    key_norm: Float[Array, " h"],
    cos: Float[Array, "b t r"],
    sin: Float[Array, "b t r"],
    keys: Float[Array, "b k s h"],
    values: Float[Array, "b k s v"],
    start: Int32[Array, "b"],
    *,
    window: int,
    value_scale: float,
    epsilon: float,
    sink: Float[Array, "n"] | None = None,
    causal: bool = False,
    implementation: str = "auto",
    elsewhere: Callable | None = None,
) -> Float[Array, "b t n v"]:
    """Attention of a drafter's block to a ring of context, and to itself in both directions.

    From the projection on: the block's queries and keys get an RMS norm (in float32, rounded, times
    the weight), are rotated in float32 and rounded; its values are scaled, in their type. The ring
    holds positions before `start`, that of position p in row p % s, and is not written. On a GPU it
    takes one launch.

    Args:
      qkv: each key/value head's queries, its key and its value, side by side, of positions start,
        start + 1, ...
      query_norm: weights of each query head's norm.
      key_norm: likewise for keys.
      cos: as in `block_attention`.
      sin: as in `block_attention`.
      keys: the context's normed and rotated keys.
      values: its scaled values.
      start: position of each sequence's first row.
      window: a row sees the context from its own position - window + 1 on; at least t.
      value_scale: of the block's values; rounded to their type.
      epsilon: of the norms.
      sink: as in `decode_attention`.
      causal: a row sees the block up to itself only.
      implementation: as in `decode_attention`.
      elsewhere: as in `block_attention`: a function of all arrays in this order, then `sink`.

    Returns:
      weighted means in qkv's dtype.

    Raises:
      ValueError: on shapes or types that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    check_draft(qkv, query_norm, key_norm, cos, sin, keys, values, start, window, sink)
    options = dict(value_scale=float(value_scale), epsilon=float(epsilon), causal=causal)
    arrays = dict(qkv=qkv, query_norm=query_norm, key_norm=key_norm, keys=keys, values=values)
    shaping = qkv, cos, keys, values, window, sink, *options.values()
    return _run(
        "draft_attention_mosaic",
        dict(window=window, **options),
        (qkv, query_norm, key_norm, cos, sin, keys, values, start, sink),
        reference=functools.partial(draft_attention_reference, window=window, **options),
        elsewhere=elsewhere,
        refused=_refusal(arrays, "draft_shape_of", *shaping),
        implementation=implementation,
    )


def write_context(
    kv: Float[Array, "b t layers k _"],
    key_norms: Float[Array, "layers h"],
    cos: Float[Array, "b t r"],
    sin: Float[Array, "b t r"],
    keys: tuple[Float[Array, "b k s h"], ...],
    values: tuple[Float[Array, "b k s v"], ...],
    start: Int32[Array, "b"],
    live: Int32[Array, "b"],
    *,
    value_scale: float,
    epsilon: float,
    implementation: str = "auto",
    elsewhere: Callable | None = None,
) -> tuple[tuple[Float[Array, "b k s h"], ...], tuple[Float[Array, "b k s v"], ...]]:
    """Adds rows to the context of a drafter's layers: keys normed and rotated, values scaled.

    The row of position p is row p % s of a ring. Rows that are not live are not written. On a GPU
    it takes one launch for all layers, and no ring is copied if the caller's are not used
    afterwards.

    Args:
      kv: of each layer and head, a key and a value side by side, as projected.
      key_norms: each layer's weight of the keys' RMS norm.
      cos: of each row's angles in float32, as in `block_attention`.
      sin: likewise.
      keys: each layer's ring.
      values: likewise.
      start: position of each sequence's first row.
      live: rows that are written, first of the t.
      value_scale: of the values; rounded to their type.
      epsilon: of the norms.
      implementation: as in `decode_attention`.
      elsewhere: as in `block_attention`: a function of all arrays in this order.

    Returns:
      the rings.

    Raises:
      ValueError: on shapes or types that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    check_context(kv, key_norms, cos, sin, keys, values, start, live)
    options = dict(value_scale=float(value_scale), epsilon=float(epsilon))
    rings = {f"{name}[{i}]": x for name, own in (("keys", keys), ("values", values))
             for i, x in enumerate(own)}  # fmt: skip
    return _run(
        "write_context_mosaic",
        options,
        (kv, key_norms, cos, sin, keys, values, start, live),
        reference=functools.partial(write_context_reference, **options),
        elsewhere=elsewhere,
        refused=_refusal(
            dict(kv=kv, key_norms=key_norms, **rings),
            "context_shape_of",
            *(kv, cos, keys, values, *options.values()),
        ),
        implementation=implementation,
    )


def _refusal(arrays: dict, shape_of: str, *arguments) -> Exception | None:
    """Why the kernels cannot take a call whose shapes that function of `mosaic_gpu` makes."""

    def shape():
        from pallas_kernels.attention import mosaic_gpu

        return getattr(mosaic_gpu, shape_of)(*arguments)

    return refusal(shape, arrays, "reference", MOST_TOKENS)


def _run(
    kernel: str, options: dict, arguments, *, reference, refused, implementation, elsewhere=None
):
    """The kernel of that name where it can run and may, else the reference."""
    check_name(implementation)

    def run(*arguments):
        from pallas_kernels.attention import mosaic_gpu

        return getattr(mosaic_gpu, kernel)(*arguments, **options)

    return choose(
        implementation,
        arguments,
        kernel=run,
        reference=elsewhere if implementation == "auto" and elsewhere is not None else reference,
        refusal=refused,
        without="Decode attention runs on the slow reference",
    )


def _reference(q, keys, values, start, live, sink, *, window):
    return decode_attention_reference(q, keys, values, start, live, window, sink)
