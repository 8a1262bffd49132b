"""Which implementation of a kernel runs: the one named, or what suits the program's platform."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

IMPLEMENTATIONS = ("auto", "reference", "mosaic_gpu")
LEAST_JAX = (0, 11, 2)
"""The first jax whose Mosaic GPU the kernels are written for; it needs Python 3.12."""
HOPPER = "9."

_OFF = contextvars.ContextVar("kernels are off", default=False)
_WHOLE = contextvars.ContextVar("whole layers in one launch", default=False)
_log = logging.getLogger("pallas_kernels")


@contextlib.contextmanager
def without_kernels():
    """What is traced meanwhile has none of the package's kernels: to compare with what has them."""
    before = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(before)


@contextlib.contextmanager
def whole_layers():
    """What is traced meanwhile has each window layer's attention in one launch, where it fits."""
    before = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(before)


def whole_layers_wanted() -> bool:
    """Whether tracing is inside `whole_layers`."""
    return _WHOLE.get()


def kernel_absence() -> NotImplementedError | None:
    """Why "mosaic_gpu" cannot run here, whatever its arguments; None if there is no reason.

    A machine without a GPU gives none: its programs may be compiled for another.
    """
    if _OFF.get():
        return NotImplementedError("implementation='mosaic_gpu' is switched off: without_kernels.")
    if jax.__version_info__ < LEAST_JAX:
        return NotImplementedError(
            "implementation='mosaic_gpu' needs jax >= 0.11.2, on Python 3.12 or newer; here is jax "
            f"{jax.__version__}. Install mimo-jax[cuda13] there, or use implementation='reference'."
        )
    if jax.default_backend() == "gpu":
        device = jax.devices()[0]
        capability = str(getattr(device, "compute_capability", "unknown"))
        if not capability.startswith(HOPPER):
            return NotImplementedError(
                f"implementation='mosaic_gpu' is for Hopper GPUs (compute capability 9.0); "
                f"{device.device_kind} has {capability}. Use implementation='reference'."
            )
    return None


def check_name(implementation: str, names: Sequence[str] = IMPLEMENTATIONS) -> None:
    """Refuses an implementation that does not exist.

    Raises:
      ValueError: if it is not one of the names.
    """
    if implementation not in names:
        raise ValueError(f"implementation={implementation!r} is not one of {names}.")


def choose(
    implementation: str,
    arguments: tuple,
    *,
    kernel: Callable,
    reference: Callable,
    refusal: Exception | None,
    without: str,
) -> Any:
    """Runs the kernel or the reference.

    Args:
      implementation: one of `IMPLEMENTATIONS`. "auto" takes the kernel in programs for GPUs, which
        is known when they are lowered, so that no branch is left in them.
      arguments: of either.
      kernel: only called if nothing refuses it, so that it may import what others lack.
      reference: with "auto", what runs without the kernel; else it also says what is returned.
      refusal: why the kernel cannot run.
      without: what to log once on a GPU that runs the reference, beside the reason.

    Raises:
      Exception: the refusal, if the kernel was named.
      NotImplementedError: when a program for another platform is lowered with the kernel named.
    """
    if implementation == "reference":
        return reference(*arguments)
    if refusal is None:
        default = reference if implementation == "auto" else functools.partial(_refuse, reference)
        return jax.lax.platform_dependent(*arguments, cuda=kernel, default=default)
    if implementation == "mosaic_gpu":
        raise refusal
    if jax.default_backend() == "gpu":
        log_once(without, str(refusal))
    return reference(*arguments)


@functools.cache
def log_once(what: str, reason: str) -> None:
    """A warning, the first time that it is given."""
    _log.warning("%s: %s", what, reason)


def _refuse(reference, *arguments):
    """Stands for the kernel in programs for other platforms; to lower it raises."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(reference, *arguments))
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return tree.unflatten(_kernel_elsewhere().bind(kinds=kinds))


@functools.cache
def _kernel_elsewhere():
    from jax.core import ShapedArray
    from jax.extend.core import Primitive
    from jax.interpreters import mlir

    primitive = Primitive("mosaic_gpu_elsewhere")
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda kinds: [ShapedArray(*kind) for kind in kinds])

    def lower(context, **_):
        platforms = context.module_context.platforms
        raise NotImplementedError(
            "implementation='mosaic_gpu' runs on Hopper GPUs; this program is for "
            f"{', '.join(platforms)}. Use implementation='auto' or 'reference'."
        )

    mlir.register_lowering(primitive, lower)
    return primitive
