"""Both passes in one launch, for at most 8 tokens: thread blocks take units of work in turn.

None waits for all others before the end. The README of this folder draws it.
"""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.expert_ffn.block import FINISHER_REGISTERS, common_width, place
from pallas_kernels.expert_ffn.layout import KernelWeights, Plan
from pallas_kernels.expert_ffn.ring import (
    flow_misfit,
    flow_stages,
    list_bytes,
    rows_shape,
    run_units,
    x_buffers,
)
from pallas_kernels.expert_ffn.slots import TOKENS, most_slots
from pallas_kernels.roles import consumer_registers, run_roles

_MOST_LOADING_AHEAD = 12
"""Warps of which each then spills little; sixteen, Flash's, would spill 136 bytes, not 48."""
_CLAIMS = 32
"""Claims whose numbers are kept: more than can be under way between producer and finisher."""


@dataclasses.dataclass(frozen=True)
class Flow:
    """A launch: what its warpgroups do, and how its memory is cut.

    All units of all slots stand in one queue: gate/up's first, slot by slot, then down's. A block
    claims the next one whenever its ring has room (`claim`), so that blocks whose memory is slower
    do less, and a unit of down waits for its slot's gate/up alone, which was claimed long before.

    Attributes:
      up: plan of gate and up.
      down: plan of the down matrix.
      hooks: of both matrices.
      grid: hooks of the launch.
      slots: that its tokens can open.
      ctas: thread blocks, one for each SM; all must be resident, for the sum at the end.
      stages: of the ring.
      time_line: also return when each warpgroup began and ended what.
      runs: units of down in one claim; by default enough that their weights outweigh the hidden
        rows.
    """

    up: Plan
    down: Plan
    hooks: tuple[typing.Any, typing.Any]
    grid: typing.Any
    slots: int
    ctas: int
    stages: int
    time_line: bool
    runs: int | None = None

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.up.warps // 4

    @property
    def loads_ahead(self) -> bool:
        """Whether consumers have registers for the next stage while they multiply one."""
        return self.up.warps <= _MOST_LOADING_AHEAD

    @property
    def run_units(self) -> int:
        """Units of down in one claim."""
        return self.runs or run_units(self.down)

    @property
    def may_lag(self) -> bool:
        """Whether a claim's weights may be under way before its hidden rows are done.

        All of them must fit into the ring, or the producer would wait for consumers that wait for
        the rows.
        """
        return self.run_units * self.down.parts <= self.stages

    @property
    def buffers(self) -> int:
        """Places for hidden rows."""
        return x_buffers(self.down, self.stages, self.run_units)

    @property
    def told(self) -> tuple[tuple[str, int, int], ...]:
        """Barriers among warps: name, how many, warpgroups that arrive."""
        groups = self.consumers
        return (
            ("empty", self.stages, groups),
            ("x_empty", self.buffers, groups),
            ("put", 2, groups),
            ("taken", 2, 1),
        )

    # --- the queue --------------------------------------------------------------------------------

    def bounds(self, refs):
        """The first claim of down, and the first that does not exist."""
        count = refs["count"][0]
        first = count * self.up.units
        return first, first + count * (self.down.units // self.run_units)

    def claimed(self, refs, nth):
        """Number in the queue of this block's nth claim."""
        return refs["claims"][divided(nth, _CLAIMS)[1]]

    def down_place(self, claim, first):
        """Slot and first unit of a claim of down."""
        runs = self.down.units // self.run_units
        slot, run = divided(claim - first, runs)
        return slot, run * self.run_units

    # --- producer ---------------------------------------------------------------------------------

    def produce(self, refs):
        """Claims, and copies weights stage after stage, hidden rows when they are there."""
        self.stamp(refs, 0)
        grid, flags = self.grid, refs["flags"]
        ticket = grid.claim(flags, 0)
        plgpu.barrier_wait(refs["listed"])
        self.stamp(refs, 1)
        first, end = self.bounds(refs)

        def publish(nth, ticket):
            """The claim that a ticket stands for, known to all; and the next ticket."""
            claim = grid.publish(ticket, refs["claims"], divided(nth, _CLAIMS)[1])
            return claim, grid.claim(flags, nth + 1)

        def up_claim(carry):
            nth, index, claim, ticket = carry
            slot, unit = divided(claim, self.up.units)
            index = self.copy_unit(refs, 0, slot, unit, index)
            return nth + 1, index, *publish(nth + 1, ticket)

        def rows_done(slot, known, wait):
            return grid.slots_done(flags, slot, known, self.up.units, refs["count"][0], wait)

        def down_claim(carry):
            m, index, claim, ticket, known = carry
            slot, unit = self.down_place(claim, first)
            # The rows come with the first unit, or if they are not done yet after the last. Not
            # before it, for consumers wait for the next stage before they multiply the last one,
            # which may be of gate/up.
            index = self.copy_unit(refs, 1, slot, unit, index)
            known = rows_done(slot, known, wait=not self.may_lag)
            early = known > slot
            pl.when(early)(lambda: self.copy_rows(refs, m, slot))
            for nth in range(1, self.run_units):
                index = self.copy_unit(refs, 1, slot, unit + nth, index)
            if self.may_lag:
                known = rows_done(slot, known, wait=True)
                pl.when(~early)(lambda: self.copy_rows(refs, m, slot))
            return m + 1, index, *publish(nth0 + m + 1, ticket), known

        zero = jnp.int32(0)
        carry = zero, zero, *publish(0, ticket)
        nth0, index, claim, ticket = lax.while_loop(lambda c: c[2] < first, up_claim, carry)
        self.stamp(refs, 2)
        carry = zero, index, claim, ticket, zero
        m, index, _, ticket, _ = lax.while_loop(lambda c: c[2] < end, down_claim, carry)
        self.stamp(refs, 3)
        # The last ticket has come before anybody can clear the count it was drawn from.
        grid.publish(ticket, refs["claims"], divided(nth0 + m + 1, _CLAIMS)[1])
        # The stage after the last: no bytes, only the claim that does not exist.
        turn, stage = divided(index, self.stages)
        self.wait_for_turn(refs["empty"], stage, turn)
        plgpu.barrier_arrive(refs["full"].at[stage])
        # Pallas' interpreter wants every arrival to be seen.
        self.see_all(refs["empty"], self.stages, index, seen=index - self.stages + 1)
        self.see_all(refs["x_empty"], self.buffers, m, seen=m - self.buffers)
        if "ahead" in refs:
            # Not before this block has all its own weights.
            grid.prefetch(refs["ahead"], lax.axis_index("cta"))

    def copy_unit(self, refs, which, slot, unit, index):
        """Copies a unit's stages, each as soon as its place in the ring is free; the next index."""
        plan, weights = (self.up, self.down)[which], refs["weights"][which]
        expert = refs["expert"][slot]
        for part in range(plan.parts):
            nth = index + part
            turn, stage = divided(nth, self.stages)
            self.wait_for_turn(refs["empty"], stage, turn)
            source = weights.at[expert, unit * plan.parts + part]
            target = place(refs["ring"], stage, source)
            plgpu.copy_gmem_to_smem(source, target, refs["full"].at[stage])
        return index + plan.parts

    def copy_rows(self, refs, m, slot):
        """Copies a slot's hidden rows, for this block's mth claim of down."""
        turn, buffer = divided(m, self.buffers)
        self.wait_for_turn(refs["x_empty"], buffer, turn)
        target = refs["rows"].at[buffer]
        plgpu.copy_gmem_to_smem(refs["seen"].at[slot], target, refs["x_full"].at[buffer])

    def wait_for_turn(self, place, number, turn):
        """Waits until what the turn before brought there has been read."""
        pl.when(turn > 0)(lambda: self.hooks[0].wait(place, number, turn - 1))

    def see_all(self, place, number, count, seen):
        """Waits for the last of `count` arrivals in turn at `number` barriers, from `seen` on."""

        def step(nth, _):
            turn, which = divided(nth, number)
            self.hooks[0].wait(place, which, turn)

        lax.fori_loop(jnp.maximum(seen, 0), count, step, None)

    # --- consumers --------------------------------------------------------------------------------

    def consume(self, refs):
        """Multiplies what comes, and puts down the sums of each unit."""
        group = lax.axis_index("wg")
        # All blocks read all of x: not before the ids, on which the weights wait, are there.
        plgpu.barrier_wait(refs["listed"])
        x = self.hooks[0].operands(self.hooks[0].fetch(refs["x"], None, 0, group))
        first, end = self.bounds(refs)

        def load(which, index):
            _, stage = divided(index, self.stages)
            return self.hooks[which].load(place(refs["ring"], stage, refs["weights"][which]), group)

        def come(which, index, nth=None):
            """Waits for a stage, and starts to load it; the nth claim, if it is the first of it."""
            plgpu.barrier_wait(refs["full"].at[divided(index, self.stages)[1]])
            claim = None if nth is None else self.claimed(refs, nth)
            return load(which, index), claim

        def multiply_unit(which, x, index, unit, loaded, nth=None):
            """All stages of a unit, whose first is loaded; and loads the first of the next.

            Of a claim's last unit it also returns the nth claim, to which the next stage belongs.
            """
            plan, hooks, sums, ahead = (self.up, self.down)[which], self.hooks[which], None, None
            for part in range(plan.parts):
                hooks.give_back(loaded, refs["empty"], divided(index, self.stages)[1])
                index, last = index + 1, part == plan.parts - 1
                if self.loads_ahead:
                    ahead, claim = come(which, index, nth if last else None)
                sums = hooks.multiply(sums, x, part, loaded, ahead)
                if not self.loads_ahead and not last:
                    ahead, claim = come(which, index)
                loaded, ahead = ahead, None
            turn, buffer = divided(unit, 2)
            self.wait_for_turn(refs["taken"], buffer, turn)
            hooks.put(sums, refs["sums"].at[buffer, group])
            hooks.arrive(refs["put"], buffer)
            if not self.loads_ahead:
                loaded, claim = come(which, index, nth)
            return index, loaded, claim

        def up_claim(carry):
            nth, index, unit, _, loaded = carry
            index, loaded, claim = multiply_unit(0, x, index, unit, loaded, nth + 1)
            return nth + 1, index, unit + 1, claim, loaded

        def down_claim(carry):
            nth, index, unit, claim, loaded, m = carry
            _, buffer = divided(m, self.buffers)
            plgpu.barrier_wait(refs["x_full"].at[buffer])
            rows = self.hooks[1].held(refs["rows"].at[buffer], group)
            self.hooks[1].give_back(rows, refs["x_empty"], buffer)
            for k in range(self.run_units):
                last = nth + 1 if k == self.run_units - 1 else None
                index, loaded, claim = multiply_unit(1, rows, index, unit + k, loaded, last)
            unit = unit + self.run_units
            return nth + 1, index, unit, claim, loaded, m + 1

        zero = jnp.int32(0)
        loaded, claim = come(0, zero, zero)
        carry = zero, zero, zero, claim, loaded
        self.stamp(refs, 0)
        carry = lax.while_loop(lambda c: c[3] < first, up_claim, carry)
        self.stamp(refs, 1)
        # The stage that is there is of down, or of nothing; it was read as gate/up's, and not
        # given back.
        carry = (*carry[:4], load(1, carry[1]), zero)
        carry = lax.while_loop(lambda c: c[3] < end, down_claim, carry)
        self.stamp(refs, 2)
        # The finisher learns that there is no other unit.
        turn, buffer = divided(carry[2], 2)
        self.wait_for_turn(refs["taken"], buffer, turn)
        self.hooks[0].arrive(refs["put"], buffer)
        self.see_all(refs["taken"], 2, carry[2], seen=carry[2] - 1)

    # --- finisher ---------------------------------------------------------------------------------

    def finish(self, refs):
        """Lists the work; adds up what the consumers put down; in the end, adds up the experts."""
        self.stamp(refs, 0)
        grid, flags, block = self.grid, refs["flags"], lax.axis_index("cta")
        grid.make_list(refs["ids"], refs["routing"], self.lists(refs))
        plgpu.barrier_arrive(refs["listed"])
        first, end = self.bounds(refs)

        def wait_put(unit):
            turn, buffer = divided(unit, 2)
            self.hooks[0].wait(refs["put"], buffer, turn)

        def finish_unit(which, out, slot, row_unit, unit):
            hooks, (_, buffer) = self.hooks[which], divided(unit, 2)
            hooks.finish(
                refs["sums"].at[buffer], refs["choice"], refs["share"], out, slot, row_unit
            )
            hooks.arrive(refs["taken"], buffer)

        def next_claim(nth, unit):
            wait_put(unit)
            return self.claimed(refs, nth)

        def up_claim(carry):
            nth, claim = carry
            slot, row_unit = divided(claim, self.up.units)
            finish_unit(0, refs["hidden"], slot, row_unit, nth)
            grid.tell_done(flags, slot)
            return nth + 1, next_claim(nth + 1, nth + 1)

        def down_claim(carry):
            nth, unit, claim = carry
            slot, row_unit = self.down_place(claim, first)
            for k in range(self.run_units):
                if k:
                    wait_put(unit + k)
                finish_unit(1, refs["results"], slot, row_unit + k, unit + k)
            unit = unit + self.run_units
            return nth + 1, unit, next_claim(nth + 1, unit)

        zero = jnp.int32(0)
        nth, claim = lax.while_loop(
            lambda c: c[1] < first, up_claim, (zero, next_claim(zero, zero))
        )
        self.stamp(refs, 1)
        lax.while_loop(lambda c: c[2] < end, down_claim, (nth, nth, claim))
        self.stamp(refs, 2)
        grid.meet(flags, block)
        self.stamp(refs, 3)
        # All claims are made, all rows of hidden values were read: ready for the next launch.
        pl.when(block == 0)(lambda: grid.clear(flags))
        grid.add(refs["results"], refs["live"], refs.get("residual"), refs["y"], block)
        self.stamp(refs, 4)

    def lists(self, refs):
        """What `make_list` writes."""
        names = ("count", "expert", "choice", "share", "live", "bits")
        return {name: refs[name] for name in names}

    def stamp(self, refs, event):
        """Notes the time in a time line."""
        if self.time_line:
            self.grid.stamp(refs["stamps"], lax.axis_index("cta"), lax.axis_index("wg"), event)

    # --- launch -----------------------------------------------------------------------------------

    def run(self, refs):
        """The kernel: each warpgroup takes its role and its share of the registers."""
        refs = refs | self.hooks[0].make_told(refs, self.told)
        registers = consumer_registers(self.consumers, FINISHER_REGISTERS)
        run_roles(self, refs, registers, FINISHER_REGISTERS)

    def scratch_types(self, stage_shape: tuple[int, int]) -> dict:
        """Ring, hidden rows, sums, work list and barriers."""
        integer = functools.partial(plgpu.SMEM, dtype=jnp.int32)
        return dict(
            ring=plgpu.SMEM((self.stages, *stage_shape), jnp.uint32),
            rows=plgpu.SMEM((self.buffers, *rows_shape(self.down)), jnp.bfloat16),
            sums=plgpu.SMEM((2, self.consumers, 512), jnp.float32),
            full=plgpu.Barrier(num_barriers=self.stages),
            x_full=plgpu.Barrier(num_barriers=self.buffers),
            listed=plgpu.Barrier(),
            **self.hooks[0].told_types(self.told),
            claims=integer((_CLAIMS,)),
            count=integer((1,)),
            expert=integer((self.slots,)),
            choice=integer((self.slots, TOKENS)),
            share=plgpu.SMEM((self.slots, TOKENS), jnp.float32),
            live=integer((self.grid.t,)),
            bits=integer((self.grid.words,)),
        )

    def call(
        self, x, weights, ids, routing, others, out_dtype, interpret, seen=None
    ) -> dict[str, Array]:
        """Launches; returns outputs by name. Others are `residual` and `ahead`, if any."""
        width = common_width(self.up, self.down)
        words = [w.reshape(*w.shape[:2], -1, width) for w in (weights.gate_up, weights.down)]
        inputs = dict(x=x, ids=ids, routing=routing, flags=weights.barrier, **others)
        inputs |= {} if seen is None else dict(seen=seen)
        t, c = ids.shape
        outputs = dict(
            hidden=jax.ShapeDtypeStruct((self.slots, *rows_shape(self.down)), jnp.bfloat16),
            results=jax.ShapeDtypeStruct((t * c, self.down.rows), jnp.float32),
            y=jax.ShapeDtypeStruct((t, self.down.rows), out_dtype),
        )
        if self.time_line:
            shape = (self.ctas, self.consumers + 2, EVENTS, 2)
            outputs["stamps"] = jax.ShapeDtypeStruct(shape, jnp.uint32)

        def body(*arguments, **scratch):
            given = dict(zip(inputs, arguments, strict=False))
            rest = arguments[len(inputs) :]
            outs = dict(zip(outputs, rest[len(words) :], strict=True))
            refs = {**given, **outs, **scratch, "weights": rest[: len(words)]}
            refs.setdefault("seen", refs["hidden"])
            self.run(refs)

        kernel = plgpu.kernel(
            body,
            out_type=tuple(outputs.values()),
            grid=(self.ctas,),
            grid_names=("cta",),
            num_threads=self.consumers + 2,
            thread_name="wg",
            scratch_types=self.scratch_types(max((w.shape[-2:] for w in words), key=math.prod)),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name="expert_ffn",
            interpret=interpret,
        )
        return dict(zip(outputs, kernel(*inputs.values(), *words), strict=True))


EVENTS = 6
"""Moments that a warpgroup can note for a time line."""


def divided(index, n: int):
    """Quotient and remainder of an int by n; it is not negative, which compilers do not know."""
    if n & (n - 1):
        return lax.div(index, n), lax.rem(index, n)
    return lax.shift_right_logical(index, n.bit_length() - 1), index & (n - 1)


def make_flow(weights: KernelWeights, t, c, make, grid, launch) -> Flow:
    """The flow of a layer's weights.

    Raises:
      ValueError: if they do not fit one.
    """
    up, down = weights.gate_up_plan, weights.down_plan
    experts = weights.gate_up.shape[0]
    if (misfit := flow_misfit(up, down, t, c, experts)) is not None:
        raise ValueError(f"fused=True does not fit these weights and tokens: {misfit}.")
    slots = most_slots(t, c, experts)
    stages = launch.stages or flow_stages(up, down, list_bytes(slots), launch.runs)
    if stages < down.parts:
        raise ValueError(
            f"stages={stages} do not hold a unit of the down matrix, before whose end its hidden "
            f"rows are not asked for: give at least {down.parts}."
        )
    hooks = make(up, True), make(down, False)
    more = launch.time_line, launch.runs
    return Flow(up, down, hooks, grid, slots, launch.ctas, stages, *more)
