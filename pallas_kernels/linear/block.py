"""A thread block of the few-token linear: a ring of stages, the roles of its warps, its rows.

Barriers, and why nothing can wait for ever. A block never waits for another one.

- `full[s]`: the producer arms it with a stage's bytes and starts the copy, whose end completes it;
  consumers wait. One phase a copy into place s, waited for once by each consumer, in order.
- `empty[s]` (only if a place is used twice): each consumer warpgroup arrives once for each copy
  that it has read; the producer waits before the next copy into s. So the n-th copy into s needs
  the reads of copy n - 1, which needs only copies and reads before it.
- `put[b]`: each consumer warpgroup arrives when its sums of a step are in buffer b, step mod 2; the
  finisher waits. `taken[b]`: the finisher arrives when it has read them; consumers wait before they
  write the buffer again, two steps later.
- with a norm: `norm_full`, armed by the producer for the norm's weight before all stages, and
  `normed`, at which each consumer warpgroup arrives when its sums of squares are written, which
  needs loads alone; each waits once for both. So does the producer for `normed`, after the copies
  of `EARLY_BYTES`, if there are more.

All loops count the same steps: they depend on the plan alone. Who waits says for which of a
barrier's phases, by its parity; the next one cannot end before all have gone on (for `full`, the
producer first waits for `empty`, where each consumer arrives; for `put`, consumers first wait for
`taken`; and so on). At the end the producer waits for the last `empty` and consumers for the last
`taken`, so that nothing is under way when a block ends.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear.plan import FINISHER_REGISTERS, Plan
from pallas_kernels.roles import run_roles

EARLY_BYTES = 64 << 10
"""Of the copies that begin before x is there, in a launch with a norm. Ordinary loads queue behind
all copies under way: half of a layer's blocks had x after 5.3 us with a ring full of them, after
2.2 with 32 KB, after 1.6 with none (an H200; `docs/results/attention-line-h200.json`). With none
memory is idle until then; with 64 KB the layer's median was least, by less than its spread."""


