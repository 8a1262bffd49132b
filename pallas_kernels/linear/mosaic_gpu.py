"""The few-token linear on Hopper: weights streamed as they are stored, into tensor cores."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.linear.block import Block
from pallas_kernels.linear.plan import Plan, plan_for
from pallas_kernels.linear.reference import rms_norm

_STATIC = ("epsilon", "out_dtype", "ahead_bytes", "plan", "interpret", "hooks")


@functools.partial(jax.jit, static_argnames=_STATIC)
def linear_mosaic(
    x: Float[Array, "t d"],
    weight: Shaped[Array, "n d"],
    scale: Float[Array, "units tiles"] | None = None,
    norm: Float[Array, "d"] | None = None,
    epsilon: float = 0.0,
    residual: Float[Array, "t n"] | None = None,
    ahead: Shaped[Array, "..."] | None = None,
    *,
    ahead_bytes: int | None = None,
    out_dtype=jnp.float32,
    plan: Plan | None = None,
    interpret=None,
    hooks=None,
) -> Float[Array, "t n"]:
    """See `api.linear`.

    Args:
      x: tokens, bfloat16.
      weight: as stored.
      scale: of FP8 weights.
      norm: weight of an RMS norm of x.
      epsilon: of the norm.
      residual: added in float32, before the result is rounded.
      ahead: what a later kernel will read.
      ahead_bytes: of it to be brought to the L2 cache; None for all.
      out_dtype: bfloat16 or float32.
      plan: how the matrix is cut; a benchmark's choice. It decides over the result's bits.
      interpret: Pallas' interpreter parameters, to run on a CPU.
      hooks: makes the `Hooks` from plan, t, unit and epsilon.
    """
    plan = plan or plan_for(*weight.shape, weight.dtype.itemsize)
    if norm is not None and plan.split > 1:
        x, norm = rms_norm(x, norm, epsilon), None
    cut = plan.rows, plan.split, plan.parts, plan.warps, plan.part_columns
    inputs = dict(weight=weight.reshape(cut))
    others = (("scale", scale), ("norm", norm), ("ahead", ahead))
    inputs |= {k: v for k, v in others if v is not None}
    if ahead is not None and ahead_bytes is None:
        ahead_bytes = ahead.nbytes
    unit = 0 if scale is None else plan.rows // scale.shape[0]
    whole = plan.split == 1
    parts = []
    for start in range(0, x.shape[0], plan.tokens):
        rows = x[start : start + plan.tokens]
        make = _hooks(hooks, interpret)
        block = Block(plan, make(plan, rows.shape[0], unit, epsilon), ahead_bytes or 0)
        given = dict(x=rows, **inputs)
        if residual is not None and whole:
            given["residual"] = residual[start : start + plan.tokens]
        shape = (plan.split, rows.shape[0], plan.rows)
        out = jax.ShapeDtypeStruct(shape, out_dtype if whole else jnp.float32)
        parts.append(block.call(given, out, interpret))
    y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    # In order; XLA fuses it with what follows.
    y = functools.reduce(jnp.add, list(y))
    if residual is not None and not whole:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def _hooks(hooks, interpret):
    if hooks is not None:
        return hooks
    if interpret is None:
        from pallas_kernels.linear.lanes import Lanes

        return Lanes
    from pallas_kernels.linear.interpreted import Interpreted

    return Interpreted
