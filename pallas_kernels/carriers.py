"""Arrays between a kernel's hooks: flat, thread by thread, each thread's registers in vectors.

A `carrier` is the layout of such an array for the 128 threads of a warpgroup.
"""

from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptx


def carrier(per_thread: int) -> Any:
    """Layout of a flat array that holds `per_thread` 32-bit values of each of 128 threads."""
    return plgpu.Layout.WG_STRIDED((ptx.THREADS * per_thread,), vec_size=_width(per_thread))


def _width(per_thread: int) -> int:
    return next(n for n in (4, 2, 1) if per_thread % n == 0)


def carried(per_thread: int, dtype) -> Any:
    """Type of such an array, as a hook returns it."""
    shape = (ptx.THREADS * per_thread,)
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=carrier(per_thread))


def carry(registers, per_thread, signed=None):
    """The array of this thread's vectors, which hold `per_thread` values."""
    layout = carrier(per_thread).to_mgpu()
    array = np.empty(layout.registers_shape((ptx.THREADS * per_thread,)), dtype=object)
    array[:] = registers
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=signed)


def carry_values(values, signed=None):
    """The array of this thread's values."""
    width = _width(len(values))
    registers = [ptx.join(values[i : i + width]) for i in range(0, len(values), width)]
    return carry(registers, len(values), signed)


def values(fragment):
    """This thread's values in an array."""
    return [value for register in fragment.registers.flat for value in ptx.split(register)]
