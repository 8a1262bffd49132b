"""The expert FFN on Hopper: MXFP4 weights streamed through a ring, decoded into tensor cores.

Two passes, gate/up with SwiGLU and down, of one body (`block.py`): in two launches, or in one with
a barrier of the grid between them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.expert_ffn.block import (
    Block,
    Launch,
    Pass,
    common_width,
    default_stages,
    one_launch_misfit,
)
from pallas_kernels.expert_ffn.layout import KernelWeights
from pallas_kernels.expert_ffn.slots import (
    TOKENS,
    Slots,
    live_choices,
    make_slots,
    most_slots,
    sum_choices,
)

_MOST_LISTED = 128
"""Choices that a thread block can list by itself."""
_MOST_FUSED = 16
"""Tokens of one launch for both passes: with more, what a launch costs is lost in its work."""


def _passes(weights: KernelWeights, t: int, launch: Launch, make) -> tuple[Pass, Pass]:
    up, down = weights.gate_up_plan, weights.down_plan
    return (
        Pass(up, make(up, True), stay=t <= TOKENS),
        Pass(down, make(down, False), shift=launch.ctas // 2),
    )


@functools.partial(jax.jit, static_argnames=("launch", "interpret", "hooks"))
def run_slots(x, weights: KernelWeights, slots: Slots, *, launch=None, interpret=None, hooks=None):
    """Both passes over a given work list; float32 results [t c, d].

    Rows that no live choice has are not written.

    Args:
      x: tokens, bfloat16.
      weights: in the kernel's order.
      slots: from `make_slots`.
      launch: a `Launch`; own_list, own_sum and time_line are for `run_ids`.
      interpret: Pallas' interpreter parameters, to run on a CPU.
      hooks: makes the `Hooks` of a matrix from its plan and whether its rows are gate and up.
    """
    launch = launch or Launch()
    inputs = {name: getattr(slots, name) for name in ("count", "expert", "choice", "share")}
    if x.shape[0] > TOKENS:
        inputs["token"] = slots.token
    c = slots.rows // x.shape[0]
    run = _fused if launch.fused and x.shape[0] <= _MOST_FUSED else _separate
    return run(x, weights, inputs, c, launch, interpret, hooks)["results"]


def _types(x, weights, c):
    """Outputs of the two passes."""
    up, down = weights.gate_up_plan, weights.down_plan
    rows = x.shape[0] * c
    return dict(
        hidden=jax.ShapeDtypeStruct((rows, up.rows // 2), jnp.bfloat16),
        results=jax.ShapeDtypeStruct((rows, down.rows), jnp.float32),
    )


def _separate(x, weights, inputs, c, launch, interpret, hooks):
    """Two launches."""
    make, grid = _hooks(hooks, launch, interpret, x.shape[0], c, weights)
    slots = most_slots(x.shape[0], c, grid.experts)
    listed = _list_bytes(slots, x.shape[0]) if launch.own_list else 0
    types, out = _types(x, weights, c), {}
    passes = zip(_passes(weights, x.shape[0], launch, make), types, strict=True)
    for (work, name), words in zip(passes, (weights.gate_up, weights.down), strict=True):
        stages = launch.stages or default_stages(work.plan, stay=work.stay, own_list=listed)
        block = Block((work,), grid, launch, stages)
        source = dict(seen=out["hidden"]) if out else dict(x=x)
        title = "expert_down" if out else "expert_gate_up"
        out |= block.call(title, inputs | source, [words], {name: types[name]}, slots, interpret)
    return out


def _fused(x, weights, inputs, c, launch, interpret, hooks):
    """One launch."""
    plans = weights.gate_up_plan, weights.down_plan
    if (misfit := one_launch_misfit(*plans)) is not None:
        raise ValueError(f"{launch} needs plans that go together; {misfit}.")
    if interpret is None:
        _check_resident(launch)
    t, experts = x.shape[0], weights.gate_up.shape[0]
    make, grid = _hooks(hooks, launch, interpret, t, c, weights)
    passes = _passes(weights, t, launch, make)
    slots = most_slots(t, c, experts)
    listed = _list_bytes(slots, t) if launch.own_list else 0
    stages = launch.stages or default_stages(*plans, stay=passes[0].stay, own_list=listed)
    block = Block(passes, grid, launch, stages)
    types = _types(x, weights, c)
    if launch.own_sum:
        types["y"] = jax.ShapeDtypeStruct((t, passes[1].plan.rows), jnp.float32)
    if launch.time_line:
        from pallas_kernels.expert_ffn.grid import EVENTS

        shape = (launch.ctas, block.consumers + 2, EVENTS, 2)
        types["stamps"] = jax.ShapeDtypeStruct(shape, jnp.uint32)
    inputs = {**inputs, "x": x, "barrier": weights.barrier}
    width = common_width(*plans)
    words = [w.reshape(*w.shape[:2], -1, width) for w in (weights.gate_up, weights.down)]
    call = functools.partial(block.call, "expert_ffn")
    if interpret is None:
        return call(inputs, words, types, slots, None)
    # The interpreter runs block after block, so that no barrier can hold: a first run makes the
    # hidden values, a second one reads them.
    seen = jnp.zeros(types["hidden"].shape, types["hidden"].dtype)
    seen = call({**inputs, "seen": seen}, words, types, slots, interpret)["hidden"]
    return call({**inputs, "seen": seen}, words, types, slots, interpret)


def _check_resident(launch):
    """Blocks that wait for each other must all be on the GPU; one takes an SM for itself."""
    device = jax.devices()[0]
    there = getattr(device, "core_count", launch.ctas)
    if device.platform == "gpu" and there < launch.ctas:
        raise ValueError(
            f"{launch.ctas} thread blocks that wait for each other need as many SMs; "
            f"{device.device_kind} has {there}: use that many `ctas`, or two launches."
        )


def _list_bytes(slots, t):
    """Shared memory of a work list: Pallas begins each array at a multiple of 1024."""
    lanes = -(-4 * TOKENS * slots // 1024)
    return 1024 * ((2 + (t > TOKENS)) * lanes + -(-4 * slots // 1024) + 3)


def _hooks(hooks, launch, interpret, t, c, weights):
    """The hooks of matrices, a function, and of the grid."""
    experts = weights.gate_up.shape[0]
    if interpret is None:
        from pallas_kernels.expert_ffn.grid import Grid
        from pallas_kernels.expert_ffn.lanes import Lanes

        release = "none" if launch.release == "late" else launch.release
        make = functools.partial(hooks or Lanes, release=release)
    else:
        from pallas_kernels.expert_ffn.interpreted import Grid, Interpreted

        make = hooks or Interpreted
    return make, Grid(t, c, experts, launch.ctas)


@functools.partial(jax.jit, static_argnames=("launch", "interpret", "hooks"))
def run_ids(x, weights, expert_ids, routing, *, launch, interpret=None, hooks=None):
    """Both passes in launches that make their own list; outputs by name, see `Launch`."""
    inputs = dict(ids=expert_ids, routing=routing.astype(jnp.float32))
    run = _fused if launch.fused else _separate
    return run(x, weights, inputs, expert_ids.shape[1], launch, interpret, hooks)


def expert_ffn_mosaic(
    x: Float[Array, "t d"],
    weights: KernelWeights,
    expert_ids: Int32[Array, "t c"],
    routing: Float[Array, "t c"],
    *,
    launch: Launch | None = None,
    **options,
) -> Float[Array, "t d"]:
    """See `api.expert_ffn`; x is taken in bfloat16, whatever its type."""
    x, launch = x.astype(jnp.bfloat16), launch or Launch()
    experts = weights.gate_up.shape[0]
    if expert_ids.size > _MOST_LISTED or x.shape[0] > _MOST_FUSED:
        launch = dataclasses.replace(launch, own_list=False, own_sum=False, time_line=False)
    if launch.own_list:
        out = run_ids(x, weights, expert_ids, routing, launch=launch, **options)
        if launch.own_sum:
            return out["y"]
        return sum_choices(out["results"], live_choices(expert_ids, experts))
    slots = make_slots(expert_ids, routing, experts)
    results = run_slots(x, weights, slots, launch=launch, **options)
    return sum_choices(results, slots.live)
