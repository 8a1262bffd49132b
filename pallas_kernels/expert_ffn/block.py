"""A thread block of one pass: a ring of stages, the roles of its warps, its share of work.

The README of this folder draws it.
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
from pallas_kernels.roles import consumer_registers, run_roles

SHARED_BYTES = 226 * 1024
"""Of 227 KB that a thread block can have; the rest is for barriers."""
MAX_STAGES = 12
_SHORT_MATRIX_UNITS = 32
_SHORT_RING_BYTES = 80 * 1024
FINISHER_REGISTERS = 56


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the kernel is launched: nothing of it changes a bit of the result.

    Attributes:
      fused: both passes in one launch (`flow.py`), where they fit one; all `ctas` must be resident.
      own_list: each block lists the slots itself, from the ids; for at most 16 tokens and 128
        choices. A fused launch always does.
      ahead: the rows of the next slot are loaded during this one's, where registers allow.
      stages: of the ring; None: `ring.flow_stages` or `default_stages`.
      ctas: thread blocks, one for each SM.
      runs: units of the down matrix that a block takes at a time; None is `ring.run_units`. Fused.
      time_line: also return when each warpgroup began and ended what; fused.
    """

    fused: bool = True
    own_list: bool = False
    ahead: bool = True
    stages: int | None = None
    ctas: int = 132
    runs: int | None = None
    time_line: bool = False

    def __post_init__(self):
        if self.time_line and not self.fused:
            raise ValueError(f"time_line needs fused=True: {self}.")


