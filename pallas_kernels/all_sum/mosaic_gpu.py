"""Exchanges on Hopper: plain stores into other GPUs' memory, of words that are their own signal."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Shaped, UInt32

from pallas_kernels import ptx
from pallas_kernels.all_sum.mail import EMPTY, Mail
from pallas_kernels.all_sum.ptx import exchange_of, opening

_REF, _SPLAT = plgpu.RefType(), plgpu.Layout.WG_SPLAT


def open_mail_mosaic(axis: str, most_bytes: int) -> UInt32[Array, "..."]:
    """See `api.open_mail`."""
    mail = Mail.holding(lax.axis_size(axis), most_bytes)
    # Two values side by side, so that one kernel writes them.
    empty = jnp.full(mail.words, EMPTY, jnp.uint32)
    words = jnp.where(jnp.arange(mail.words, dtype=jnp.int32) < mail.slots, jnp.uint32(0), empty)
    ref = jax.new_ref(words)
    _open(ref, axis, mail.devices)
    return jax.freeze(ref)


def _open(mail_ref, axis: str, devices: int) -> None:
    """Writes the header; the barrier of all devices that comes before it makes sure of the rest."""
    program = opening(devices)

    def open_mail(ref):
        rank = lax.axis_index(axis)
        peers = [plgpu.remote_ref(ref, {axis: peer}) for peer in range(devices)]

        @plgpu.inline_mgpu(arg_types=(_REF, _SPLAT, *[_REF] * devices))
        def run(_, own, rank, *others):
            pointers = [utils.memref_ptr(other) for other in others]
            operands = [utils.memref_ptr(own), ptx.scalar(rank), *pointers]
            ptx.asm(None, operands, program, "l,r" + ",l" * devices, effects=True)

        run(ref, rank, *peers)

    plgpu.kernel(open_mail, grid=(1,), grid_names=("block",), compiler_params=_parameters())(
        mail_ref
    )


@functools.partial(jax.jit, static_argnames=("axis", "total"))
def exchange_mosaic(
    x: Shaped[Array, "..."],
    mail: UInt32[Array, "..."],
    residual: Shaped[Array, "..."] | None,
    axis: str,
    *,
    total: bool,
) -> tuple[Shaped[Array, "..."], UInt32[Array, "..."]]:
    """All devices' arrays, added up or one after the other.

    Args:
      x: float32, bfloat16, int32 or uint32.
      mail: the mailbox, which is used in place.
      residual: like x, to be added to the sum.
      axis: of the mesh.
      total: whether to add.

    Returns:
      the sum, like x, or [devices, *x.shape]; the mailbox.
    """
    devices = lax.axis_size(axis)
    added = [] if residual is None else [residual]
    exchange = exchange_of(x, Mail.of(mail.size, devices), total=total, residual=bool(added))
    dtype = x.dtype
    # A slice that only this kernel reads XLA would not make, but fuse with it, and leave the graph.
    x, *added = lax.optimization_barrier((x, *added))
    if exchange.kind == "f32":
        x, *added = [array.astype(jnp.float32) for array in (x, *added)]
    program, more = exchange.program(), len(added)

    def body(x_ref, mail_ref, *rest):
        *added_ref, out_ref = rest

        @plgpu.inline_mgpu(arg_types=(_REF, _REF, _REF, _SPLAT, *[_REF] * more))
        def run(_, x, mail, out, block, *added):
            x, mail, out, *added = [utils.memref_ptr(ref) for ref in (x, mail, out, *added)]
            operands = [x, mail, out, ptx.scalar(block), *added]
            ptx.asm(None, operands, program, "l,l,l,r" + ",l" * more, effects=True)

        run(x_ref, mail_ref, out_ref, lax.axis_index("block"), *added_ref)

    body.__name__ = "all_sum" if total else "all_gather"
    shape = x.shape if total else (devices, *x.shape)
    ref = jax.new_ref(mail)
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, x.dtype),
        grid=(exchange.blocks,),
        grid_names=("block",),
        compiler_params=_parameters(),
    )(x, ref, *added)
    return lax.optimization_barrier(out).astype(dtype), jax.freeze(ref)


def _parameters() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(unsafe_no_auto_barriers=True)
