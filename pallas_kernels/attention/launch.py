"""Launches lane code: a `run(machine, block, refs)`, written for a `Machine`'s threads."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def launch_lanes(
    work,
    inputs: dict,
    out: jax.ShapeDtypeStruct,
    *,
    blocks: int,
    warps: int,
    shared: dict[str, int],
    name: str,
):
    """Runs `work.run` in so many thread blocks of so many warps; what it wrote to `out`.

    Args:
      work: its `run` is given memory by name: the inputs, "out", and what is shared.
      inputs: arrays, or references to write to.
      out: shape and type of what is written.
      blocks: thread blocks.
      warps: of a thread block, whole warpgroups.
      shared: sizes of a thread block's own arrays of float32.
      name: of the kernel.
    """
    names = (*inputs, "out", *shared)

    def body(*refs):
        from pallas_kernels.attention.machine import Machine, Reg

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(names), plgpu.Layout.WG_SPLAT))
        def run(_, *given):
            *memory, block = given
            memory = dict(zip(names, memory, strict=True))
            work.run(Machine(32 * warps), Reg(block.registers.item()), memory)

        run(*refs, lax.axis_index("block"))

    return plgpu.kernel(
        body,
        out_type=out,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warps // 4,
        thread_name="wg",
        scratch_types=[plgpu.SMEM((size,), jnp.float32) for size in shared.values()],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=name,
    )(*inputs.values())