@typing.runtime_checkable
class Hooks(typing.Protocol):
    """What a warp does with one matrix, apart from moving it: in PTX, or in jnp on a CPU."""

    def fetch(self, x_ref, row_ref, slot, group):
        """Starts to load a slot's rows of x, this warpgroup's columns of them."""

    def operands(self, fetched):
        """Returns what was fetched as `multiply` takes it."""

    def load(self, stage_ref, group):
        """Starts to load this warpgroup's share of a stage, as `multiply` takes it."""

    def held(self, rows_ref, group):
        """Starts to load hidden rows from shared memory, as `multiply` takes x; in one launch."""

    def give_back(self, loaded, place, index):
        """Arrives for this warpgroup at one of a row of barriers, once stage or rows are there."""

    def multiply(self, sums, x, part, loaded, ahead=None):
        """Returns sums plus a stage's weights times x; sums are None at a unit's first stage.

        What is loaded `ahead`, if anything, comes meanwhile.
        """

    def arrive(self, place, index):
        """Arrives for this warpgroup at one of a row of barriers."""

    def wait(self, place, index, nth):
        """Waits for the nth time that all have arrived."""

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
      stay: all slots have the same rows of x.
    """

    plan: Plan
    hooks: Hooks
    stay: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
    """What a thread block's warpgroups do: consumers, one that finishes units, the producer."""

    work: Pass
    grid: typing.Any
    launch: Launch
    stages: int

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.work.plan.warps // 4

    def units(self, refs) -> tuple[Array, Array]:
        """This block's contiguous range of (slot, unit) pairs."""
        total = refs["count"][refs["count"].shape[0] - 1] * self.work.plan.units
        cta, ctas = lax.axis_index("cta"), self.launch.ctas
        return lax.div(total * cta, ctas), lax.div(total * (cta + 1), ctas)

    def for_units(self, low, high, fetch, visit, ahead):
        """Calls visit(x, slot, unit) in order.

        x is what fetch(slot) gave: for all slots if they share it, else, with `ahead`, while the
        slot before is under way.
        """
        units, operands = self.work.plan.units, self.work.hooks.operands
        first = lax.div(low, units)
        last = jnp.where(high > low, lax.div(high + units - 1, units), first)

        def visits(slot, x):
            start, stop = jnp.maximum(low, slot * units), jnp.minimum(high, (slot + 1) * units)
            lax.fori_loop(start, stop, lambda unit, _: visit(x, slot, unit), None)

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

    def produce(self, refs):
        """Copies stage after stage, each as soon as its place in the ring is free."""
        plan, hooks, weights = self.work.plan, self.work.hooks, refs["weights"]
        if self.launch.own_list:
            plgpu.barrier_wait(refs["listed"])
        low, high = self.units(refs)

        def step(index, _):
            stage, turn = lax.rem(index, self.stages), lax.div(index, self.stages)
            unit = low + lax.div(index, plan.parts)
            expert = refs["expert"][lax.div(unit, plan.units)]
            row = lax.rem(unit, plan.units) * plan.parts + lax.rem(index, plan.parts)
            pl.when(turn > 0)(lambda: hooks.wait(refs["empty"], stage, turn - 1))
            target = refs["ring"].at[stage]
            plgpu.copy_gmem_to_smem(weights.at[expert, row], target, refs["full"].at[stage])

        def drain(index, _):
            stage, turn = lax.rem(index, self.stages), lax.div(index, self.stages)
            hooks.wait(refs["empty"], stage, turn)

        total = (high - low) * plan.parts
        lax.fori_loop(0, total, step, None)
        lax.fori_loop(jnp.maximum(0, total - self.stages), total, drain, None)

    def lists(self, refs):
        """What `make_list` writes."""
        names = ("count", "expert", "token", "choice", "share", "live", "bits")
        return {name: refs[name] for name in names if refs.get(name) is not None}

    def consume(self, refs):
        """Multiplies each unit's stages by the slot's rows of x, held in registers."""
        work, group = self.work, lax.axis_index("wg")
        plan, hooks = work.plan, work.hooks
        early = hooks.fetch(refs["x"], None, 0, group) if work.stay else None
        if self.launch.own_list:
            plgpu.barrier_wait(refs["listed"])
        low, high = self.units(refs)

        def visit(x, slot, unit):
            del slot
            nth, sums = unit - low, None
            for part in range(plan.parts):
                stage = lax.rem(nth * plan.parts + part, self.stages)
                plgpu.barrier_wait(refs["full"].at[stage])
                loaded = hooks.load(refs["ring"].at[stage], group)
                hooks.give_back(loaded, refs["empty"], stage)
                sums = hooks.multiply(sums, x, part, loaded)
            buffer, turn = lax.rem(nth, 2), lax.div(nth, 2)
            pl.when(turn > 0)(lambda: hooks.wait(refs["taken"], buffer, turn - 1))
            hooks.put(sums, refs["sums"].at[buffer, group])
            hooks.arrive(refs["put"], buffer)

        def fetch(slot):
            return early if work.stay else hooks.fetch(*self.source(refs), slot, group)

        self.for_units(low, high, fetch, visit, self.launch.ahead and plan.slice_columns <= 256)

        def drain(nth, _):
            hooks.wait(refs["taken"], lax.rem(nth, 2), lax.div(nth, 2))

        lax.fori_loop(jnp.maximum(0, high - low - 2), high - low, drain, None)

    def source(self, refs):
        """Where slots have their rows of x, and which ones."""
        return (refs["x"], refs["token"]) if self.work.hooks.swiglu else (refs["x"], refs["choice"])

    def finish(self, refs):
        """Adds up what the consumers put down, and writes it, while they go on."""
        hooks, units = self.work.hooks, self.work.plan.units
        if self.launch.own_list:
            self.grid.make_list(refs["ids"], refs["routing"], self.lists(refs))
            plgpu.barrier_arrive(refs["listed"])
        low, high = self.units(refs)

        def visit(_, slot, unit):
            buffer, turn = lax.rem(unit - low, 2), lax.div(unit - low, 2)
            hooks.wait(refs["put"], buffer, turn)
            sums, where = refs["sums"].at[buffer], (slot, lax.rem(unit, units))
            hooks.finish(sums, refs["choice"], refs["share"], refs["out"], *where)
            hooks.arrive(refs["taken"], buffer)

        self.for_units(low, high, None, visit, False)

    def run(self, refs):
        """The kernel: each warpgroup takes its role and its share of the registers."""
        refs = refs | self.work.hooks.make_told(refs, self.told)
        registers = consumer_registers(self.consumers, FINISHER_REGISTERS)
        run_roles(self, refs, registers, FINISHER_REGISTERS)

    @property
    def told(self) -> tuple[tuple[str, int, int], ...]:
        """Barriers among warps: name, how many, warpgroups that arrive."""
        groups = self.consumers
        return ("empty", self.stages, groups), ("put", 2, groups), ("taken", 2, 1)

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

    def call(self, name, inputs, weights, out_type, slots, interpret):
        """Launches on named inputs and the weights; returns the rows of the pass."""
        scratch_types = dict(
            ring=plgpu.SMEM((self.stages, *weights.shape[-2:]), jnp.uint32),
            sums=plgpu.SMEM((2, self.consumers, 512), jnp.float32),
            full=plgpu.Barrier(num_barriers=self.stages),
            **self.work.hooks.told_types(self.told),
            **self.list_types(slots),
        )

        def body(*arguments, **scratch):
            given = dict(zip((*inputs, "weights", "out"), arguments, strict=True))
            self.run(given | scratch)

        kernel = plgpu.kernel(
            body,
            out_type=out_type,
            grid=(self.launch.ctas,),
            grid_names=("cta",),
            num_threads=self.consumers + 2,
            thread_name="wg",
            scratch_types=scratch_types,
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name=name,
            interpret=interpret,
        )
        return kernel(*inputs.values(), weights)


def place(ring, stage, weights):
    """A stage of the ring, as large as these weights' stages are."""
    rows = weights.shape[-2]
    return ring.at[stage] if rows == ring.shape[-2] else ring.at[stage, pl.ds(0, rows)]


def default_stages(plan: Plan, stay: bool = False, own_list: int = 0) -> int:
    """Stages of the ring: what shared memory holds, fewer where slots are short.

    The rows of x for a new slot come behind all copies that are under way; an expert of few units
    has many new slots, so its ring only holds what hides the memory's latency. Unless x stays.

    Args:
      plan: of the matrix.
      stay: all slots have the same rows of x.
      own_list: bytes of the work list in shared memory.
    """
    stage, sums = 4 * plan.stage_words, 2 * plan.warps * 512
    stages = min(MAX_STAGES, (SHARED_BYTES - sums - own_list) // stage)
    if not stay and plan.units <= _SHORT_MATRIX_UNITS:
        stages = min(stages, max(3, _SHORT_RING_BYTES // stage))
    return stages


def common_width(*plans: Plan) -> int | None:
    """Words of a row in which all plans' stages can be cut for one ring; None if there is none."""
    words = [p.stage_words for p in plans]
    width = math.gcd(128, *words)
    return width if max(words) // width <= 256 else None
