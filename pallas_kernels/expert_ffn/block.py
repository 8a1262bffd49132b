"""A thread block of the expert kernel: a ring of stages, the roles of its warps, its share of work.

pallas_kernels/README.md draws it.
"""

import dataclasses
import functools
import math
import typing

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.expert_ffn.layout import Plan
from pallas_kernels.expert_ffn.slots import TOKENS

_SHARED_BYTES = 226 * 1024
"""Of 227 KB that a thread block can have; the rest is for barriers."""
_MAX_STAGES = 12
_SHORT_MATRIX_UNITS = 32
_SHORT_RING_BYTES = 80 * 1024
_PRODUCER_REGISTERS = 24
_FINISHER_REGISTERS = 64


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the kernel is launched: nothing of it changes a bit of the result.

    Attributes:
      fused: both passes in one launch, for at most 16 tokens; all `ctas` must be resident at once.
      own_list: each block lists the slots itself, from the ids; for at most 16 tokens and 128
        choices.
      own_sum: the kernel also adds up a token's experts, after a second barrier; fused.
      release: how a stage is given back to the copy engine, see `lanes.Lanes.free`; "late" waits
        for the next stage instead.
      ahead: the rows of the next slot are loaded during this one's, where registers allow.
      stages: of the ring; None takes `default_stages`.
      ctas: thread blocks, one for each SM.
      arm_together: the producer's four warps meet at each stage before its copy is issued.
      time_line: also return when each warpgroup began and ended what; fused.
    """

    fused: bool = False
    own_list: bool = False
    own_sum: bool = False
    release: str = "fence"
    ahead: bool = True
    stages: int | None = None
    ctas: int = 132
    arm_together: bool = True
    time_line: bool = False

    def __post_init__(self):
        if (self.own_sum or self.time_line) and not (self.fused and self.own_list):
            raise ValueError(f"own_sum and time_line need fused=True and own_list=True: {self}.")


@typing.runtime_checkable
class Hooks(typing.Protocol):
    """What a warp does with one matrix, apart from moving it: in PTX, or in jnp on a CPU."""

    def fetch(self, x_ref, row_ref, slot, group):
        """Starts to load a slot's rows of x, this warpgroup's columns of them."""

    def operands(self, fetched):
        """Returns what was fetched as `multiply` takes it."""

    def multiply(self, sums, x, part, stage_ref, group):
        """Returns sums plus a stage's weights times x; sums are None at a unit's first stage."""

    def free(self, sums):
        """Lets the copy engine write over what this thread has read: before `empty` is told."""

    def put(self, sums, ref):
        """Leaves a warpgroup's sums of a unit in shared memory."""

    def finish(self, sums_ref, row_ref, share_ref, out_ref, slot, unit):
        """Adds a unit's slices and writes its rows of the result."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """One matrix, streamed once for each slot.

    Attributes:
      plan: of the matrix.
      hooks: of the matrix.
      shift: of the division of units among blocks, so that two passes give the odd units to
        different blocks.
      stay: all slots have the same rows of x.
    """

    plan: Plan
    hooks: Hooks
    shift: int = 0
    stay: bool = False


@dataclasses.dataclass(frozen=True)
class Span:
    """A block's share of a pass: units [low, high), and what it has done in the pass before."""

    work: Pass
    low: Array
    high: Array
    stages: Array | int
    units: Array | int

    @property
    def steps(self):
        """Stages of the share."""
        return (self.high - self.low) * self.work.plan.parts

    def for_units(self, fetch, visit, ahead):
        """Calls visit(x, slot, unit, how many units before in all) in order.

        x is what fetch(slot) gave: for all slots if they share it, else, with `ahead`, while the
        slot before is under way.
        """
        units = self.work.plan.units
        first = lax.div(self.low, units)
        last = jnp.where(self.high > self.low, lax.div(self.high + units - 1, units), first)
        operands = self.work.hooks.operands

        def visits(slot, x):
            start = jnp.maximum(self.low, slot * units)
            stop = jnp.minimum(self.high, (slot + 1) * units)
            seen = self.units - self.low

            def step(unit, _):
                visit(x, slot, unit, seen + unit)

            lax.fori_loop(start, stop, step, None)

        if fetch is None:
            lax.fori_loop(first, last, lambda slot, _: visits(slot, None), None)
        elif self.work.stay:
            x = operands(fetch(first))
            lax.fori_loop(first, last, lambda slot, _: visits(slot, x), None)
        elif ahead:

            def slot_step(slot, fetched):
                x = operands(fetched)
                fetched = fetch(jnp.minimum(slot + 1, last - 1))
                visits(slot, x)
                return fetched

            @pl.when(last > first)
            def _():
                lax.fori_loop(first, last, slot_step, fetch(first))
        else:
            lax.fori_loop(first, last, lambda slot, _: visits(slot, operands(fetch(slot))), None)


