"""Launches lane code: a `run(machine, block, refs)`, written for a `Machine`'s threads."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def launch_lanes(
    work,
    inputs: dict,
    out: jax.ShapeDtypeStruct | None,
    *,
    blocks: int,
    warps: int,
    ranks: int | None = None,
    shared: dict[str, int],
    name: str,
):
    """Runs `work.run` in so many thread blocks of so many warps; what it wrote to `out`.

    With `ranks` in so many clusters of thread blocks, on a `ClusterMachine`; 1 is a cluster too.

    Args:
      work: its `run` is given memory by name: the inputs, "out", and what is shared.
      inputs: arrays, or references to write to.
      out: shape and type of what is written; None if only references are.
      blocks: thread blocks, or clusters of them.
      warps: of a thread block, whole warpgroups.
      ranks: thread blocks of a cluster, if they are to work together.
      shared: sizes of a thread block's own arrays of float32.
      name: of the kernel.
    """
    outputs = () if out is None else ("out",)
    names, clustered = (*inputs, *outputs, *shared), (ranks or 1) > 1

    def body(*refs):
        from pallas_kernels.attention.cluster import ClusterMachine
        from pallas_kernels.attention.machine import Machine, Reg

        kinds = (*[plgpu.RefType()] * len(names), *[plgpu.Layout.WG_SPLAT] * 2)

        @plgpu.inline_mgpu(arg_types=kinds)
        def run(_, *given):
            *memory, block, rank = given
            block, rank = (Reg(number.registers.item()) for number in (block, rank))
            threads = 32 * warps
            machine = Machine(threads) if ranks is None else ClusterMachine(threads, ranks, rank)
            work.run(machine, block, dict(zip(names, memory, strict=True)))

        rank = lax.axis_index("rank") if clustered else jnp.int32(0)
        run(*refs, lax.axis_index("block"), rank)

    return plgpu.kernel(
        body,
        out_type=() if out is None else out,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warps // 4,
        thread_name="wg",
        scratch_types=[plgpu.SMEM((size,), jnp.float32) for size in shared.values()],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=name,
        **(dict(cluster=(ranks,), cluster_names=("rank",)) if clustered else {}),
    )(*inputs.values())
