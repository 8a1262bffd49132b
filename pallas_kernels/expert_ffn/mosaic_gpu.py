"""The expert FFN on Hopper: MXFP4 weights streamed through a ring, decoded into tensor cores.

Two launches, gate/up with SwiGLU and down, of one body; pallas_kernels/README.md draws it.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.expert_ffn.layout import KernelWeights, Plan

TOKENS = 8
"""Tokens of one tensor-core tile, and of a slot."""
_SHARED_BYTES = 218 * 1024
_MAX_STAGES = 12
_SHORT_MATRIX_UNITS = 32
_SHORT_RING_BYTES = 80 * 1024
_PRODUCER_REGISTERS = 24
_FINISHER_REGISTERS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The work list: a slot is an active expert and up to 8 tokens that chose it; -1 is no token.

    Attributes:
      count: its last element is the number of slots in use; they come first, by ascending expert.
      expert: of each slot.
      token: row of x.
      choice: row of the results, c a token: the token's experts in ascending order.
      share: routing weight.
      live: distinct experts of each token, which is how many of its c rows of results are written.
      rows: of the results, t c.
    """

    count: Int32[Array, " n"]
    expert: Int32[Array, " s"]
    token: Int32[Array, "s 8"]
    choice: Int32[Array, "s 8"]
    share: Float[Array, "s 8"]
    live: Int32[Array, " t"]
    rows: int = dataclasses.field(metadata=dict(static=True))


