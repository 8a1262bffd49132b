"""The public face of sums over devices: argument checks and the choice of an implementation."""

import functools
import logging
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped, UInt32

from pallas_kernels.all_sum.mail import EMPTY, MOST_BYTES, MOST_DEVICES, Mail
from pallas_kernels.all_sum.ptx import KINDS, exchange_of
from pallas_kernels.all_sum.reference import all_gather_reference, all_sum_reference
from pallas_kernels.expert_ffn.api import IMPLEMENTATIONS, kernel_absence

_log = logging.getLogger("pallas_kernels")


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

    return _choose(implementation, kernel_absence(), opened, shut)


def all_sum(
    x: Shaped[Array, "..."],
    mail: UInt32[Array, "..."],
    axis: str,
    *,
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
      implementation: "auto", or the name of one, which then runs or raises.

    Returns:
      the sum; the mailbox.

    Raises:
      ValueError: on arrays that do not fit, or an unknown implementation.
      NotImplementedError: if "mosaic_gpu" cannot run here.
    """
    return _exchange(x, mail, axis, implementation, total=True)


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
    return _exchange(x, mail, axis, implementation, total=False)


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


def _exchange(x, mail, axis, implementation, *, total):
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}.")
    meaning = all_sum_reference if total else all_gather_reference

    def reference(x, mail):
        return meaning(x, axis), mail

    def kernel(x, mail):
        from pallas_kernels.all_sum.mosaic_gpu import exchange_mosaic

        return exchange_mosaic(x, mail, axis, total=total)

    reason = misfit(x, mail.size, lax.axis_size(axis)) or kernel_absence()
    return _choose(implementation, reason, kernel, reference, x, mail)


def _choose(implementation, reason, kernel, reference, *arguments):
    """Calls what was named, or what suits the platform of the program."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}.")
    if implementation == "reference":
        return reference(*arguments)
    if implementation == "mosaic_gpu":
        if reason is not None:
            raise reason
        refuse = functools.partial(_refuse, jax.eval_shape(reference, *arguments))
        return lax.platform_dependent(*arguments, cuda=kernel, default=refuse)
    if reason is None:
        return lax.platform_dependent(*arguments, cuda=kernel, default=reference)
    if jax.default_backend() == "gpu":
        _log_once(str(reason))
    return reference(*arguments)


def _refuse(results, *_):
    """Stands for the kernel in programs for other platforms; to lower it raises."""
    leaves, tree = jax.tree.flatten(results)
    kinds = tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)
    return tree.unflatten(_refusal().bind(kinds=kinds))


@functools.cache
def _refusal():
    from jax.core import ShapedArray
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    primitive = Primitive("all_sum_mosaic_gpu_elsewhere")
    primitive.multiple_results = True
    primitive.def_abstract_eval(
        lambda kinds: [ShapedArray(shape, jnp.dtype(name)) for shape, name in kinds]
    )

    def lower(context, **_):
        platforms = context.module_context.platforms
        raise NotImplementedError(
            "implementation='mosaic_gpu' runs on Hopper GPUs; this program is for "
            f"{', '.join(platforms)}. Use implementation='auto' or 'reference'."
        )

    mlir.register_lowering(primitive, lower)
    return primitive


@functools.cache
def _log_once(reason: str) -> None:
    _log.warning("A sum over devices is XLA's: %s", reason)
