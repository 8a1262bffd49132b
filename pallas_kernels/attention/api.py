"""The public face of decode attention: argument checks and the choice of an implementation."""

import functools
import logging

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention.reference import decode_attention_reference
from pallas_kernels.expert_ffn import kernel_absence

IMPLEMENTATIONS = ("auto", "reference", "mosaic_gpu")
MOST_TOKENS = 16
"""Rows of a block that the kernels take."""

_log = logging.getLogger("pallas_kernels")


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
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}.")
    _check(q, keys, values, start, live, window, sink)
    options = dict(window=window)
    arguments = q, keys, values, start, live, sink
    reference = functools.partial(_reference, **options)
    if implementation == "reference":
        return reference(*arguments)
    refusal = _misfit(q, keys, values, window) or kernel_absence()
    if refusal is None:
        from pallas_kernels.attention.mosaic_gpu import decode_attention_mosaic

        kernel = functools.partial(decode_attention_mosaic, **options)
        other = reference if implementation == "auto" else _refuse
        return jax.lax.platform_dependent(*arguments, cuda=kernel, default=other)
    if implementation == "mosaic_gpu":
        raise refusal
    if jax.default_backend() == "gpu":
        _log_once(str(refusal))
    return reference(*arguments)


def _reference(q, keys, values, start, live, sink, *, window):
    return decode_attention_reference(q, keys, values, start, live, window, sink)


def _check(q, keys, values, start, live, window, sink):
    """Shapes that mean something, whatever implementation runs."""
    b, t, n, h = q.shape
    k, s = keys.shape[1:3]
    if keys.shape != (b, k, s, h) or values.shape[:3] != (b, k, s):
        raise ValueError(
            f"q {q.shape}, keys {keys.shape} and values {values.shape} must be [b, t, n, h], "
            "[b, k, s, h] and [b, k, s, v]."
        )
    if n % k:
        raise ValueError(f"q has {n} heads, the cache {k}: queries must divide among them.")
    if start.shape != (b,) or live.shape != (b,) or (sink is not None and sink.shape != (n,)):
        raise ValueError(
            f"start {start.shape} and live {live.shape} must be [{b}], sink, if any, [{n}]."
        )
    least = t if window is None else window + t - 1
    if s < least:
        kind = "a cache" if window is None else f"a ring for window {window}"
        raise ValueError(f"{kind} and a block of {t} needs {least} rows or more; this has {s}.")


def _misfit(q, keys, values, window) -> ValueError | None:
    """Why the kernel cannot take these arguments."""
    kinds = [str(x.dtype) for x in (q, keys, values)]
    if set(kinds) != {"bfloat16"}:
        return ValueError(
            f"implementation='mosaic_gpu' takes bfloat16; q, keys and values are {kinds}: cast "
            "them, or use implementation='reference'."
        )
    if q.shape[1] > MOST_TOKENS:
        return ValueError(
            f"implementation='mosaic_gpu' takes blocks of at most {MOST_TOKENS} tokens; this has "
            f"{q.shape[1]}: use implementation='reference'."
        )
    if kernel_absence():
        return None
    from pallas_kernels.attention.mosaic_gpu import shape_of

    why = shape_of(q, keys, values, window, False).misfit()
    if why is None:
        return None
    return ValueError(
        f"implementation='mosaic_gpu' cannot take {why}: use implementation='reference'."
    )


@functools.cache
def _log_once(reason: str) -> None:
    _log.warning("Decode attention runs on the slow reference: %s", reason)


def _refuse(q, keys, values, start, live, sink):
    """Stands for the kernel in programs for other platforms; to lower it raises."""
    return _refusal().bind(q, v=values.shape[3])


@functools.cache
def _refusal():
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    primitive = Primitive("decode_attention_mosaic_gpu_elsewhere")
    primitive.def_abstract_eval(lambda q, v: q.update(shape=(*q.shape[:3], v)))

    def lower(context, _, **params):
        platforms = context.module_context.platforms
        raise NotImplementedError(
            "implementation='mosaic_gpu' runs on Hopper GPUs; this program is for "
            f"{', '.join(platforms)}. Use implementation='auto' or 'reference'."
        )

    mlir.register_lowering(primitive, lower)
    return primitive