def make_slots(
    expert_ids: Int32[Array, "t c"], routing: Float[Array, "t c"], experts: int
) -> Slots:
    """Lists the distinct active experts with their tokens, on the device.

    An expert that more than 8 tokens chose gets several slots, so that many tokens (a prefill) read
    each expert's weights once for 8 of them. A token that names an expert twice gets one row with
    the sum of its shares; dead ids get none. Compares all pairs of choices instead of sorting: few
    kernels, all of which a CUDA graph takes.
    """
    t, c = expert_ids.shape
    valid = (expert_ids >= 0) & (expert_ids < experts)
    columns = [expert_ids[:, i] for i in range(c)]
    rank, repeated = jnp.zeros((t, c), jnp.int32), jnp.zeros((t, c), bool)
    share, live = jnp.zeros((t, c), jnp.float32), jnp.zeros(t, jnp.int32)
    for i, column in enumerate(columns):
        same = column[:, None] == expert_ids
        share = share + jnp.where(same, routing[:, i, None].astype(jnp.float32), 0.0)
        first = valid[:, i]
        for earlier in columns[:i]:
            first &= earlier != column
        live += first.astype(jnp.int32)
        rank += (first[:, None] & (column[:, None] < expert_ids)).astype(jnp.int32)
        repeated |= same & (i < jnp.arange(c))
    row = valid & ~repeated
    pair_id, pair_row = expert_ids.reshape(-1), row.reshape(-1)
    # A token's place among those that chose the same expert gives its slot and its lane in the
    # slot.
    token = jnp.repeat(jnp.arange(t, dtype=jnp.int32), c)
    chose = functools.reduce(jnp.logical_or, [pair_id[:, None] == column for column in columns])
    place = jnp.sum(chose & (jnp.arange(t) < token[:, None]), 1, dtype=jnp.int32)
    opens = pair_row & (place % TOKENS == 0)
    # The last bound counts all slots.
    bounds = jnp.concatenate([pair_id, jnp.full(1, experts, jnp.int32)])
    below = jnp.sum(opens & (pair_id < bounds[:, None]), 1, dtype=jnp.int32)
    slot = below[:-1] + place // TOKENS
    most = (t * c + (TOKENS - 1) * min(experts, t * c)) // TOKENS
    cell = jnp.where(pair_row, slot * TOKENS + place % TOKENS, -1)
    cells = jnp.arange(most * TOKENS, dtype=jnp.int32).reshape(most, TOKENS, 1)
    pair = jnp.max(jnp.where(cell == cells, jnp.arange(t * c, dtype=jnp.int32), -1), 2)
    used, at = pair >= 0, jnp.maximum(pair, 0)
    return Slots(
        count=below,
        expert=jnp.where(used[:, 0], pair_id[at[:, 0]], 0),
        token=jnp.where(used, at // c, -1),
        choice=jnp.where(used, at // c * c + rank.reshape(-1)[at], -1),
        share=jnp.where(used, share.reshape(-1)[at], 0.0),
        live=live,
        rows=t * c,
    )


def sum_choices(results: Float[Array, "tc d"], live: Int32[Array, " t"]) -> Float[Array, "t d"]:
    """Adds each token's results by ascending expert, without rows that were never written."""
    results = results.reshape(live.shape[0], -1, results.shape[-1])
    total = jnp.zeros_like(results[:, 0])
    for i in range(results.shape[1]):
        total = jnp.where(i < live[:, None], total + results[:, i], total)
    return total


@typing.runtime_checkable
class Hooks(typing.Protocol):
    """What a warp does with data, apart from moving it: in PTX, or in jnp for the interpreter."""

    def gather(self, x_ref, row_ref, slot, group):
        """Takes a slot's rows of x, this warpgroup's columns of them."""

    def multiply(self, sums, x, part, stage_ref, group):
        """Returns sums plus a stage's weights times x; sums are None at a unit's first stage."""

    def release(self):
        """Lets the copy engine write over what this thread has read: before `empty` is told."""

    def put(self, sums, ref):
        """Leaves a warpgroup's sums of a unit in shared memory."""

    def finish(self, sums_ref, row_ref, share_ref, out_ref, slot, unit):
        """Adds a unit's slices and writes its rows of the result."""


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a thread block's warpgroups do: consumers, one that finishes units, the producer."""

    plan: Plan
    hooks: Hooks
    stages: int
    ctas: int

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.plan.warps // 4

    def work(self, count_ref):
        """This block's contiguous range of (slot, unit) pairs."""
        total = count_ref[count_ref.shape[0] - 1] * self.plan.units
        cta = lax.axis_index("cta")
        return lax.div(total * cta, self.ctas), lax.div(total * (cta + 1), self.ctas)

    def for_units(self, count_ref, begin_slot, visit):
        """Calls visit(what begin_slot(slot) gave, slot, unit, how many before) in order."""
        low, high = self.work(count_ref)
        units = self.plan.units

        def slot_step(slot, _):
            held = begin_slot(slot)
            start = jnp.maximum(low, slot * units)
            stop = jnp.minimum(high, (slot + 1) * units)
            lax.fori_loop(start, stop, lambda unit, _: visit(held, slot, unit, unit - low), None)

        first, last = lax.div(low, units), lax.div(high + units - 1, units)
        lax.fori_loop(first, jnp.where(high > low, last, first), slot_step, None)

    def produce(self, count_ref, expert_ref, weights_ref, ring, full, empty):
        """Copies stage after stage, each as soon as its place in the ring is free."""
        plan, stages = self.plan, self.stages
        low, high = self.work(count_ref)
        steps = (high - low) * plan.parts

        def step(i, _):
            stage = lax.rem(i, stages)
            unit = low + lax.div(i, plan.parts)
            expert = expert_ref[lax.div(unit, plan.units)]
            row = lax.rem(unit, plan.units) * plan.parts + lax.rem(i, plan.parts)
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
            plgpu.copy_gmem_to_smem(weights_ref.at[expert, row], ring.at[stage], full.at[stage])

        def drain(i, _):
            plgpu.barrier_wait(empty.at[lax.rem(i, stages)])

        lax.fori_loop(0, steps, step, None)
        lax.fori_loop(jnp.maximum(0, steps - stages), steps, drain, None)

    def consume(self, count_ref, x_ref, row_ref, ring, sums_ref, full, empty, put, taken):
        """Multiplies each unit's stages by the slot's rows of x, held in registers."""
        plan, group = self.plan, lax.axis_index("wg")

        def visit(x, slot, unit, nth):
            sums = None
            for part in range(plan.parts):
                stage = lax.rem(nth * plan.parts + part, self.stages)
                plgpu.barrier_wait(full.at[stage])
                sums = self.hooks.multiply(sums, x, part, ring.at[stage], group)
                self.hooks.release()
                plgpu.barrier_arrive(empty.at[stage])
            buffer = lax.rem(nth, 2)
            pl.when(nth >= 2)(lambda: plgpu.barrier_wait(taken.at[buffer]))
            self.hooks.put(sums, sums_ref.at[buffer, group])
            plgpu.barrier_arrive(put.at[buffer])

        def drain(nth, _):
            plgpu.barrier_wait(taken.at[lax.rem(nth, 2)])

        def gather(slot):
            return self.hooks.gather(x_ref, row_ref, slot, group)

        self.for_units(count_ref, gather, visit)
        low, high = self.work(count_ref)
        lax.fori_loop(jnp.maximum(0, high - low - 2), high - low, drain, None)

    def finish(self, count_ref, row_ref, share_ref, out_ref, sums_ref, put, taken):
        """Adds up what the consumers put down, and writes it, while they go on."""

        def visit(_, slot, unit, nth):
            buffer = lax.rem(nth, 2)
            plgpu.barrier_wait(put.at[buffer])
            unit = lax.rem(unit, self.plan.units)
            self.hooks.finish(sums_ref.at[buffer], row_ref, share_ref, out_ref, slot, unit)
            plgpu.barrier_arrive(taken.at[buffer])

        self.for_units(count_ref, lambda slot: None, visit)

    def run(self, count, expert, in_row, out_row, share, x, weights, out, **scratch):
        """The kernel: each warpgroup takes its role and its share of the registers."""
        ring, sums, full, empty, put, taken = (
            scratch[name] for name in ("ring", "sums", "full", "empty", "put", "taken")
        )
        role, groups = lax.axis_index("wg"), self.consumers

        @pl.when(role == groups + 1)
        def _():
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            self.produce(count, expert, weights, ring, full, empty)

        @pl.when(role == groups)
        def _():
            plgpu.set_max_registers(_FINISHER_REGISTERS, action="decrease")
            self.finish(count, out_row, share, out, sums, put, taken)

        @pl.when(role < groups)
        def _():
            plgpu.set_max_registers(_consumer_registers(groups), action="increase")
            self.consume(count, x, in_row, ring, sums, full, empty, put, taken)


def _consumer_registers(groups: int) -> int:
    """What a launch gives, less the producer's and the finisher's, for a thread of the others."""
    launched = 65536 // (128 * (groups + 2)) // 8 * 8 * (groups + 2)
    return min(232, (launched - _PRODUCER_REGISTERS - _FINISHER_REGISTERS) // groups // 8 * 8)


def default_stages(plan: Plan) -> int:
    """Stages of the ring: what shared memory holds, fewer where slots are short.

    The rows of x for a new slot come behind all copies that are under way; an expert of few units
    has many new slots, so its ring only holds what hides the memory's latency.
    """
    stage, sums = 4 * plan.stage_words, 2 * plan.warps * 512
    stages = min(_MAX_STAGES, (_SHARED_BYTES - sums) // stage)
    if plan.units <= _SHORT_MATRIX_UNITS:
        stages = min(stages, max(3, _SHORT_RING_BYTES // stage))
    return stages


def expert_product(
    slots, in_row, out_row, x, weights, plan, out_type, hooks, *, ctas, stages=None, interpret=None
):
    """One launch: each slot's matrix times rows `in_row` of x, to rows `out_row` of the result."""
    groups = plan.warps // 4
    stages = stages or default_stages(plan)
    kernel = plgpu.kernel(
        _Block(plan, hooks, stages, ctas).run,
        out_type=out_type,
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=groups + 2,
        thread_name="wg",
        scratch_types=dict(
            ring=plgpu.SMEM((stages, *plan.stage_shape), jnp.uint32),
            sums=plgpu.SMEM((2, groups, 512), jnp.float32),
            full=plgpu.Barrier(num_barriers=stages),
            empty=plgpu.Barrier(num_barriers=stages, num_arrivals=groups),
            put=plgpu.Barrier(num_barriers=2, num_arrivals=groups),
            taken=plgpu.Barrier(num_barriers=2),
        ),
        # With Pallas' own barriers: the producer's four warps arm a stage together.
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"expert_{'gate_up' if out_type.dtype == jnp.bfloat16 else 'down'}",
        interpret=interpret,
    )
    return kernel(slots.count, slots.expert, in_row, out_row, slots.share, x, weights)


@functools.partial(jax.jit, static_argnames=("ctas", "stages", "interpret", "hooks"))
def run_slots(
    x, weights: KernelWeights, slots: Slots, *, ctas=132, stages=None, interpret=None, hooks=None
):
    """Both launches; float32 results [t c, d], whose rows that no live choice has are not written.

    Args:
      x: tokens, bfloat16.
      weights: in the kernel's order.
      slots: from `make_slots`.
      ctas: thread blocks, one for each SM.
      stages: of the ring; None takes `default_stages`.
      interpret: Pallas' interpreter parameters, to run on a CPU.
      hooks: makes the `Hooks` of a matrix from its plan and whether its rows are gate and up.
    """
    make = hooks or _default_hooks(interpret)
    options = dict(ctas=ctas, stages=stages, interpret=interpret)
    up, down = weights.gate_up_plan, weights.down_plan
    hidden = expert_product(
        slots, slots.token, slots.choice, x, weights.gate_up, up,
        jax.ShapeDtypeStruct((slots.rows, up.rows // 2), jnp.bfloat16), make(up, True), **options,
    )  # fmt: skip
    return expert_product(
        slots, slots.choice, slots.choice, hidden, weights.down, down,
        jax.ShapeDtypeStruct((slots.rows, down.rows), jnp.float32), make(down, False), **options,
    )  # fmt: skip


def _default_hooks(interpret):
    if interpret is None:
        from pallas_kernels.expert_ffn.lanes import Lanes

        return Lanes
    from pallas_kernels.expert_ffn.interpreted import Interpreted

    return Interpreted


def expert_ffn_mosaic(
    x: Float[Array, "t d"],
    weights: KernelWeights,
    expert_ids: Int32[Array, "t c"],
    routing: Float[Array, "t c"],
    **options,
) -> Float[Array, "t d"]:
    """See `api.expert_ffn`; x is taken in bfloat16, whatever its type."""
    slots = make_slots(expert_ids, routing, weights.gate_up.shape[0])
    results = run_slots(x.astype(jnp.bfloat16), weights, slots, **options)
    return sum_choices(results, slots.live)
