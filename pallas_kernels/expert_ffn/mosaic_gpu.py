"""The expert FFN on Hopper: MXFP4 weights streamed through a ring, decoded into tensor cores.

Two passes, gate/up with SwiGLU and down: in two launches of one body (`block.py`), or, for at most
8 tokens, in one (`flow.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.expert_ffn.block import (
    Block,
    Launch,
    Pass,
    default_stages,
)
from pallas_kernels.expert_ffn.flow import make_flow
from pallas_kernels.expert_ffn.layout import KernelWeights
from pallas_kernels.expert_ffn.ring import flow_misfit, rows_shape
from pallas_kernels.expert_ffn.slots import (
    TOKENS,
    Slots,
    live_choices,
    make_slots,
    most_slots,
    out_dtype_of,
    sum_choices,
)
from pallas_kernels.shared_memory import shared_bytes

_MOST_LISTED = 128
"""Choices that a thread block can list by itself."""
_MOST_LISTING = 16
"""Tokens: a thread compares its choice with those of all earlier tokens."""


@functools.partial(jax.jit, static_argnames=("launch", "interpret", "hooks"))
def run_slots(x, weights: KernelWeights, slots: Slots, *, launch=None, interpret=None, hooks=None):
    """Two launches over a given work list; float32 results [t c, d].

    Rows that no live choice has are not written.

    Args:
      x: tokens, bfloat16.
      weights: in the kernel's order.
      slots: from `make_slots`.
      launch: a `Launch` whose list is given.
      interpret: Pallas' interpreter parameters, to run on a CPU.
      hooks: makes the `Hooks` of a matrix from its plan and whether its rows are gate and up.
    """
    launch = launch or default_launch()
    inputs = {name: getattr(slots, name) for name in ("count", "expert", "choice", "share")}
    if x.shape[0] > TOKENS:
        inputs["token"] = slots.token
    return _separate(x, weights, inputs, slots.rows // x.shape[0], launch, interpret, hooks)


def _separate(x, weights, inputs, c, launch, interpret, hooks):
    """Two launches."""
    t, experts = x.shape[0], weights.gate_up.shape[0]
    make, grid = _hooks(hooks, launch, interpret, t, c, experts)
    slots = most_slots(t, c, experts)
    listed = _list_bytes(slots, t) if launch.own_list else 0
    up, down = weights.gate_up_plan, weights.down_plan
    for title, plan, words, kind in (
        ("expert_gate_up", up, weights.gate_up, ((t * c, up.rows // 2), jnp.bfloat16)),
        ("expert_down", down, weights.down, ((t * c, down.rows), jnp.float32)),
    ):
        work = Pass(plan, make(plan, plan is up), stay=plan is up and t <= TOKENS)
        stages = launch.stages or default_stages(plan, work.stay, listed)
        block = Block(work, grid, launch, stages)
        out_type = jax.ShapeDtypeStruct(*kind)
        x = block.call(title, inputs | dict(x=x), words, out_type, slots, interpret)
    return x


@functools.partial(jax.jit, static_argnames=("launch", "out_dtype", "interpret", "hooks"))
def run_flow(
    x,
    weights,
    expert_ids,
    routing,
    residual=None,
    ahead=None,
    *,
    launch,
    out_dtype=None,
    interpret=None,
    hooks=None,
):
    """One launch, of at most 8 tokens; outputs by name, among them `y` [t, d]."""
    (t, c), experts = expert_ids.shape, weights.gate_up.shape[0]
    make, grid = _hooks(hooks, launch, interpret, t, c, experts, blocked=True)
    flow = make_flow(weights, t, c, make, grid, launch)
    others = {"residual": residual, "ahead": ahead}
    others = {name: array for name, array in others.items() if array is not None}
    routing = routing.astype(jnp.float32)
    out_dtype = out_dtype_of(residual, out_dtype)
    call = functools.partial(flow.call, x, weights, expert_ids, routing, others, out_dtype)
    if interpret is None:
        _check_resident(launch)
        return call(None)
    # The interpreter runs block after block, so that none can wait for another: a first run makes
    # the hidden values, a second one reads them.
    shape = (flow.slots, *rows_shape(flow.down))
    return call(interpret, call(interpret, jnp.zeros(shape, jnp.bfloat16))["hidden"])


def default_launch() -> Launch:
    """A thread block for each SM that there is: other Hopper GPUs have fewer than an H200's 132."""
    launch = Launch()
    return dataclasses.replace(launch, ctas=min(launch.ctas, _multiprocessors(launch.ctas)))


