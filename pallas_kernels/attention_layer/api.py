"""The public face of a window layer's attention: argument checks, choice of an implementation."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from pallas_kernels.attention.checks import check_block, refusal
from pallas_kernels.attention_layer.exchange import MOST_TOKENS, flag_words
from pallas_kernels.attention_layer.reference import attention_layer_reference
from pallas_kernels.choice import check_name, choose, whole_layers_wanted


def attention_layer(
    h: Float[Array, "b t d"],
    norm: Float[Array, "d"],
    qkv: Shaped[Array, "rows d"],
    qkv_scale: Float[Array, "units tiles"] | None,
    cos: Float[Array, "b t r"],
    sin: Float[Array, "b t r"],
    keys: Float[Array, "b k s h"],
    values: Float[Array, "b k s v"],
    start: Int32[Array, "b"],
    live: Int32[Array, "b"],
    sink: Float[Array, "n"] | None,
    output: Shaped[Array, "d nv"],
    output_scale: Float[Array, "units2 tiles2"] | None = None,
    *,
    flags: UInt32[Array, " words"] | None,
    word: int = 0,
    window: int,
    value_scale: float,
    epsilon: float,
    stream: bool = False,
    ahead: Shaped[Array, "..."] | None = None,
    implementation: str = "auto",
    elsewhere: Callable | None = None,
):
    """output(attention(qkv(norm(h)))) of a block against a window's ring, to which it is written.

    "reference" is plain jnp. "mosaic_gpu" is one launch for Hopper, whose thread blocks wait for
    each other's results: all must be resident. "auto" takes it in programs for GPUs traced inside
    `choice.whole_layers`, and else what the caller has instead.

    Args:
      h: rows, bfloat16 for the kernel, at most 8 of all sequences.
      norm: the weight of an RMS norm.
      qkv: queries, key and value by key/value head, as for `linear`.
      qkv_scale: of FP8 codes.
      cos: of rotated pairs.
      sin: likewise.
      keys: the ring, rotated keys.
      values: the ring.
      start: position of each block's first row.
      live: rows of each block that are written to the ring.
      sink: a logit for each head.
      output: the output projection.
      output_scale: of FP8 codes.
      flags: `flag_words` words for the kernel alone, zeros when made. Launches that use the same
        do not overlap, and have the same sizes but for b and t.
      word: the first that it takes, a multiple of 4.
      window: keys that a query sees.
      value_scale: of values.
      epsilon: of the norm.
      stream: whether h is added to the result.
      ahead: an array that a later kernel reads; brought to the L2 cache at the end.
      implementation: "auto", or the name of one, which then runs or raises.
      elsewhere: with "auto", what takes the reference's place; of all arguments up to output_scale.

    Returns:
      [b, t, d], and both caches. In one implementation a row's bits depend on what it sees alone.

    Raises:
      ValueError: on shapes or types that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    check_name(implementation)
    _check(h, qkv, cos, sin, keys, values, start, live, window, sink)
    options = dict(window=window, value_scale=float(value_scale), epsilon=epsilon, stream=stream)
    instead = implementation == "auto" and elsewhere is not None
    reference = elsewhere if instead else functools.partial(attention_layer_reference, **options)
    projected = h, norm, qkv, qkv_scale, cos, sin, keys, values, start, live, sink
    arguments = *projected, output, output_scale
    if implementation == "auto" and not whole_layers_wanted():
        return reference(*arguments)
    return choose(
        implementation,
        (*arguments, flags, ahead),
        kernel=functools.partial(_kernel, word=word, **options),
        reference=lambda *arguments: reference(*arguments[:-2]),
        refusal=_refusal(arguments, flags, word, window, value_scale),
        without="A window layer's attention runs in several launches",
    )


def _check(h, qkv, cos, sin, keys, values, start, live, window, sink):
    """Refuses what does not fit the block that `qkv` makes of h."""
    (b, t, _), groups = h.shape, keys.shape[1]
    product = jax.ShapeDtypeStruct((b, t, groups, qkv.shape[0] // groups), h.dtype)
    check_block(product, cos, sin, keys, values, start, live, window, sink)


def _kernel(h, *others, **options):
    from pallas_kernels.attention_layer.mosaic_gpu import attention_layer_mosaic

    found, keys, values = attention_layer_mosaic(h, *others, **options)
    return found["y"].reshape(h.shape), keys, values


def _refusal(arguments, flags, word, window, value_scale) -> Exception | None:
    """Why "mosaic_gpu" cannot run."""
    h, _, qkv, _, cos, _, keys, values, _, _, sink, output, _ = arguments
    rows, words = h.shape[0] * h.shape[1], flag_words(qkv.shape[0], output.shape[1])
    if flags is None or rows > MOST_TOKENS:
        return ValueError(
            f"implementation='mosaic_gpu' takes at most {MOST_TOKENS} rows, and flags; here are "
            f"{rows} rows and flags={flags if flags is None else flags.shape}: use "
            "implementation='reference'."
        )
    if flags.shape[0] < word + words or word % 4:
        return ValueError(
            f"implementation='mosaic_gpu' takes {words} flags of these sizes from word={word} on, "
            f"a multiple of 4; here are {flags.shape[0]}: make as many zeros as `flag_words` says."
        )

    def shape():
        from pallas_kernels.attention_layer.mosaic_gpu import cuts_of

        return cuts_of(h, qkv, cos, keys, values, sink, output, window, value_scale)

    return refusal(shape, dict(h=h, keys=keys, values=values), "reference")
