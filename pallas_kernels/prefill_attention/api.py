"""The public face of prefill attention: argument checks and the choice of an implementation."""

import functools

from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.checks import check_arrays, refusal
from pallas_kernels.choice import check_name, choose
from pallas_kernels.prefill_attention.blocks import prefill_attention_blocks
from pallas_kernels.prefill_attention.reference import prefill_attention_reference

IMPLEMENTATIONS = ("auto", "reference", "blocks", "mosaic_gpu")
ALIGN = 128
"""Tiles of keys begin at multiples of it: `first` must be one for bits that no cut changes."""


def prefill_attention(
    q: Float[Array, "b t n h"],
    keys: Float[Array, "b k s h"],
    values: Float[Array, "b k s v"],
    start: Int32[Array, "b"],
    live: Int32[Array, "b"],
    *,
    first: Int32[Array, "b"] | None = None,
    window: int | None = None,
    sink: Float[Array, "n"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "b t n v"]:
    """Causal attention of a chunk of a prompt to keys that already hold the chunk's own rows.

    Rows of keys are in the order of their positions: row i holds position i, or with a window
    position first + i. A query sees positions from 0 up to its own, those before start + live only,
    and with a window its last `window` ones. What else a row holds, NaN too, weighs nothing if no
    query of the chunk sees it. A position that a query sees and `keys` lacks is left out.

    "reference" is plain jnp in float32, all scores at once. "blocks" is plain jnp, a tile of keys
    at a time, on any platform. "mosaic_gpu" is the kernel for Hopper, in bfloat16. "auto" takes the
    kernel where it can run, which is decided when the program is lowered, and blocks elsewhere. On
    a GPU without the kernel, the reason is logged once.

    With the kernel and `first` a multiple of `ALIGN`, a row's bits depend on its query, its
    position and the rows it sees: not on how a prompt is cut into chunks, nor on other rows.

    Args:
      q: rotated queries; head i attends with key/value head i // (n / k).
      keys: rotated keys.
      values: values.
      start: position of each sequence's first query.
      live: queries that count, first in the chunk; outputs of the others mean nothing, but are
        finite where their queries are.
      first: position of the keys' first row, may be negative; None is 0, as without a window.
      window: positions that a query sees, its own included.
      sink: one more logit a head, unscaled, which takes mass and adds no value.
      implementation: "auto", or the name of one, which then runs or raises.

    Returns:
      weighted means in q's dtype; zeros for a row that sees nothing.

    Raises:
      ValueError: on shapes or types that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    check_name(implementation, IMPLEMENTATIONS)
    _check(q, keys, values, start, live, first, window, sink)
    arguments = q, keys, values, start, live, first, sink
    if implementation == "reference":
        return prefill_attention_reference(*arguments[:-1], window, sink)
    blocks = functools.partial(prefill_attention_blocks, window=window)
    if implementation == "blocks":
        return blocks(*arguments)

    def kernel(*arguments):
        from pallas_kernels.prefill_attention.mosaic_gpu import prefill_attention_mosaic

        return prefill_attention_mosaic(*arguments, window=window)

    def shape():
        from pallas_kernels.prefill_attention.mosaic_gpu import shape_of

        return shape_of(q, keys, values, None)

    return choose(
        implementation,
        arguments,
        kernel=kernel,
        reference=blocks,
        refusal=refusal(shape, dict(q=q, keys=keys, values=values), "blocks"),
        without="Prefill attention runs in blocks of jnp, which is slow",
    )


def _check(q, keys, values, start, live, first, window, sink):
    """Shapes that mean something, whatever implementation runs."""
    if first is not None and window is None:
        raise ValueError("first is for windows: without one, keys begin at position 0.")
    numbers = dict(start=start, live=live) | ({} if first is None else dict(first=first))
    check_arrays(q, keys, values, sink, "keys", **numbers)