def _multiprocessors(otherwise: int) -> int:
    """SMs of the GPU; without one, whose program may be compiled for another, what is given."""
    device = jax.devices()[0]
    return getattr(device, "core_count", otherwise) if device.platform == "gpu" else otherwise


def _check_resident(launch):
    """Blocks that wait for each other must all be on the GPU; one takes an SM for itself."""
    there = _multiprocessors(launch.ctas)
    if there < launch.ctas:
        raise ValueError(
            f"{launch.ctas} thread blocks that wait for each other need as many SMs; "
            f"{jax.devices()[0].device_kind} has {there}: use that many `ctas`, or two launches."
        )


def _list_bytes(slots, t):
    """Shared memory of a work list: what slots and tokens have, and three arrays of a few words."""
    lanes = [4 * TOKENS * slots] * (2 + (t > TOKENS))
    return shared_bytes(*lanes, 4 * slots, *[4] * 3)


def _hooks(hooks, launch, interpret, t, c, experts, **options):
    """The hooks of matrices, a function, and of the grid."""
    if interpret is None:
        from pallas_kernels.expert_ffn.grid import Grid
        from pallas_kernels.expert_ffn.lanes import Lanes

        make = functools.partial(hooks or Lanes, **options)
    else:
        from pallas_kernels.expert_ffn.interpreted import Grid, Interpreted

        make = functools.partial(hooks or Interpreted, **options)
    return make, Grid(t, c, experts, launch.ctas)


@functools.partial(jax.jit, static_argnames=("launch", "interpret", "hooks"))
def run_ids(x, weights, expert_ids, routing, *, launch, interpret=None, hooks=None):
    """Two launches that make their own list; float32 results [t c, d]."""
    inputs = dict(ids=expert_ids, routing=routing.astype(jnp.float32))
    return _separate(x, weights, inputs, expert_ids.shape[1], launch, interpret, hooks)


def expert_ffn_mosaic(
    x: Float[Array, "t d"],
    weights: KernelWeights,
    expert_ids: Int32[Array, "t c"],
    routing: Float[Array, "t c"],
    residual: Float[Array, "t d"] | None = None,
    ahead: Shaped[Array, "..."] | None = None,
    *,
    launch: Launch | None = None,
    out_dtype: DTypeLike | None = None,
    **options,
) -> Float[Array, "t d"]:
    """See `api.expert_ffn`; x is taken in bfloat16, whatever its type.

    Only one launch for both passes brings `ahead` nearer.
    """
    x, launch = x.astype(jnp.bfloat16), launch or default_launch()
    (t, c), experts = expert_ids.shape, weights.gate_up.shape[0]
    plans = weights.gate_up_plan, weights.down_plan
    if launch.fused and flow_misfit(*plans, t, c, experts) is None:
        arguments = x, weights, expert_ids, routing, residual, ahead
        return run_flow(*arguments, launch=launch, out_dtype=out_dtype, **options)["y"]
    total = _sum_of_two(x, weights, expert_ids, routing, launch, options)
    if residual is not None:
        total = residual.astype(jnp.float32) + total
    return total.astype(out_dtype_of(residual, out_dtype))


def _sum_of_two(x, weights, expert_ids, routing, launch, options):
    """By two launches, and XLA's sum."""
    (t, c), experts = expert_ids.shape, weights.gate_up.shape[0]
    if launch.own_list and t <= _MOST_LISTING and t * c <= _MOST_LISTED:
        results = run_ids(x, weights, expert_ids, routing, launch=launch, **options)
        return sum_choices(results, live_choices(expert_ids, experts))
    launch = dataclasses.replace(launch, own_list=False)
    slots = make_slots(expert_ids, routing, experts)
    results = run_slots(x, weights, slots, launch=launch, **options)
    return sum_choices(results, slots.live)