@typing.runtime_checkable
class Hooks(typing.Protocol):
    """What a warpgroup does with a matrix, apart from moving it: in PTX, or in jnp on a CPU."""

    def fetch(self, x_ref, piece, group):
        """Starts to load a warpgroup's slices of x."""

    def squares(self, fetched, norms_ref, group):
        """Leaves tokens' sums of squares over slices in shared memory."""

    def normed(self, fetched, norms_ref, norm_ref, piece, group):
        """The RMS norm of what was fetched."""

    def operands(self, fetched):
        """Returns what was fetched as `multiply` takes it."""

    def scales(self, scale_ref, first_row, step, piece, group):
        """Starts to load a step's scales, of any step; FP8."""

    def multiply(self, sums, x, scales, part, stage_ref, group):
        """Returns sums plus a stage's weights times x; sums are None at a step's first stage."""

    def arrive(self, place, index):
        """Arrives for this warpgroup at one of a row of barriers."""

    def give_back(self, place, index, sums):
        """The same, after what was read from a stage for these sums."""

    def wait(self, place, index, nth):
        """Waits for the nth time that all have arrived."""

    def copy(self, weight_ref, row, rows, piece, part, stage_ref, place, index):
        """Starts to copy rows of a part of a piece into a stage."""

    def copy_norm(self, norm_ref, target_ref, place):
        """Starts to copy the norm's weight."""

    def prefetch(self, ahead_ref, num_bytes, block):
        """Starts to bring a part of an array to the L2 cache."""

    def put(self, sums, ref):
        """Leaves a warpgroup's sums of a step in shared memory."""

    def residual(self, residual_ref, first_row, step):
        """Starts to load what is to be added to a step's rows."""

    def finish(self, sums_ref, out_ref, first_row, step, piece, residual=None):
        """Adds a step's slices, and what `residual` gave, and writes its rows of the result."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What a thread block's warpgroups do: consumers, one that finishes steps, the producer.

    Attributes:
      plan: of the matrix.
      hooks: of the matrix.
      ahead_bytes: of another array, to be brought to the L2 cache at the end, by all blocks.
      before: copies and steps of the matrices before this one in the same launch.
      ring: stages of the ring that they share; None if there are none.
    """

    plan: Plan
    hooks: Hooks
    ahead_bytes: int = 0
    before: tuple[int, int] = (0, 0)
    ring: int | None = None

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.plan.warps // 4

    @property
    def stages(self) -> int:
        """Of the ring."""
        return self.ring or self.plan.stages

    @property
    def once(self) -> bool:
        """Whether no place of the ring is used twice."""
        return self.ring is None and self.plan.once

    @property
    def early(self) -> int:
        """Copies that begin before x is there, if there are more."""
        return max(1, EARLY_BYTES // self.plan.stage_bytes)

    def in_ring(self, copy):
        """The place of a copy, and how often it was used before."""
        copy = copy + self.before[0] if self.before[0] else copy
        return lax.rem(copy, self.stages), lax.div(copy, self.stages)

    def buffer(self, step):
        """The buffer of a step's sums, and how often it was used before."""
        step = step + self.before[1] if self.before[1] else step
        return lax.rem(step, 2), lax.div(step, 2)

    def place(self):
        """Which of the blocks that share rows this one is, and its first row."""
        plan, cta = self.plan, lax.axis_index("cta")
        row = lax.div(cta, plan.split) * plan.block_rows
        return lax.rem(cta, plan.split), jnp.minimum(row, plan.rows - plan.block_rows)

    def produce(self, refs):
        """Copies all stages, and waits until they are read."""
        self.copy_stages(refs)
        self.bring_ahead(refs)
        self.see_stages_read(refs)

    def copy_stages(self, refs):
        """Copies stage after stage, each as soon as its place in the ring is free."""
        plan, hooks = self.plan, self.hooks
        piece, first_row = self.place()
        if "norm" in refs:
            hooks.copy_norm(refs["norm"], refs["norm_here"], refs["norm_full"])

        def visit(step, rows):
            row = first_row + step * plan.step_rows
            for part in range(plan.parts):
                copy = step * plan.parts + part
                stage, turn = self.in_ring(copy)
                if "norm" in refs:
                    self.wait_if(copy == self.early, refs["normed"], 0, 0)
                if not self.once:
                    self.wait_if(turn > 0, refs["empty"], stage, turn - 1)
                target = refs["ring"].at[stage]
                hooks.copy(refs["weight"], row, rows, piece, part, target, refs["full"], stage)

        whole = plan.steps - (plan.last_rows < plan.step_rows)
        lax.fori_loop(0, whole, lambda step, _: visit(step, plan.step_rows), None)
        if whole < plan.steps:
            visit(jnp.int32(whole), plan.last_rows)

    def bring_ahead(self, refs):
        """Starts to bring what is read next nearer, once this block has all its own weights."""
        if "ahead" in refs:
            last = self.in_ring(jnp.int32(self.plan.copies - 1))
            self.hooks.wait(refs["full"], *last)
            self.hooks.prefetch(refs["ahead"], self.ahead_bytes, lax.axis_index("cta"))

    def see_stages_read(self, refs):
        """Waits for the last reads of each place of the ring."""
        if self.once:
            return

        def drain(index, _):
            self.hooks.wait(refs["empty"], *self.in_ring(index))

        copies = self.plan.copies
        lax.fori_loop(max(copies - self.stages, -self.before[0]), copies, drain, None)

    def wait_if(self, condition, place, index, nth):
        """Waits, or not."""
        pl.when(condition)(lambda: self.hooks.wait(place, index, nth))

    def operands(self, refs, piece, group):
        """This warpgroup's slices of x."""
        hooks = self.hooks
        fetched = hooks.fetch(refs["x"], piece, group)
        if "norm" in refs:
            hooks.squares(fetched, refs["norms"], group)
            hooks.arrive(refs["normed"], 0)
            hooks.wait(refs["normed"], 0, 0)
            hooks.wait(refs["norm_full"], 0, 0)
            fetched = hooks.normed(fetched, refs["norms"], refs["norm_here"], piece, group)
        return hooks.operands(fetched)

    def consume(self, refs):
        """Multiplies all stages, and waits until all sums are read."""
        self.multiply_stages(refs)
        self.see_sums_read(refs)

    def multiply_stages(self, refs):
        """Multiplies each step's stages by slices of x, held in registers."""
        plan, hooks, group = self.plan, self.hooks, lax.axis_index("wg")
        piece, first_row = self.place()

        def scales_of(step):
            if "scale" not in refs:
                return None
            return hooks.scales(refs["scale"], first_row, step, piece, group)

        x = self.operands(refs, piece, group)

        def visit(step, scales):
            # A step ahead: they must not be waited for when the weights are there.
            sums, ahead = None, scales_of(step + 1)
            for part in range(plan.parts):
                stage, turn = self.in_ring(step * plan.parts + part)
                hooks.wait(refs["full"], stage, turn)
                sums = hooks.multiply(sums, x, scales, part, refs["ring"].at[stage], group)
                if not self.once:
                    hooks.give_back(refs["empty"], stage, sums)
            buffer, turn = self.buffer(step)
            self.wait_if(turn > 0, refs["taken"], buffer, turn - 1)
            hooks.put(sums, refs["sums"].at[buffer, group])
            hooks.arrive(refs["put"], buffer)
            return ahead

        lax.fori_loop(0, plan.steps, visit, scales_of(0))

    def see_sums_read(self, refs):
        """Waits for the last reads of both buffers of sums."""

        def drain(step, _):
            self.hooks.wait(refs["taken"], *self.buffer(step))

        steps = self.plan.steps
        lax.fori_loop(max(steps - 2, -self.before[1]), steps, drain, None)

    def finish(self, refs):
        """Adds up what the consumers put down, and writes it, while they go on."""
        piece, first_row = self.place()
        hooks = self.hooks

        def visit(step, _):
            buffer, turn = self.buffer(step)
            residual = None
            if "residual" in refs:
                residual = hooks.residual(refs["residual"], first_row, step)
            hooks.wait(refs["put"], buffer, turn)
            where = first_row, step, piece
            hooks.finish(refs["sums"].at[buffer], refs["out"], *where, residual)
            hooks.arrive(refs["taken"], buffer)

        lax.fori_loop(0, self.plan.steps, visit, None)

    def run(self, refs):
        """The kernel: each warpgroup takes its role and its share of the registers."""
        refs = refs | self.hooks.make_barriers(refs, self.barriers("norm" in refs))
        run_roles(self, refs, self.plan.registers, FINISHER_REGISTERS)

    def barriers(self, norm: bool) -> list[tuple[str, int, int]]:
        """Name, number, and warpgroups that arrive; none where a copy does."""
        stages, groups = self.stages, self.consumers
        found = [("full", stages, 0), ("put", 2, groups), ("taken", 2, 1)]
        if not self.once:
            found.append(("empty", stages, groups))
        return [*found, ("norm_full", 1, 0), ("normed", 1, groups)] if norm else found

    def scratch_types(self, dtype, norm: bool) -> dict:
        """Ring, sums and barriers."""
        plan, groups = self.plan, self.consumers
        types = dict(
            ring=plgpu.SMEM((self.stages, *plan.stage_shape), dtype),
            sums=plgpu.SMEM((2, groups, plan.sums_floats // groups), jnp.float32),
        )
        if norm:
            types["norms"] = plgpu.SMEM((plan.warps, 16), jnp.float32)
            types["norm_here"] = plgpu.SMEM((plan.columns,), jnp.bfloat16)
        return types | self.hooks.barrier_types(self.barriers(norm))

    def call(self, inputs, out_type: jax.ShapeDtypeStruct, interpret):
        """Launches on named inputs: x, weight as `Plan` cuts it; what else there is."""
        names = list(inputs)

        def body(*arguments, **scratch):
            refs = dict(zip(names, arguments, strict=False))
            self.run({**refs, "out": arguments[len(names)], **scratch})

        kernel = plgpu.kernel(
            body,
            out_type=out_type,
            grid=(self.plan.groups * self.plan.split,),
            grid_names=("cta",),
            num_threads=self.consumers + 2,
            thread_name="wg",
            scratch_types=self.scratch_types(inputs["weight"].dtype, "norm" in inputs),
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
            kernel_name="linear",
            interpret=interpret,
        )
        return kernel(*inputs.values())
