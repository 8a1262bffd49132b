"""The public face of a whole mixture of experts: argument checks, choice of an implementation."""

import functools
from collections.abc import Callable

from jaxtyping import Array, Bool, Float, Shaped

from pallas_kernels.choice import check_name, choose, kernel_absence, whole_wanted
from pallas_kernels.expert_ffn import ExpertWeights, KernelWeights
from pallas_kernels.moe_layer.reference import moe_layer_reference
from pallas_kernels.router.api import check

MOST_TOKENS = 8
"""Rows that the kernel takes."""


def moe_layer(
    h: Float[Array, "t d"],
    norm: Float[Array, "d"],
    router: Shaped[Array, "n d"],
    bias: Float[Array, " n"],
    weights: ExpertWeights | KernelWeights,
    *,
    choices: int,
    epsilon: float,
    normalise: bool = True,
    scale: float = 1.0,
    live: Bool[Array, " t"] | None = None,
    stream: bool = True,
    ahead: Shaped[Array, "..."] | None = None,
    implementation: str = "auto",
    elsewhere: Callable | None = None,
) -> Float[Array, "t d"]:
    """What the experts that a router chooses make of norm(h), and h itself.

    "reference" is plain jnp. "mosaic_gpu" is one launch for Hopper, whose thread blocks wait for
    each other: all of them must be resident. "auto" takes it in programs for GPUs that are traced
    inside `choice.whole_layers("experts")`, and else what the caller has instead.

    Args:
      h: rows of the stream, bfloat16 for the kernel, at most 8.
      norm: the weight of an RMS norm.
      router: weights of the n experts, bfloat16 or float32.
      bias: of the experts, float32; it has a part in the choice alone.
      weights: of all n experts; `KernelWeights` for the kernel, whose words launches use in turn.
      choices: experts of a token.
      epsilon: of the norm.
      normalise: whether a token's routing weights are divided by their sum.
      scale: of the routing weights.
      live: tokens that count; the others choose no expert.
      stream: whether h is added.
      ahead: what a later kernel will read; brought to the L2 cache in the end.
      implementation: "auto", or the name of one, which then runs or raises.
      elsewhere: with "auto", what takes the reference's place: a function of h and live.

    Returns:
      [t, d] in h's type. Within one implementation a row's bits depend on nothing but the row.

    Raises:
      ValueError: on shapes or types that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.

    Example:
      y = moe_layer(h, norm, router, bias, pack_experts(weights), choices=8, epsilon=1e-5)
    """
    check_name(implementation)
    check(h, norm, router, bias, choices, live)
    options = dict(choices=choices, epsilon=epsilon, normalise=normalise, scale=scale)
    options |= dict(stream=stream)

    def reference(h, norm, router, bias, weights, live, _):
        if implementation == "auto" and elsewhere is not None:
            return elsewhere(h, live)
        return moe_layer_reference(h, norm, router, bias, weights, live, **options)

    arguments = h, norm, router, bias, weights, live, ahead
    if implementation == "auto" and not whole_wanted("experts"):
        return reference(*arguments)
    return choose(
        implementation,
        arguments,
        kernel=functools.partial(_kernel, **options),
        reference=reference,
        refusal=_misfit(h, norm, router, weights, choices) or kernel_absence(),
        without="Router and experts run in two launches",
    )


def _kernel(*arguments, **options):
    from pallas_kernels.moe_layer.mosaic_gpu import moe_layer_mosaic

    return moe_layer_mosaic(*arguments, **options)["y"]


def _misfit(h, norm, router, weights, choices) -> ValueError | None:
    """Why the kernel cannot take these arguments."""
    kinds = str(h.dtype), str(norm.dtype), str(router.dtype)
    why = None
    if kinds[:2] != ("bfloat16", "bfloat16") or kinds[2] not in ("bfloat16", "float32"):
        why = f"rows and norm in bfloat16, a router in bfloat16 or float32, not {', '.join(kinds)}"
    elif not isinstance(weights, KernelWeights):
        why = "experts packed by pack_experts"
    elif weights.gate_up.shape[0] != router.shape[0]:
        why = f"all {router.shape[0]} experts of the router, not {weights.gate_up.shape[0]} of them"
    elif not 1 <= h.shape[0] <= MOST_TOKENS:
        why = f"1 to {MOST_TOKENS} tokens, not {h.shape[0]}"
    else:
        from pallas_kernels.moe_layer.cut import misfit

        why = misfit(weights, h.shape[0], choices, router.dtype.itemsize == 4)
    if why is None:
        return None
    return ValueError(f"implementation='mosaic_gpu' takes {why}: use implementation='reference'.")
