"""A thread block of a window layer's attention: two matrices' shares, and a tile of the ring's.

The producer streams the block's rows of both matrices through one ring of shared memory. Where a
block does not attend it waits for no other block: while attention is under way, the output
projection's weights come. So there is one start instead of three, at each of which memory would be
idle.

All blocks must be resident: what some write, others read in the same launch (`exchange`). First the
projection, which the few blocks that attend take: each its own queries and all new rows, no more.
Then the heads, which all take. No block waits for more than the words that it needs. Beside the
barriers of `linear.block` there are, each with one phase and the finisher's arrival, `begun`, when
it knows which half of the exchange is this launch's, and `projected`, when what its block attends
with is in shared memory.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.ring_block import RingBlock
from pallas_kernels.attention_layer.exchange import Exchange
from pallas_kernels.linear.block import Block
from pallas_kernels.linear.plan import Plan
from pallas_kernels.roles import consumer_registers, run_roles
from pallas_kernels.shared_memory import shared_bytes

SHARED_BYTES = 225 * 1024
"""Of 227 KB that a thread block can have; the rest is for barriers."""
FINISHER_REGISTERS = 40
"""Less than a `linear` has: those that attend need more."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A launch.

    Attributes:
      projection: of queries, keys and values, with the norm before it.
      ring: attention's shapes, and what its blocks do.
      output: the projection of heads, after the first in the same ring of stages.
      together: hooks of what concerns several blocks, and of attention.
      blocks: of the grid.
      stream: whether the rows are added to the result.
    """

    projection: Block
    ring: RingBlock
    output: Block
    together: typing.Any
    blocks: int
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
        exchanged = self.together.exchanged(refs)
        first = dict(x=refs["h"], weight=refs["qkv_weight"], out=exchanged["qkv"])
        first |= {name: refs[name] for name in ("norm", "norms", "norm_here")}
        second = dict(x=exchanged["heads"], weight=refs["output_weight"], out=refs["y"])
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
        return [*self.projection.barriers(True), ("begun", 1, 1), ("projected", 1, 1)]

    @property
    def places(self) -> list[str]:
        """Names of the barriers."""
        return [name for name, _, _ in self.barriers]

    def produce(self, refs):
        """Copies both matrices' stages."""
        first, second = self.parts(refs)
        self.projection.copy_stages(first)
        # What is taken of the projection would queue behind all copies under way.
        attends = lax.axis_index("cta") < self.tiles
        pl.when(attends)(lambda: self.output.hooks.wait(refs["projected"], 0, 0))
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
        hooks.wait(refs["begun"], 0, 0)
        # It waits for `projected` itself, after what it can load before.
        pl.when(attends)(lambda: self.together.attend(self.ring, refs, block))
        self.output.multiply_stages(second)
        self.output.see_sums_read(second)

    def finish(self, refs):
        """Writes what the consumers put down, and takes what they attend with in between."""
        (first, second), hooks = self.parts(refs), self.output.hooks
        block = lax.axis_index("cta")
        self.together.begin(refs, block)
        hooks.arrive(refs["begun"], 0)
        self.projection.finish(first)

        @pl.when(block < self.tiles)
        def _():
            self.together.take(self.ring, refs, block)
            hooks.arrive(refs["projected"], 0)

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
            turn=plgpu.SMEM((1,), jnp.int32),
            **{f"ring_{k}": plgpu.SMEM((n,), jnp.float32) for k, n in self.ring.shared.items()},
            **self.output.hooks.barrier_types(self.barriers),
        )

    def call(self, inputs: dict, seen: dict, interpret) -> dict:
        """Launches on named inputs; outputs by name.

        Where blocks run one after another, projection and heads are among the outputs, and `seen`
        are those of the launch before, which this one reads.
        """
        t = self.ring.b * self.ring.t
        outputs = self.together.outputs(self)
        outputs["y"] = jax.ShapeDtypeStruct((1, t, self.output.plan.rows), jnp.bfloat16)
        names = [*inputs, *seen, *outputs]

        def body(*arguments, **scratch):
            self.run(dict(zip(names, arguments, strict=True)) | scratch)

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
    if projection.block_rows % 2 or projection.rows % 2:
        return f"{projection.rows} rows, {projection.block_rows} a block: words hold two of them"
    return exchange_of(projection, output).misfit()


def exchange_of(projection: Plan, output: Plan, word: int = 0) -> Exchange:
    """What a launch of these matrices exchanges."""
    return Exchange(projection.rows, output.columns, word)
