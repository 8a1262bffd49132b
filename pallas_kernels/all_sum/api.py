"""The public face of sums over devices: argument checks and the choice of an implementation."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped, UInt32

from pallas_kernels.all_sum.mail import EMPTY, MOST_BYTES, MOST_DEVICES, Mail
from pallas_kernels.all_sum.ptx import KINDS, exchange_of
from pallas_kernels.all_sum.reference import all_gather_reference, all_sum_reference
from pallas_kernels.choice import check_name, choose, kernel_absence

_WITHOUT = "A sum over devices is XLA's"


def open_mail(
    axis: str, most_bytes: int = MOST_BYTES, *, implementation: str = "auto"
) -> UInt32[Array, "..."]:
    """Makes this device's mailbox; to be called inside `shard_map`, once, outside of loops.

    Each exchange takes the mailbox and returns it, to be given to the next one, as a loop's carry
    too: the same memory, in which nothing but the exchanges may write. All devices must make the
    same exchanges in the same order.

    Args:
      axis: of the mesh, over 2 to 8 devices of one process.
      most_bytes: of an array to be exchanged.
      implementation: see `all_sum`.

    Raises:
      ValueError: on more devices, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    devices = lax.axis_size(axis)
    if not 2 <= devices <= MOST_DEVICES:
        raise ValueError(f"axis {axis!r} has {devices} devices; mailboxes are for 2 to 8.")
    words = Mail.holding(devices, most_bytes).words

    def shut():
        return jnp.full(words, EMPTY, jnp.uint32)

    def opened():
        from pallas_kernels.all_sum.mosaic_gpu import open_mail_mosaic

        return open_mail_mosaic(axis, most_bytes)

    check_name(implementation)
    options = dict(kernel=opened, reference=shut, refusal=kernel_absence(), without=_WITHOUT)
    return choose(implementation, (), **options)


def all_sum(
    x: Shaped[Array, "..."],
    mail: UInt32[Array, "..."],
    axis: str,
    *,
    residual: Shaped[Array, "..."] | None = None,
    implementation: str = "auto",
) -> tuple[Shaped[Array, "..."], UInt32[Array, "..."]]:
    """Sums small arrays over the devices of a mesh axis, inside `shard_map`.

    Floats are added in float32, in the order of the ranks, and rounded once: all devices get the
    same bits. "reference" is XLA's all-gather and a sum. "mosaic_gpu" is the kernel for Hopper,
    which a CUDA graph can hold. "auto" takes the kernel in programs for GPUs.

    Args:
      x: float32, bfloat16, int32 or uint32, for the kernel.
      mail: of `open_mail`, or what the last exchange returned.
      axis: of the mesh.
      residual: like x, the same on all devices; added last, before the sum is rounded.
      implementation: "auto", or the name of one, which then runs or raises.

    Returns:
      the sum; the mailbox.

    Raises:
      ValueError: on arrays that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} {residual.shape}; x is {x.dtype} {x.shape}."
        )
    return _exchange(x, mail, axis, implementation, residual, total=True)


def all_gather(
    x: Shaped[Array, "..."],
    mail: UInt32[Array, "..."],
    axis: str,
    *,
    implementation: str = "auto",
) -> tuple[Shaped[Array, "devices ..."], UInt32[Array, "..."]]:
    """Small arrays of all devices of a mesh axis, in the order of the ranks, inside `shard_map`.

    Args and implementations are those of `all_sum`. Integers come as they are, and so do floats
    but for one NaN, all of whose bits are set.
    """
    return _exchange(x, mail, axis, implementation, None, total=False)


def has_mail(devices: Sequence[int]) -> bool:
    """Whether the kernel can run on a mesh of GPUs with these ids, in this order."""
    in_order = list(devices) == list(range(len(devices)))
    return 2 <= len(devices) <= MOST_DEVICES and in_order and kernel_absence() is None


def misfit(x, words: int, devices: int) -> ValueError | None:
    """Why the kernel cannot take this array with a mailbox of so many words, or None."""
    if x.dtype.name not in KINDS:
        return ValueError(
            f"implementation='mosaic_gpu' takes {', '.join(KINDS)}, not {x.dtype}: cast it, or "
            "use implementation='reference'."
        )
    box, size = Mail.of(words, devices), math.prod(x.shape)
    if size == 0 or exchange_of(x, box, total=True).threads > box.threads:
        return ValueError(
            f"implementation='mosaic_gpu' cannot take {x.dtype} {x.shape} with a mailbox of "
            f"{box.threads} threads: open a larger one, or use implementation='reference'."
        )
    return None


def _exchange(x, mail, axis, implementation, residual, *, total):
    check_name(implementation)

    def reference(x, mail, residual):
        y = all_sum_reference(x, axis, residual) if total else all_gather_reference(x, axis)
        return y, mail

    def kernel(x, mail, residual):
        from pallas_kernels.all_sum.mosaic_gpu import exchange_mosaic

        return exchange_mosaic(x, mail, residual, axis, total=total)

    reason = misfit(x, mail.size, lax.axis_size(axis)) or kernel_absence()
    options = dict(kernel=kernel, reference=reference, refusal=reason, without=_WITHOUT)
    return choose(implementation, (x, mail, residual), **options)
