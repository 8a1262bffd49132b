"""A thread block of a window layer's attention: two matrices' shares, and a tile of the ring's.

The producer streams the block's rows of both matrices through one ring of shared memory and never
waits for the blocks to meet: while attention is under way, the output projection's weights come.
So a launch costs one start and two meetings instead of three starts, at each of which memory would
be idle.

All blocks must be resident: they meet twice. First, when the projection is written: the few blocks
that attend wait for all. Then, when the heads are written: all wait for these few. The finisher
comes for its block, and waits for it. Beside the barriers of `linear.block` there are, each with
one phase, `projected` and `there`, at which the finisher arrives when the blocks have met, and
`attended`, at which the warpgroups that attend do when their heads are written.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.ring_block import RingBlock
from pallas_kernels.linear.block import Block
from pallas_kernels.linear.plan import Plan
from pallas_kernels.roles import consumer_registers, run_roles
from pallas_kernels.shared_memory import shared_bytes

SHARED_BYTES = 225 * 1024
"""Of 227 KB that a thread block can have; the rest is for barriers."""
FINISHER_REGISTERS = 40
"""Less than a `linear` has: those that attend need more."""
PROJECTED, THERE = 0, 4
"""Words at which blocks meet; not in one sector of the cache."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A launch.

    Attributes:
      projection: of queries, keys and values, with the norm before it.
      ring: attention's shapes, and what its blocks do.
      output: the projection of heads, after the first in the same ring of stages.
      together: hooks of what concerns several blocks, and of attention.
      blocks: of the grid.
      word: the first of the flags that they use.
      stream: whether the rows are added to the result.
    """

    projection: Block
    ring: RingBlock
    output: Block
    together: typing.Any
    blocks: int
    word: int = 0
    stream: bool = False

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.projection.consumers

    @property
    def tiles(self) -> int:
        """Blocks that attend."""
        return self.ring.b * self.ring.k * self.ring.tiles

    def parts(self, refs):
        """What each matrix's block takes for its own."""
        common = {name: refs[name] for name in ("ring", "sums", *self.places)}
        first = dict(x=refs["h"], weight=refs["qkv_weight"], out=refs["qkv"])
        first |= {name: refs[name] for name in ("norm", "norms", "norm_here")}
        second = dict(x=refs["heads_seen"], weight=refs["output_weight"], out=refs["y"])
        for part, name in ((first, "qkv_scale"), (second, "output_scale")):
            if name in refs:
                part["scale"] = refs[name]
        if "ahead" in refs:
            second["ahead"] = refs["ahead"]
        if self.stream:
            second["residual"] = refs["h"]
        return common | first, common | second

    @property
    def barriers(self) -> list[tuple[str, int, int]]:
        """Name, number, and warpgroups that arrive; none where a copy does."""
        more = [("projected", 1, 1), ("attended", 1, self.ring.warpgroups), ("there", 1, 1)]
        return [*self.projection.barriers(True), *more]

    @property
    def places(self) -> list[str]:
        """Names of the barriers."""
        return [name for name, _, _ in self.barriers]

    def produce(self, refs):
        """Copies both matrices' stages."""
        first, second = self.parts(refs)
        self.projection.copy_stages(first)
        self.output.copy_stages(second)
        self.output.bring_ahead(second)
        self.output.see_stages_read(second)

    def consume(self, refs):
        """Multiplies, attends, multiplies."""
        (first, second), hooks = self.parts(refs), self.output.hooks
        block, group = lax.axis_index("cta"), lax.axis_index("wg")
        attends = (block < self.tiles) & (group < self.ring.warpgroups)
        pl.when(attends)(lambda: self.together.bring(self.ring, refs, block))
        self.projection.multiply_stages(first)

        @pl.when(attends)
        def _():
            # It waits for `projected` itself, after what it can load before.
            self.together.attend(self.ring, refs, block)
            hooks.arrive(refs["attended"], 0)

        hooks.wait(refs["there"], 0, 0)
        self.output.multiply_stages(second)
        self.output.see_sums_read(second)

    def finish(self, refs):
        """Writes what the consumers put down, and meets the other blocks in between."""
        (first, second), hooks = self.parts(refs), self.output.hooks
        block, together = lax.axis_index("cta"), self.together
        self.projection.finish(first)
        projected, there = self.word + PROJECTED, self.word + THERE
        before = together.come(refs["flags"], projected, block)

        @pl.when(block < self.tiles)
        def _():
            together.wait_for_all(refs["flags"], projected, before)
            hooks.arrive(refs["projected"], 0)
            hooks.wait(refs["attended"], 0, 0)

        before = together.come(refs["flags"], there, block)
        together.wait_for_all(refs["flags"], there, before)
        hooks.arrive(refs["there"], 0)
        self.output.finish(second)

    def run(self, refs):
        """The kernel: each warpgroup takes its role and its share of the registers."""
        refs = refs | self.output.hooks.make_barriers(refs, self.barriers)
        registers = consumer_registers(self.consumers, FINISHER_REGISTERS)
        run_roles(self, refs, registers, FINISHER_REGISTERS)

    def scratch_types(self, dtype) -> dict:
        """Ring, sums, the norm, what attention's warps leave, barriers."""
        groups, plan = self.consumers, self.projection.plan
        floats = max(plan.sums_floats, self.output.plan.sums_floats)
        return dict(
            ring=plgpu.SMEM((self.projection.stages, *plan.stage_shape), dtype),
            sums=plgpu.SMEM((2, groups, floats // groups), jnp.float32),
            norms=plgpu.SMEM((plan.warps, 16), jnp.float32),
            norm_here=plgpu.SMEM((plan.columns,), jnp.bfloat16),
            **{f"ring_{k}": plgpu.SMEM((n,), jnp.float32) for k, n in self.ring.shared.items()},
            **self.output.hooks.barrier_types(self.barriers),
        )

    def call(self, inputs: dict, seen: dict, interpret) -> dict:
        """Launches on named inputs; outputs by name.

        `seen` are what blocks read of what others write: the outputs themselves, but where blocks
        run one after another.
        """
        ring, t = self.ring, self.ring.b * self.ring.t
        outputs = dict(
            qkv=jax.ShapeDtypeStruct((1, t, self.projection.plan.rows), jnp.bfloat16),
            heads=jax.ShapeDtypeStruct((t, ring.n * ring.v), jnp.bfloat16),
            y=jax.ShapeDtypeStruct((1, t, self.output.plan.rows), jnp.bfloat16),
        )
        names = [*inputs, *seen, *outputs]

        def body(*arguments, **scratch):
            refs = dict(zip(names, arguments, strict=True)) | scratch
            for name in ("qkv", "heads"):
                refs.setdefault(f"{name}_seen", refs[name])
            self.run(refs)

        kernel = plgpu.kernel(
            body,
            out_type=tuple(outputs.values()),
            grid=(self.blocks,),
            grid_names=("cta",),
            num_threads=self.consumers + 2,
            thread_name="wg",
            scratch_types=self.scratch_types(inputs["qkv_weight"].dtype),
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
            kernel_name="attention_layer",
            interpret=interpret,
        )
        return dict(zip(outputs, kernel(*inputs.values(), *seen.values()), strict=True))


def stages_of(projection: Plan, output: Plan, ring: RingBlock) -> int:
    """Stages of the common ring: what shared memory holds beside all else."""
    kept = [8 * max(projection.sums_floats, output.sums_floats), 2 * projection.columns, 1024]
    kept += [4 * size for size in ring.shared.values()]
    return (SHARED_BYTES - shared_bytes(*kept)) // shared_bytes(projection.stage_bytes)


def misfit(projection: Plan | None, output: Plan | None, ring: RingBlock) -> str | None:
    """Why these shapes cannot be one launch."""
    if projection is None or output is None:
        return "no two plans whose stages are of the same bytes"
    if (why := ring.misfit()) is not None:
        return why
    if ring.warpgroups > projection.warps // 4:
        return f"{ring.shares} warps of keys, more than the {projection.warps} that multiply"
    if stages_of(projection, output, ring) < 3:
        return "the ring would have less than 3 stages"
    return None
