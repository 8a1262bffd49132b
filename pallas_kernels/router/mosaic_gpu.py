"""The router's launch on Hopper."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Shaped, UInt32

from pallas_kernels.router.block import Block
from pallas_kernels.router.plan import Plan, plan_for

_STATIC = ("word", "choices", "epsilon", "normalise", "scale", "plan")


@functools.partial(jax.jit, static_argnames=_STATIC)
def route_mosaic(
    h: Float[Array, "t d"],
    norm: Float[Array, "d"],
    weight: Shaped[Array, "e d"],
    bias: Float[Array, " e"],
    live: Bool[Array, " t"] | None,
    counter: UInt32[Array, " words"],
    *,
    word: int = 0,
    choices: int,
    epsilon: float,
    normalise: bool = True,
    scale: float = 1.0,
    plan: Plan | None = None,
):
    """See `api.route`; one launch. `plan` decides over the results' bits."""
    plan, (t, d) = plan or plan_for(*weight.shape), h.shape
    wide = weight.dtype == jnp.float32
    block = Block(t, choices, plan, wide, epsilon, normalise, scale, word)
    inputs = dict(h=h, norm=norm, weight=weight, bias=bias, counter=counter)
    outputs = dict(
        x=jax.ShapeDtypeStruct((t, d), h.dtype),
        ids=jax.ShapeDtypeStruct((t, choices), jnp.int32),
        weights=jax.ShapeDtypeStruct((t, choices), jnp.float32),
        scores=jax.ShapeDtypeStruct((t, plan.experts), jnp.float32),
    )
    if live is not None:
        inputs["live"] = live.astype(jnp.int32)
    found = _launch(block, inputs, outputs)
    return found["x"], found["ids"], found["weights"]


def _launch(block: Block, inputs: dict, outputs: dict) -> dict:
    """Runs the clusters; the arrays of `outputs`."""
    plan, names = block.plan, (*inputs, *outputs, *block.shared)

    def body(*refs):
        from pallas_kernels.attention.machine import Reg
        from pallas_kernels.router.machine import RouterMachine

        kinds = (*[plgpu.RefType()] * len(names), *[plgpu.Layout.WG_SPLAT] * 2)

        @plgpu.inline_mgpu(arg_types=kinds)
        def run(_, *given):
            *memory, cluster, rank = given
            cluster, rank = (Reg(index.registers.item()) for index in (cluster, rank))
            machine = RouterMachine(plan.threads, plan.ranks, rank)
            block.run(machine, cluster, rank, dict(zip(names, memory, strict=True)))

        rank = lax.axis_index("rank") if plan.ranks > 1 else jnp.int32(0)
        run(*refs, lax.axis_index("cluster"), rank)

    several = dict(cluster=(plan.ranks,), cluster_names=("rank",)) if plan.ranks > 1 else {}
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        grid=(plan.clusters,),
        grid_names=("cluster",),
        num_threads=plan.warps // 4,
        thread_name="wg",
        scratch_types=[plgpu.SMEM((size,), jnp.float32) for size in block.shared.values()],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="router",
        **several,
    )
    return dict(zip(outputs, kernel(*inputs.values()), strict=True))
