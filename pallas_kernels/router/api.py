"""The public face of the router: argument checks and the choice of an implementation."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

from pallas_kernels.choice import check_name, choose, kernel_absence
from pallas_kernels.router.plan import plan_for
from pallas_kernels.router.reference import route_reference

MOST_TOKENS = 16
"""Rows for which the kernel is made."""
MOST_CHOICES = 32
"""Of a token: a lane writes each."""
MOST_EXPERTS = 1024
"""Whose scores one warp holds in registers."""

_log = logging.getLogger("pallas_kernels")


class Routed(NamedTuple):
    """What the router makes of rows.

    Attributes:
      x: the normed rows, which the experts read.
      ids: of the chosen experts, best first.
      weights: of the choices, float32.
    """

    x: Float[Array, "t d"]
    ids: Int32[Array, "t c"]
    weights: Float[Array, "t c"]


def new_counter() -> UInt32[Array, "1"]:
    """What `route` counts thread blocks with: made once, held beside the weights."""
    return jnp.zeros(1, jnp.uint32)


def route(
    h: Float[Array, "t d"],
    norm: Float[Array, "d"],
    weight: Shaped[Array, "e d"],
    bias: Float[Array, " e"],
    *,
    choices: int,
    epsilon: float,
    normalise: bool = True,
    scale: float = 1.0,
    live: Bool[Array, " t"] | None = None,
    counter: UInt32[Array, " words"] | None = None,
    word: int = 0,
    elsewhere: Callable | None = None,
    implementation: str = "auto",
) -> Routed:
    """An RMS norm of each row, its experts' sigmoid scores in float32, and the best of them.

    Experts are chosen by score plus bias, ties by lowest id; a choice weighs what its score is,
    divided by the sum of the token's if `normalise`, times `scale`.

    "reference" is plain jnp in float32 and takes any number of tokens. "mosaic_gpu" is the kernel
    for Hopper: one launch, bfloat16 rows, at most 16. "auto" takes the kernel where it can run: in
    a program for GPUs. On a GPU without the kernel, or with arguments that it does not take, the
    reason is logged once.

    Args:
      h: rows of the stream.
      norm: weight of the norm: x = h / rms(h), rounded to h's type, times this.
      weight: of the experts, bfloat16 or float32.
      bias: of the experts, float32; it has a part in the choice alone.
      choices: experts of a token.
      epsilon: of the norm.
      normalise: whether weights are divided by their sum.
      scale: of the weights.
      live: tokens that count; the ids of the others are -1, their weights what they would be.
      counter: uint32 words of which the kernel uses `word`, zero when made. It writes there, and
        leaves a zero. Two launches that may run at once need two words.
      word: of the counter.
      elsewhere: with "auto", what takes the reference's place: a function of h and live, which
        returns rows, ids and weights.
      implementation: "auto", or the name of one, which then runs or raises.

    Returns:
      rows, ids and weights. Within one implementation the bits of a row of any of them depend on
      nothing but the row: not on t, its place, or other rows.

    Raises:
      ValueError: on shapes or types that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    check_name(implementation)
    _check(h, norm, weight, bias, choices, live)
    options = dict(choices=choices, epsilon=epsilon, normalise=normalise, scale=scale)

    def reference(h, norm, weight, bias, live, _):
        if implementation == "auto" and elsewhere is not None:
            return tuple(elsewhere(h, live))
        return tuple(route_reference(h, norm, weight, bias, live, **options))

    def kernel(*arguments):
        from pallas_kernels.router.mosaic_gpu import route_mosaic

        return tuple(route_mosaic(*arguments, word=word, **options))

    found = choose(
        implementation,
        (h, norm, weight, bias, live, counter),
        kernel=kernel,
        reference=reference,
        refusal=misfit(h, norm, weight, choices, counter, word) or kernel_absence(),
        without="A router runs on the slow reference",
    )
    return Routed(*found)


def misfit(h, norm, weight, choices: int, counter, word: int = 0) -> ValueError | None:
    """Why the kernel cannot take these arguments."""
    kinds = str(h.dtype), str(norm.dtype), str(weight.dtype)
    why = None
    if kinds[:2] != ("bfloat16", "bfloat16") or kinds[2] not in ("bfloat16", "float32"):
        why = (
            f"rows and norm in bfloat16, weights in bfloat16 or float32, not {', '.join(kinds)}: "
            "cast them"
        )
    elif not 1 <= h.shape[0] <= MOST_TOKENS:
        why = f"1 to {MOST_TOKENS} tokens, not {h.shape[0]}: call it for fewer"
    elif choices > MOST_CHOICES or weight.shape[0] > MOST_EXPERTS:
        why = (
            f"at most {MOST_CHOICES} choices of {MOST_EXPERTS} experts, not {choices} of "
            f"{weight.shape[0]}: use fewer"
        )
    elif plan_for(*weight.shape) is None:
        why = f"rows that can be cut among warps, not of {weight.shape[1]}: pad them"
    elif counter is None or not 0 <= word < counter.size:
        have = "none" if counter is None else f"word {word} of {counter.size}"
        why = f"a word to count thread blocks with, not {have}: make one with new_counter()"
    if why is None:
        return None
    return ValueError(
        f"implementation='mosaic_gpu' takes {why}, or use implementation='reference'."
    )


def _check(h, norm, weight, bias, choices, live):
    """Shapes that mean something, whatever implementation runs."""
    if h.ndim != 2 or norm.shape != h.shape[1:] or weight.shape[1:] != h.shape[1:]:
        raise ValueError(
            f"h {h.shape}, norm {norm.shape} and weight {weight.shape} must be [t, d], [d] and "
            "[e, d]."
        )
    experts = weight.shape[0]
    if bias.shape != (experts,) or bias.dtype != jnp.float32:
        raise ValueError(f"bias is {bias.dtype} {bias.shape}; it must be float32 [{experts}].")
    if not 1 <= choices <= experts:
        raise ValueError(f"choices={choices} is not 1 to {experts}, the number of experts.")
    if live is not None and live.shape != h.shape[:1]:
        raise ValueError(f"live is {live.shape}; it must be [{h.shape[0]}].")
