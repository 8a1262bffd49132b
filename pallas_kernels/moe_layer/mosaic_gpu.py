"""A mixture of experts with its router on Hopper, in one launch."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.expert_ffn.block import Launch, default_launch
from pallas_kernels.expert_ffn.flow import make_flow
from pallas_kernels.expert_ffn.layout import KernelWeights
from pallas_kernels.expert_ffn.mosaic_gpu import make_hooks, run_whole
from pallas_kernels.moe_layer.cut import front_of, misfit, shared_bytes

_STATIC = (
    "choices", "epsilon", "normalise", "scale", "stream", "launch", "interpret", "hooks", "front",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=_STATIC)
def moe_layer_mosaic(
    h, norm, router, bias, weights: KernelWeights, live, ahead=None,
    *, choices, epsilon, normalise=True, scale=1.0, stream=True,
    launch: Launch | None = None, interpret=None, hooks=None, front=None,
):  # fmt: skip
    """See `api.moe_layer`; one launch. Returns what it writes by name, among it `y`.

    To run on a CPU, `interpret` are Pallas' interpreter's parameters; `hooks` makes those of a
    matrix, `front` those of what goes before.
    """
    t, wide, launch = h.shape[0], router.dtype == jnp.float32, launch or default_launch()
    if (why := misfit(weights, t, choices, wide, launch.ctas)) is not None:
        raise ValueError(f"moe_layer takes {why}.")
    cut = front_of(weights, t, choices, wide, launch.ctas, epsilon, normalise, scale)
    experts = weights.gate_up.shape[0]
    make, grid = make_hooks(hooks, launch, interpret, t, choices, experts, blocked=True)
    first = (front or _hooks(interpret))(cut)
    flow = make_flow(weights, t, choices, make, grid, launch, first, shared_bytes(cut))
    inputs = dict(h=h, norm=norm, router=router, bias=bias)
    more = dict(alive=None if live is None else live.astype(jnp.int32), ahead=ahead)
    more["residual"] = h if stream else None
    inputs |= {name: array for name, array in more.items() if array is not None}
    found = run_whole(flow, inputs, weights, launch, interpret)
    return found | dict(y=found["y"].astype(h.dtype))


def _hooks(interpret):
    if interpret is None:
        from pallas_kernels.moe_layer.lanes import FrontLanes

        return FrontLanes
    from pallas_kernels.moe_layer.interpreted import FrontInterpreted

    return FrontInterpreted
