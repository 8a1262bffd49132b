"""The public face of the few-token linear: argument checks and the choice of an implementation."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.choice import check_name, choose, kernel_absence
from pallas_kernels.linear.plan import SEGMENT, plan_for
from pallas_kernels.linear.reference import linear_reference

MOST_TOKENS = 16
"""Rows of x for which the kernel is made; XLA's own product is better for many."""
UNITS = (64, 128)
"""Rows that can share a scale."""


def linear(
    x: Float[Array, "t d"],
    weight: Shaped[Array, "n d"],
    scale: Float[Array, "units tiles"] | None = None,
    *,
    norm: Float[Array, "d"] | None = None,
    epsilon: float = 1e-5,
    residual: Float[Array, "t n"] | None = None,
    ahead: Shaped[Array, "..."] | None = None,
    out_dtype=jnp.bfloat16,
    implementation: str = "auto",
    elsewhere: Callable | None = None,
) -> Float[Array, "t n"]:
    """x @ weight^T for a few tokens, with float32 accumulation; optionally an RMS norm of x first.

    "reference" is plain jnp in float32 and takes any number of tokens. "mosaic_gpu" is the kernel
    for Hopper: x in bfloat16, at most 16 rows, weights as a checkpoint stores them. "auto" takes
    the kernel where it can run: in a program for GPUs. On a GPU without the kernel, or with
    arguments that it does not take, the reason is logged once.

    Args:
      x: tokens.
      weight: bfloat16, or float8_e4m3fn codes (none of them NaN) with `scale`.
      scale: float32, for n / units rows (64 or 128) and 128 columns of FP8 codes.
      norm: the weight of an RMS norm; x is divided by its root mean square, rounded to its type,
        and multiplied with this.
      epsilon: of the norm.
      residual: bfloat16, added in float32 before the result is rounded.
      ahead: what a later kernel will read, which this one brings to the L2 cache in the end.
      out_dtype: bfloat16 or float32.
      implementation: "auto", or the name of one, which then runs or raises.
      elsewhere: with "auto", what takes the reference's place: a function of x, weight, scale, norm
        and residual. A model has a way of its own, whose bits it keeps where there is no kernel.

    Returns:
      [t, n]. Within one implementation a row's bits depend on nothing but the row: not on t, its
      place, or other rows.

    Raises:
      ValueError: on shapes, types or weights that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    check_name(implementation)
    _check(x, weight, scale, norm, residual, out_dtype)
    options = dict(epsilon=epsilon, out_dtype=jnp.dtype(out_dtype))
    reference = functools.partial(_reference, **options)
    if implementation == "auto" and elsewhere is not None:
        reference = elsewhere
    return choose(
        implementation,
        (x, weight, scale, norm, residual, ahead),
        kernel=functools.partial(_kernel, **options),
        reference=lambda *arguments: reference(*arguments[:-1]),
        refusal=misfit(x, weight) or kernel_absence(),
        without="A linear runs on the slow reference",
    )


def _kernel(x, weight, scale, norm, residual, ahead, *, epsilon, out_dtype):
    from pallas_kernels.linear.mosaic_gpu import linear_mosaic

    given = x, weight, scale, norm, epsilon, residual, ahead
    return linear_mosaic(*given, out_dtype=out_dtype)


def _reference(x, weight, scale, norm, residual, *, epsilon, out_dtype):
    return linear_reference(x, weight, scale, norm, epsilon, residual, out_dtype=out_dtype)


def misfit(x, weight) -> ValueError | None:
    """Why the kernel cannot take these arguments."""
    if x.dtype != jnp.bfloat16:
        return ValueError(
            f"implementation='mosaic_gpu' takes x in bfloat16, not {x.dtype}: cast it, or use "
            "implementation='reference'."
        )
    if weight.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return ValueError(
            f"implementation='mosaic_gpu' takes weights in bfloat16 or float8_e4m3fn, not "
            f"{weight.dtype}: cast them, or use implementation='reference'."
        )
    if not 1 <= x.shape[0] <= MOST_TOKENS:
        return ValueError(
            f"implementation='mosaic_gpu' takes 1 to {MOST_TOKENS} tokens, not {x.shape[0]}: for "
            "many, XLA's own product is better."
        )
    if plan_for(*weight.shape, weight.dtype.itemsize) is None:
        return ValueError(
            f"implementation='mosaic_gpu' has no way to cut {weight.dtype} weights "
            f"{weight.shape}: use implementation='reference'."
        )
    return None


def _check(x, weight, scale, norm, residual, out_dtype):
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {x.shape} and weight {weight.shape} must be [t, d] and [n, d].")
    if norm is not None and (norm.shape != x.shape[1:] or norm.dtype != x.dtype):
        raise ValueError(
            f"norm is {norm.dtype} {norm.shape}; x {x.dtype} {x.shape} needs {x.dtype} "
            f"{x.shape[1:]}."
        )
    wanted = x.shape[0], weight.shape[0]
    if residual is not None and (residual.shape != wanted or residual.dtype != jnp.bfloat16):
        raise ValueError(
            f"residual is {residual.dtype} {residual.shape}; x {x.shape} and weight {weight.shape} "
            f"need bfloat16 {wanted}."
        )
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"out_dtype={jnp.dtype(out_dtype)} is not bfloat16 or float32.")
    if (weight.dtype == jnp.float8_e4m3fn) != (scale is not None):
        raise ValueError(
            f"weight is {weight.dtype}, scale is {'missing' if scale is None else 'given'}: "
            "float8_e4m3fn weights have scales, no others do."
        )
    if scale is None:
        return
    n, d = weight.shape
    shapes = [(n // unit, -(-d // SEGMENT)) for unit in UNITS if n % unit == 0]
    if scale.dtype != jnp.float32 or scale.shape not in shapes:
        raise ValueError(
            f"scale is {scale.dtype} {scale.shape}; weight {weight.shape} needs float32, one for "
            f"64 or 128 rows that divide {n} and 128 columns: {shapes}."
        )
