"""The public face of the expert FFN: argument checks and the choice of an implementation."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped, UInt8

from pallas_kernels.choice import check_name, choose, kernel_absence
from pallas_kernels.expert_ffn.layout import KernelWeights, unpack_experts
from pallas_kernels.expert_ffn.reference import expert_ffn_reference
from pallas_kernels.expert_ffn.slots import out_dtype_of
from pallas_kernels.mxfp4 import BLOCK

MOST_CHOICES = 1 << 15
"""Choices (tokens times choices a token) of a kernel call: its work list compares all pairs."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """One layer's experts: packed MXFP4 (with scales) or dense (without).

    `gate_up[:, 0]` is the gate projection and `gate_up[:, 1]` the up projection; rows are outputs,
    columns inputs, two MXFP4 columns a byte.
    """

    gate_up: Shaped[Array, "e 2 f d_stored"]
    down: Shaped[Array, "e d f_stored"]
    gate_up_scale: UInt8[Array, "e 2 f d_blocks"] | None = None
    down_scale: UInt8[Array, "e d f_blocks"] | None = None

    @property
    def packed(self) -> bool:
        """Whether the weights are MXFP4."""
        return self.gate_up_scale is not None


def expert_ffn(
    x: Float[Array, "t d"],
    weights: ExpertWeights | KernelWeights,
    expert_ids: Int32[Array, "t c"],
    routing: Float[Array, "t c"],
    *,
    residual: Float[Array, "t d"] | None = None,
    ahead: Shaped[Array, "..."] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "t d"]:
    """Sums each token's chosen experts: routing * down(silu(gate x) * (up x)).

    "reference" is plain jnp in float32 and takes all weights. "mosaic_gpu" is the kernel for
    Hopper: it takes `KernelWeights`, made once by `pack_experts`, and x in bfloat16, any number of
    tokens. "auto" takes the kernel where it can run: in a program for GPUs, given KernelWeights.
    The program's platform is known when it is lowered, so that traces under jit, shard_map or for a
    described device are all the same. On a GPU without the kernel, the reason is logged once.

    Args:
      x: tokens.
      weights: all experts of a layer.
      expert_ids: each token's c choices. An id outside [0, e) is a dead choice: it adds nothing and
        no weight is read for it.
      routing: float32 weights of the choices.
      residual: bfloat16, added to the sums before they are rounded.
      ahead: what a later kernel will read; the kernel for at most 8 tokens brings it to the L2
        cache in the end.
      out_dtype: float32 or bfloat16; by default float32, with a residual its type.
      implementation: "auto", or the name of one, which then runs or raises.

    Returns:
      sums in ascending order of expert id, so that a token's bits never depend on the others; made
      in float32 and rounded once, if at all. Both implementations round hidden values to x's type,
      after their routing weight, so that what they give differs by the order of sums.

    Raises:
      ValueError: on shapes, types or weights that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    check_name(implementation)
    _check(x, weights, expert_ids, routing)
    _check_residual(x, residual)
    out_dtype = out_dtype_of(residual, out_dtype)
    return choose(
        implementation,
        (x, weights, expert_ids, routing, residual, ahead),
        kernel=partial(_kernel, out_dtype=out_dtype),
        reference=partial(_reference, out_dtype=out_dtype),
        refusal=_misfit(x, weights, expert_ids) or kernel_absence(),
        without="Experts run on the slow reference",
    )


def _kernel(*arguments, out_dtype):
    from pallas_kernels.expert_ffn.mosaic_gpu import expert_ffn_mosaic

    return expert_ffn_mosaic(*arguments, out_dtype=out_dtype)


def _reference(x, weights, expert_ids, routing, residual, ahead, *, out_dtype):
    if isinstance(weights, KernelWeights):
        weights = ExpertWeights(*unpack_experts(weights))
    y = expert_ffn_reference(x, weights, expert_ids, routing)
    if residual is not None:
        y = residual.astype(jnp.float32) + y
    return y.astype(out_dtype)


def _misfit(x, weights, expert_ids) -> ValueError | None:
    """Why the kernel cannot take these arguments."""
    if not isinstance(weights, KernelWeights):
        kind = "MXFP4 in the checkpoint's order" if weights.packed else "dense"
        way = (
            "pack them once, at load, with pack_experts"
            if weights.packed
            else "quantise them first"
        )
        return ValueError(
            f"implementation='mosaic_gpu' takes KernelWeights; these are {kind}: {way}."
        )
    if x.dtype != jnp.bfloat16:
        return ValueError(
            f"implementation='mosaic_gpu' takes x in bfloat16, not {x.dtype}: cast it, or use "
            "implementation='reference'."
        )
    if expert_ids.size > MOST_CHOICES:
        return ValueError(
            f"implementation='mosaic_gpu' takes at most {MOST_CHOICES} choices a call; expert_ids "
            f"{expert_ids.shape} has {expert_ids.size}: call it for fewer tokens."
        )
    return None


def _check_residual(x, residual):
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, "bfloat16"):
        raise ValueError(
            f"residual is {residual.dtype} {residual.shape}; x {x.shape} needs bfloat16 {x.shape}."
        )


def _check(x, weights, expert_ids, routing):
    d = x.shape[-1]
    if expert_ids.shape != routing.shape or expert_ids.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"x {x.shape}, expert_ids {expert_ids.shape} and routing {routing.shape} must be "
            "[t, d], [t, c] and [t, c]."
        )
    if isinstance(weights, KernelWeights):
        up, down = weights.gate_up_plan, weights.down_plan
        if (up.columns, down.rows, 2 * down.columns) != (d, d, up.rows):
            raise ValueError(
                f"x has {d} columns; these weights are for gate/up [{up.rows}, {up.columns}] "
                f"and down [{down.rows}, {down.columns}]."
            )
        return
    experts, _, width, _ = weights.gate_up.shape
    columns = (d, width)
    stored = tuple(n // 2 for n in columns) if weights.packed else columns
    expected = {"gate_up": (experts, 2, width, stored[0]), "down": (experts, d, stored[1])}
    if weights.packed:
        expected["gate_up_scale"] = (experts, 2, width, columns[0] // BLOCK)
        expected["down_scale"] = (experts, d, columns[1] // BLOCK)
    for name, shape in expected.items():
        actual = getattr(weights, name).shape
        if actual != shape:
            raise ValueError(
                f"{name} has shape {actual}, but x {x.shape} and gate_up {weights.gate_up.shape} "
                f"need {shape} ({'MXFP4, blocks of 32' if weights.packed else 'dense'} weights)."
            )