@dataclasses.dataclass(frozen=True)
class Block:
    """What a thread block's warpgroups do: consumers, one that finishes units, the producer."""

    passes: tuple[Pass, ...]
    grid: typing.Any
    launch: Launch
    stages: int

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.passes[0].plan.warps // 4

    def spans(self, refs) -> list[Span]:
        """This block's contiguous range of (slot, unit) pairs, pass by pass."""
        count = refs["count"][refs["count"].shape[0] - 1]
        cta, ctas = lax.axis_index("cta"), self.launch.ctas
        spans, stages, units = [], 0, 0
        for work in self.passes:
            total = count * work.plan.units
            low, high = (lax.div(total * n + work.shift, ctas) for n in (cta, cta + 1))
            spans.append(Span(work, low, high, stages, units))
            stages, units = stages + spans[-1].steps, units + high - low
        return spans

    def produce(self, refs):
        """Copies stage after stage, each as soon as its place in the ring is free."""
        full, empty = refs["full"], refs["empty"]
        if self.launch.own_list:
            plgpu.barrier_wait(refs["listed"])
        self.stamp(refs, 1)
        spans = self.spans(refs)
        for nth, span in enumerate(spans):
            plan, weights, ring = span.work.plan, refs["weights"][nth], refs["ring"]

            def step(i, _, span=span, plan=plan, weights=weights, ring=ring):
                index = span.stages + i
                stage = lax.rem(index, self.stages)
                unit = span.low + lax.div(i, plan.parts)
                expert = refs["expert"][lax.div(unit, plan.units)]
                row = lax.rem(unit, plan.units) * plan.parts + lax.rem(i, plan.parts)
                pl.when(index >= self.stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
                target = self.place(ring, stage, weights)
                plgpu.copy_gmem_to_smem(weights.at[expert, row], target, full.at[stage])

            lax.fori_loop(0, span.steps, step, None)
            self.stamp(refs, 2 + nth)
        total = spans[-1].stages + spans[-1].steps

        def drain(i, _):
            plgpu.barrier_wait(empty.at[lax.rem(i, self.stages)])

        lax.fori_loop(jnp.maximum(0, total - self.stages), total, drain, None)

    def place(self, ring, stage, weights):
        """A stage of the ring, as large as these weights' stages are."""
        rows = weights.shape[-2]
        return ring.at[stage] if rows == ring.shape[-2] else ring.at[stage, pl.ds(0, rows)]

    def lists(self, refs):
        """What `make_list` writes."""
        names = ("count", "expert", "token", "choice", "share", "live", "bits")
        return {name: refs[name] for name in names if refs.get(name) is not None}

    def consume(self, refs):
        """Multiplies each unit's stages by the slot's rows of x, held in registers."""
        full, empty, put, taken = (refs[name] for name in ("full", "empty", "put", "taken"))
        group = lax.axis_index("wg")
        late = self.launch.release == "late"
        first = self.passes[0]
        early = first.hooks.fetch(refs["x"], None, 0, group) if first.stay else None
        if self.launch.own_list:
            plgpu.barrier_wait(refs["listed"])
        spans = self.spans(refs)

        def give_back(index):
            plgpu.barrier_arrive(empty.at[lax.rem(index, self.stages)])

        def visit(x, slot, unit, nth, span, weights):
            del slot, unit
            plan, hooks, sums = span.work.plan, span.work.hooks, None
            for part in range(plan.parts):
                index = span.stages + (nth - span.units) * plan.parts + part
                stage = lax.rem(index, self.stages)
                plgpu.barrier_wait(full.at[stage])
                source = self.place(refs["ring"], stage, weights)
                sums = hooks.multiply(sums, x, part, source, group)
                if late:
                    pl.when(index > 0)(lambda index=index: give_back(index - 1))
                else:
                    hooks.free(sums)
                    give_back(index)
            buffer = lax.rem(nth, 2)
            pl.when(nth >= 2)(lambda: plgpu.barrier_wait(taken.at[buffer]))
            hooks.put(sums, refs["sums"].at[buffer, group])
            plgpu.barrier_arrive(put.at[buffer])

        for nth, span in enumerate(spans):
            if nth:
                plgpu.barrier_wait(refs["go"])
            self.stamp(refs, 2 * nth)
            source, rows = self.source(refs, nth, span.work)

            def fetch(slot, span=span, source=source, rows=rows):
                if span.work.stay:
                    return early
                return span.work.hooks.fetch(source, rows, slot, group)

            weights = refs["weights"][nth]
            span.for_units(
                fetch,
                functools.partial(visit, span=span, weights=weights),
                self.launch.ahead and span.work.plan.slice_columns <= 256,
            )
            self.stamp(refs, 2 * nth + 1)
        stages, units = (getattr(spans[-1], name) for name in ("stages", "units"))
        stages, units = stages + spans[-1].steps, units + spans[-1].high - spans[-1].low
        if late:
            pl.when(stages > 0)(lambda: give_back(stages - 1))

        def drain(nth, _):
            plgpu.barrier_wait(taken.at[lax.rem(nth, 2)])

        lax.fori_loop(jnp.maximum(0, units - 2), units, drain, None)

    def source(self, refs, nth, work):
        """Where a pass has its rows of x, and which ones."""
        down = nth == 1 or not work.hooks.swiglu
        if work.stay:
            return refs["x"], None
        if down:
            return refs["seen"], refs["choice"]
        return refs["x"], refs["token"]

    def finish(self, refs):
        """Adds up what the consumers put down, and writes it, while they go on."""
        put, taken = refs["put"], refs["taken"]
        cta = lax.axis_index("cta")
        if self.launch.own_list:
            self.grid.make_list(refs["ids"], refs["routing"], self.lists(refs))
            plgpu.barrier_arrive(refs["listed"])

        def visit(_, slot, unit, nth, span, out):
            buffer = lax.rem(nth, 2)
            plgpu.barrier_wait(put.at[buffer])
            unit = lax.rem(unit, span.work.plan.units)
            sums = refs["sums"].at[buffer]
            span.work.hooks.finish(sums, refs["choice"], refs["share"], out, slot, unit)
            plgpu.barrier_arrive(taken.at[buffer])

        for nth, span in enumerate(self.spans(refs)):
            if nth:
                self.stamp(refs, 1)
                self.grid.meet(refs["barrier"], cta)
                plgpu.barrier_arrive(refs["go"])
                self.stamp(refs, 2)
            out = refs["out"][nth]
            span.for_units(None, functools.partial(visit, span=span, out=out), False)
        self.stamp(refs, 3)
        if self.launch.own_sum:
            self.grid.meet(refs["barrier"], cta)
            self.stamp(refs, 4)
            self.grid.add(refs["out"][-1], refs["live"], refs["y"], cta)
            self.stamp(refs, 5)

    def stamp(self, refs, event):
        """Notes the time in a time line."""
        if self.launch.time_line:
            self.grid.stamp(refs["stamps"], lax.axis_index("cta"), lax.axis_index("wg"), event)

    def run(self, refs):
        """The kernel: each warpgroup takes its role and its share of the registers."""
        role, groups = lax.axis_index("wg"), self.consumers

        @pl.when(role == groups + 1)
        def _():
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            self.stamp(refs, 0)
            self.produce(refs)

        @pl.when(role == groups)
        def _():
            plgpu.set_max_registers(_FINISHER_REGISTERS, action="decrease")
            self.stamp(refs, 0)
            self.finish(refs)

        @pl.when(role < groups)
        def _():
            plgpu.set_max_registers(self.registers, action="increase")
            self.consume(refs)

    @property
    def registers(self) -> int:
        """What a launch gives, less the producer's and the finisher's, for a consumer's thread."""
        groups = self.consumers
        launched = 65536 // (128 * (groups + 2)) // 8 * 8 * (groups + 2)
        return min(232, (launched - _PRODUCER_REGISTERS - _FINISHER_REGISTERS) // groups // 8 * 8)

    def list_types(self, slots: int) -> dict:
        """The work list in shared memory."""
        if not self.launch.own_list:
            return {}
        integer = functools.partial(plgpu.SMEM, dtype=jnp.int32)
        many = dict(token=integer((slots, TOKENS))) if self.grid.t > TOKENS else {}
        return dict(
            count=integer((1,)),
            expert=integer((slots,)),
            choice=integer((slots, TOKENS)),
            share=plgpu.SMEM((slots, TOKENS), jnp.float32),
            live=integer((self.grid.t,)),
            bits=integer((self.grid.words * (1 + bool(many)),)),
            listed=plgpu.Barrier(),
            **many,
        )

    def scratch_types(self, shape: tuple[int, int], slots: int) -> dict:
        """Ring, sums and barriers."""
        several = dict(go=plgpu.Barrier()) if len(self.passes) > 1 else {}
        return dict(
            ring=plgpu.SMEM((self.stages, *shape), jnp.uint32),
            sums=plgpu.SMEM((2, self.consumers, 512), jnp.float32),
            full=plgpu.Barrier(num_barriers=self.stages),
            empty=plgpu.Barrier(num_barriers=self.stages, num_arrivals=self.consumers),
            put=plgpu.Barrier(num_barriers=2, num_arrivals=self.consumers),
            taken=plgpu.Barrier(num_barriers=2),
            **several,
            **self.list_types(slots),
        )

    def call(self, name, inputs, weights, out_types, slots, interpret):
        """Launches: named inputs, the weights of each pass; returns outputs by name."""
        names, out_names = list(inputs), list(out_types)
        shape = max((w.shape[-2:] for w in weights), key=math.prod)

        def body(*arguments, **scratch):
            values = dict(zip(names, arguments, strict=False))
            given = arguments[len(names) :]
            outs = dict(zip(out_names, given[len(weights) :], strict=True))
            refs = {**values, **outs, **scratch, "weights": given[: len(weights)]}
            refs["out"] = [outs[n] for n in ("hidden", "results") if n in outs]
            refs.setdefault("seen", outs.get("hidden"))
            self.run(refs)

        kernel = plgpu.kernel(
            body,
            out_type=tuple(out_types.values()),
            grid=(self.launch.ctas,),
            grid_names=("cta",),
            num_threads=self.consumers + 2,
            thread_name="wg",
            scratch_types=self.scratch_types(shape, slots),
            # Pallas' own barriers, which are the producer's only.
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=not self.launch.arm_together
            ),
            kernel_name=name,
            interpret=interpret,
        )
        return dict(zip(out_names, kernel(*inputs.values(), *weights), strict=True))


def default_stages(*plans: Plan, stay: bool = False, own_list: int = 0) -> int:
    """Stages of the ring: what shared memory holds, fewer where slots are short.

    The rows of x for a new slot come behind all copies that are under way; an expert of few units
    has many new slots, so its ring only holds what hides the memory's latency. Unless x stays.

    Args:
      plans: of the launch's passes.
      stay: all slots have the same rows of x.
      own_list: bytes of the work list in shared memory.
    """
    stage, sums = max(4 * p.stage_words for p in plans), 2 * plans[0].warps * 512
    stages = min(_MAX_STAGES, (_SHARED_BYTES - sums - own_list) // stage)
    if not stay and min(p.units for p in plans) <= _SHORT_MATRIX_UNITS:
        stages = min(stages, max(3, _SHORT_RING_BYTES // stage))
    return stages


def common_width(*plans: Plan) -> int | None:
    """Words of a row in which all plans' stages can be cut for one ring; None if there is none."""
    words = [p.stage_words for p in plans]
    width = math.gcd(128, *words)
    return width if max(words) // width <= 256 else None


def one_launch_misfit(up: Plan, down: Plan) -> str | None:
    """Why both passes cannot share a launch, or None."""
    if up.warps != down.warps:
        return f"these have {up.warps} and {down.warps} warps"
    if common_width(up, down) is None:
        return f"stages of {up.stage_words} and {down.stage_words} words have no common width"
    return None
