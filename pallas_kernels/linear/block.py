"""A thread block of the few-token linear: a ring of stages, the roles of its warps, its rows.

Barriers, and why nothing can wait for ever. A block never waits for another one.

- `full[s]`: the producer arms it with a stage's bytes and starts the copy; consumers wait. One
  phase a copy into place s, waited for once by each consumer, in order.
- `empty[s]` (only if a place is used twice): each consumer warpgroup arrives once for each copy
  that it has read; the producer waits before the next copy into s. So the n-th copy into s needs
  the reads of copy n - 1, which needs only copies and reads before it.
- `put[b]`: each consumer warpgroup arrives when its sums of a step are in buffer b, step mod 2; the
  finisher waits. `taken[b]`: the finisher arrives when it has read them; consumers wait before they
  write the buffer again, two steps later.
- with a norm: `norm_full`, armed by the producer for the norm's weight before all stages, and
  `normed`, at which each consumer warpgroup arrives when its sums of squares are written; each
  waits once for both.

All loops count the same steps: they depend on the plan alone. No phase can be lost: the next one of
a barrier cannot end before who waits for this one has gone on (for `full`, the producer first
waits for `empty`, where each consumer arrives; for `put`, consumers first wait for `taken`; and so
on). At the end the producer waits for the last `empty` and consumers for the last `taken`, so that
every phase is seen.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear.plan import FINISHER_REGISTERS, PRODUCER_REGISTERS, Plan


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
        """Starts to load a step's scales; FP8."""

    def multiply(self, sums, x, scales, part, stage_ref, group):
        """Returns sums plus a stage's weights times x; sums are None at a step's first stage."""

    def free(self):
        """Lets the copy engine write over what this thread has read: before `empty` is told."""

    def put(self, sums, ref):
        """Leaves a warpgroup's sums of a step in shared memory."""

    def finish(self, sums_ref, out_ref, first_row, step, piece):
        """Adds a step's slices and writes its rows of the result."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What a thread block's warpgroups do: consumers, one that finishes steps, the producer."""

    plan: Plan
    hooks: Hooks

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.plan.warps // 4

    def place(self):
        """Which of the blocks that share rows this one is, and its first row."""
        plan, cta = self.plan, lax.axis_index("cta")
        row = lax.div(cta, plan.split) * plan.block_rows
        return lax.rem(cta, plan.split), jnp.minimum(row, plan.rows - plan.block_rows)

    def produce(self, refs):
        """Copies stage after stage, each as soon as its place in the ring is free."""
        plan, full, empty = self.plan, refs["full"], refs.get("empty")
        piece, first_row = self.place()
        if "norm" in refs:
            mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            plgpu.copy_gmem_to_smem(
                refs["norm"], refs["norm_here"], refs["norm_full"], oob_mode=mode
            )

        def copy(step, part, stage, rows):
            row = first_row + step * plan.step_rows
            source = refs["weight"].at[pl.ds(row, rows), piece, part]
            target = refs["ring"].at[stage]
            if rows < plan.step_rows:
                target = refs["ring"].at[stage, pl.ds(0, rows)]
            # Without fill a stage that is contiguous needs no tensor map.
            plgpu.copy_gmem_to_smem(
                source, target, full.at[stage], oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            )

        def visit(step, rows):
            for part in range(plan.parts):
                index = step * plan.parts + part
                stage = lax.rem(index, plan.stages)
                if not plan.once:
                    pl.when(index >= plan.stages)(
                        lambda stage=stage: plgpu.barrier_wait(empty.at[stage])
                    )
                copy(step, part, stage, rows)

        whole = plan.steps - (plan.last_rows < plan.step_rows)
        lax.fori_loop(0, whole, lambda step, _: visit(step, plan.step_rows), None)
        if whole < plan.steps:
            visit(jnp.int32(whole), plan.last_rows)
        if not plan.once:

            def drain(index, _):
                plgpu.barrier_wait(empty.at[lax.rem(index, plan.stages)])

            lax.fori_loop(plan.copies - plan.stages, plan.copies, drain, None)

    def operands(self, refs, piece, group):
        """This warpgroup's slices of x."""
        fetched = self.hooks.fetch(refs["x"], piece, group)
        if "norm" in refs:
            self.hooks.squares(fetched, refs["norms"], group)
            plgpu.barrier_arrive(refs["normed"])
            plgpu.barrier_wait(refs["normed"])
            plgpu.barrier_wait(refs["norm_full"])
            fetched = self.hooks.normed(fetched, refs["norms"], refs["norm_here"], piece, group)
        return self.hooks.operands(fetched)

    def consume(self, refs):
        """Multiplies each step's stages by slices of x, held in registers."""
        plan, hooks, group = self.plan, self.hooks, lax.axis_index("wg")
        piece, first_row = self.place()
        x = self.operands(refs, piece, group)

        def visit(step, _):
            sums, scales = None, None
            if "scale" in refs:
                scales = hooks.scales(refs["scale"], first_row, step, piece, group)
            for part in range(plan.parts):
                stage = lax.rem(step * plan.parts + part, plan.stages)
                plgpu.barrier_wait(refs["full"].at[stage])
                sums = hooks.multiply(sums, x, scales, part, refs["ring"].at[stage], group)
                if not plan.once:
                    hooks.free()
                    plgpu.barrier_arrive(refs["empty"].at[stage])
            buffer = lax.rem(step, 2)
            pl.when(step >= 2)(lambda: plgpu.barrier_wait(refs["taken"].at[buffer]))
            hooks.put(sums, refs["sums"].at[buffer, group])
            plgpu.barrier_arrive(refs["put"].at[buffer])

        def drain(step, _):
            plgpu.barrier_wait(refs["taken"].at[lax.rem(step, 2)])

        lax.fori_loop(0, plan.steps, visit, None)
        lax.fori_loop(max(0, plan.steps - 2), plan.steps, drain, None)

    def finish(self, refs):
        """Adds up what the consumers put down, and writes it, while they go on."""
        piece, first_row = self.place()

        def visit(step, _):
            buffer = lax.rem(step, 2)
            plgpu.barrier_wait(refs["put"].at[buffer])
            self.hooks.finish(refs["sums"].at[buffer], refs["out"], first_row, step, piece)
            plgpu.barrier_arrive(refs["taken"].at[buffer])

        lax.fori_loop(0, self.plan.steps, visit, None)

    def run(self, refs):
        """The kernel: each warpgroup takes its role and its share of the registers."""
        role, groups = lax.axis_index("wg"), self.consumers

        @pl.when(role == groups + 1)
        def _():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            self.produce(refs)

        @pl.when(role == groups)
        def _():
            plgpu.set_max_registers(FINISHER_REGISTERS, action="decrease")
            self.finish(refs)

        @pl.when(role < groups)
        def _():
            plgpu.set_max_registers(self.plan.registers, action="increase")
            self.consume(refs)

    def scratch_types(self, dtype, norm: bool) -> dict:
        """Ring, sums and barriers."""
        plan, groups = self.plan, self.consumers
        types = dict(
            ring=plgpu.SMEM((plan.stages, *plan.stage_shape), dtype),
            sums=plgpu.SMEM((2, groups, plan.sums_floats // groups), jnp.float32),
            full=plgpu.Barrier(num_barriers=plan.stages),
            put=plgpu.Barrier(num_barriers=2, num_arrivals=groups),
            taken=plgpu.Barrier(num_barriers=2),
        )
        if not plan.once:
            types["empty"] = plgpu.Barrier(num_barriers=plan.stages, num_arrivals=groups)
        if norm:
            types["norms"] = plgpu.SMEM((plan.warps, 16), jnp.float32)
            types["normed"] = plgpu.Barrier(num_arrivals=groups)
            types["norm_here"] = plgpu.SMEM((plan.columns,), jnp.bfloat16)
            types["norm_full"] = plgpu.Barrier()
        return types

    def call(self, inputs, out_type: jax.ShapeDtypeStruct, interpret):
        """Launches on named inputs: x, weight as `Plan` cuts it; scale, norm if there are."""
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
            # Pallas' own barriers, which are the producer's only.
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name="linear",
            interpret=interpret,
        )
        return kernel(*inputs.values())
