"""Attention over a long cache, its chunks dealt to all SMs, in two launches.

Each thread block streams keys and values of its chunks through a ring of tiles of 64 rows; two
warpgroups multiply, 64 query rows each, so that a tile is read once for 128 query rows (8 tokens of
16 heads). A chunk leaves its greatest score, its weights' sum and its weighted sum of values for
each row. The second launch, `combine.py`, adds them up by ascending chunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.chunks import Chunks
from pallas_kernels.attention.combine import Combine
from pallas_kernels.attention.shapes import sizes_of
from pallas_kernels.roles import run_roles
from pallas_kernels.softmax import LOG2E, MASKED

TILE = 64
"""Rows of keys in a stage."""
ROWS = 64
"""Query rows of a warpgroup."""
_SHARED_BYTES = 224 * 1024
_MOST_STAGES = 6
_PRODUCER_REGISTERS = 40
_CONSUMER_REGISTERS = 232


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the chunks are run.

    Attributes:
      blocks: thread blocks, one for each SM.
      stages: tiles in shared memory; None: what fits, at most 6.
      ratio: of `Chunks`: it changes bits.
    """

    blocks: int = 132
    stages: int | None = None
    ratio: int = 64


@dataclasses.dataclass(frozen=True)
class Chunked:
    """Shapes of a call and a thread block's work.

    `rows` are query rows of a key/value head (all heads of a token, token by token), padded to
    whole blocks of `consumers` times 64.
    """

    b: int
    t: int
    n: int
    h: int
    v: int
    k: int
    s: int
    launch: Launch
    interpreted: bool = False

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.n // self.k

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 1 if self.t * self.group <= ROWS else 2

    @property
    def row_blocks(self) -> int:
        """Blocks of query rows, each with a pass over the cache."""
        return -(-self.t * self.group // (ROWS * self.consumers))

    @property
    def rows(self) -> int:
        """Query rows of a key/value head, padded."""
        return self.row_blocks * ROWS * self.consumers

    @property
    def chunks(self) -> Chunks:
        """Of the cache."""
        return Chunks(self.s, self.launch.ratio)

    @property
    def lanes(self) -> int:
        """(sequence, key/value head, block of rows) triples: units of a chunk."""
        return self.b * self.k * self.row_blocks

    @property
    def stages(self) -> int:
        """Tiles in shared memory."""
        held = self.consumers * ROWS * self.h * 2
        fit = (_SHARED_BYTES - held) // (TILE * (self.h + self.v) * 2)
        return self.launch.stages or min(_MOST_STAGES, fit)

    def misfit(self) -> str | None:
        """Why the kernel cannot take these shapes."""
        if self.h % 16 or self.v % 32 or self.v > 128 or self.h > 256:
            return (
                f"heads of {self.h} and {self.v}; they must be multiples of 16 and 32, at most 256 "
                "and 128"
            )
        if self.s % 8:
            return f"a cache of {self.s} rows; the copy engine takes multiples of 8"
        return None

    def joint(self, sink: bool) -> Combine:
        """The launch that adds up the chunks."""
        return Combine(self.b, self.t, self.n, self.v, self.k, self.rows, self.chunks, sink)

    # --- a thread block ---------------------------------------------------------------------------

    def ends(self, refs):
        """Position after the last row, by sequence."""
        return [refs["start"][i] + refs["live"][i] for i in range(self.b)]

    def for_units(self, refs, visit, carry):
        """carry = visit(unit, carry) over this block's units; later, larger chunks come first.

        A unit is (sequence, key/value head, block of rows, chunk). Blocks take them by turns, to
        and fro, so that a block that gets a large one gets a small one next.
        """
        ends = self.ends(refs)
        counts = [self.chunks.count(end, jnp.maximum) for end in ends]
        most = functools.reduce(jnp.maximum, counts)
        blocks, block = self.launch.blocks, lax.axis_index("block")
        total = most * self.lanes

        def turn(i, carry):
            place = jnp.where(lax.rem(i, 2) == 0, block, blocks - 1 - block)
            unit = i * blocks + place
            chunk = most - 1 - lax.div(unit, self.lanes)
            lane = lax.rem(unit, self.lanes)
            sequence = lax.div(lane, self.k * self.row_blocks)
            kv = lax.rem(lax.div(lane, self.row_blocks), self.k)
            low, size = self.chunks.place(chunk, jnp.where)
            end = _pick(ends, sequence)
            keys = jnp.where(unit < total, jnp.clip(end - low, 0, size), 0)
            found = Unit(
                sequence, kv, lax.rem(lane, self.row_blocks), chunk, low, keys,
                _pick([refs["start"][i] for i in range(self.b)], sequence), end,
            )  # fmt: skip
            return lax.cond(keys > 0, functools.partial(visit, found), lambda c: c, carry)

        return lax.fori_loop(0, lax.div(total + blocks - 1, blocks), turn, carry)

    def produce(self, refs):
        """Copies tile after tile, each as soon as its place in the ring is free."""

        def visit(unit, done):
            def step(i, done):
                stage = lax.rem(done, self.stages)
                rows = pl.ds(unit.low + i * TILE, TILE)
                for name, full, empty in (
                    ("keys", "keys_full", "keys_empty"),
                    ("values", "values_full", "values_empty"),
                ):
                    source = refs[name].at[unit.sequence, unit.kv, rows]
                    target = refs[f"{name}_ring"].at[stage]
                    pl.when(done >= self.stages)(
                        lambda empty=empty: plgpu.barrier_wait(refs[empty].at[stage])
                    )
                    plgpu.copy_gmem_to_smem(source, target, refs[full].at[stage])
                return done + 1

            return lax.fori_loop(0, unit.tiles, step, done)

        done = self.for_units(refs, visit, jnp.int32(0))

        def drain(i, _):
            for name in ("keys_empty", "values_empty"):
                plgpu.barrier_wait(refs[name].at[lax.rem(i, self.stages)])

        lax.fori_loop(jnp.maximum(0, done - self.stages), done, drain, None)

    def consume(self, refs):
        """One warpgroup's 64 query rows over this block's chunks."""
        me = lax.axis_index("wg")

        def visit(unit, done):
            row = (unit.row_block * self.consumers + me) * ROWS
            source = refs["q"].at[unit.sequence, unit.kv, pl.ds(row, ROWS)]
            plgpu.copy_gmem_to_smem(source, refs["q_held"].at[me], refs["q_full"].at[me])
            plgpu.barrier_wait(refs["q_full"].at[me])
            total, top, sums = self.fold(refs, unit, done, row, me)
            where = unit.sequence, unit.kv, unit.chunk, pl.ds(row, ROWS)
            refs["parts"][where] = sums
            refs["tops"][where] = top
            refs["totals"][where] = total
            return done + unit.tiles

        self.for_units(refs, visit, jnp.int32(0))

    def fold(self, refs, unit, done, row, me):
        """A chunk's sum of weights, greatest score and weighted sum of values."""
        reduced = plgpu.Layout.WGMMA.reduce(1)
        top = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), reduced)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), reduced)
        sums = plgpu.layout_cast(jnp.zeros((ROWS, self.v), jnp.float32), plgpu.Layout.WGMMA)
        # Tiles of which every row sees every key: all positions up to `start`.
        plain = jnp.clip(lax.div(unit.start + 1 - unit.low, TILE), 0, unit.tiles)
        step = functools.partial(self.step, refs, unit, done, row, me)
        carry = lax.fori_loop(0, plain, functools.partial(step, masked=False), (total, top, sums))
        return lax.fori_loop(plain, unit.tiles, functools.partial(step, masked=True), carry)

    def step(self, refs, unit, done, row, me, i, carry, masked: bool):
        """One tile."""
        total, top, sums = carry
        stage = lax.rem(done + i, self.stages)
        plgpu.barrier_wait(refs["keys_full"].at[stage])

        def score(ref):
            plgpu.wgmma(ref, refs["q_held"].at[me], refs["keys_ring"].at[stage].T)
            return ref[...]

        scores = pl.run_scoped(score, plgpu.ACC((ROWS, TILE), jnp.float32))
        plgpu.barrier_arrive(refs["keys_empty"].at[stage])
        scores = scores * jnp.float32(self.h**-0.5 * LOG2E)
        if masked:
            seen = self.seen(unit, row, i)
            scores = jnp.where(seen, scores, MASKED)
        # Whole: see `pallas_kernels.softmax`.
        new = jnp.maximum(top, jnp.round(scores.max(axis=1)))
        shrink = jnp.exp2(top - new)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [0]))
        if masked:
            weights = jnp.where(seen, weights, 0.0)
        total = total * shrink + weights.sum(axis=1)
        sums = sums * lax.broadcast_in_dim(shrink, sums.shape, [0])
        weights = weights.astype(jnp.bfloat16)
        plgpu.barrier_wait(refs["values_full"].at[stage])
        if masked:
            self.clear(refs, unit, i, stage)
        sums = self.mix(sums, weights, refs["values_ring"].at[stage])
        plgpu.barrier_arrive(refs["values_empty"].at[stage])
        return total, new, sums

    def mix(self, sums, weights, values):
        """sums + weights @ values, added by the tensor cores."""
        if self.interpreted:
            # The interpreter knows no product of registers.
            return sums + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
        accumulate = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))
        return accumulate(plgpu.ACC.init(sums))

    def seen(self, unit, row, i):
        """Which keys of a tile each query row sees."""
        kind = functools.partial(
            plgpu.broadcasted_iota, jnp.int32, (ROWS, TILE), layout=plgpu.Layout.WGMMA
        )
        key = unit.low + i * TILE + kind(1)
        token = lax.div(kind(0) + row, self.group)
        return (key <= token + unit.start) & (key < unit.end)

    def clear(self, refs, unit, i, stage):
        """Values past the last position become 0: they may be NaN, which no weight takes away.

        Each warpgroup does it, and only orders its own products after it; both write the same.
        """
        first = unit.low + i * TILE

        @pl.when(first + TILE > unit.end)
        def _():
            ring = refs["values_ring"].at[stage]
            values = plgpu.load(ring, layout=plgpu.Layout.WGMMA)
            place = plgpu.broadcasted_iota(jnp.int32, (TILE, self.v), 0, layout=plgpu.Layout.WGMMA)
            ring[...] = jnp.where(place + first < unit.end, values, jnp.zeros_like(values))
            plgpu.commit_smem()

    def call(self, q, keys, values, start, live):
        """Launches; returns the chunks' weighted sums, greatest scores and sums of weights."""
        shape = (self.b, self.k, self.chunks.most, self.rows)
        outs = dict(
            parts=jax.ShapeDtypeStruct((*shape, self.v), jnp.float32),
            tops=jax.ShapeDtypeStruct(shape, jnp.float32),
            totals=jax.ShapeDtypeStruct(shape, jnp.float32),
        )
        inputs = dict(q=q, keys=keys, values=values, start=start, live=live)
        names = (*inputs, *outs)

        def body(*given, **scratch):
            refs = dict(zip(names, given, strict=True)) | scratch
            run_roles(self, refs, _CONSUMER_REGISTERS, producer=_PRODUCER_REGISTERS)

        def held(count, rows, columns):
            wide = next(bytes for bytes in (128, 64, 32) if columns * 2 % bytes == 0)
            transforms = plgpu.TilingTransform((8, wide // 2)), plgpu.SwizzleTransform(wide)
            return plgpu.SMEM((count, rows, columns), jnp.bfloat16, transforms=transforms)

        def barriers(arrivals=1):
            return plgpu.Barrier(num_barriers=self.stages, num_arrivals=arrivals)

        return plgpu.kernel(
            body,
            out_type=tuple(outs.values()),
            grid=(self.launch.blocks,),
            grid_names=("block",),
            num_threads=self.consumers + 1,
            thread_name="wg",
            scratch_types=dict(
                q_held=held(self.consumers, ROWS, self.h),
                keys_ring=held(self.stages, TILE, self.h),
                values_ring=held(self.stages, TILE, self.v),
                q_full=plgpu.Barrier(num_barriers=self.consumers),
                keys_full=barriers(),
                values_full=barriers(),
                keys_empty=barriers(self.consumers),
                values_empty=barriers(self.consumers),
            ),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name="attention_chunks",
            interpret=plgpu.InterpretGPUParams() if self.interpreted else None,
        )(*inputs.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unit:
    """A chunk for a block of query rows; `keys` of its positions, from `low` on, are written."""

    sequence: jax.Array
    kv: jax.Array
    row_block: jax.Array
    chunk: jax.Array
    low: jax.Array
    keys: jax.Array
    start: jax.Array
    end: jax.Array

    @property
    def tiles(self):
        """Tiles that hold its keys."""
        return lax.div(self.keys + (TILE - 1), TILE)


def _pick(values, index):
    """values[index] of scalars."""
    found = values[0]
    for i, value in enumerate(values[1:], 1):
        found = jnp.where(index == i, value, found)
    return found


def shape_of(q, keys, values, launch: Launch | None = None) -> Chunked:
    """The shapes of a call."""
    return Chunked(*sizes_of(q, keys, values), launch or Launch())


def chunked_attention(shape: Chunked, q, keys, values, start, live, sink):
    """See `api.decode_attention`, for a cache that holds all positions; two launches."""
    b, t, _, h = q.shape
    # Head by head of a key/value head, token by token: for one key/value head that is q as it lies.
    rows = q.reshape(b, t, shape.k, shape.group, h).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(b, shape.k, t * shape.group, h)
    if shape.rows > t * shape.group:
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, shape.rows - t * shape.group), (0, 0)))
    return attend_rows(shape, rows, keys, values, start, live, sink)


def attend_rows(shape: Chunked, rows, keys, values, start, live, sink):
    """The two launches, on queries [b, k, shape.rows, h]; those that fill up may be anything."""
    found = shape.call(rows, keys, values, start, live)
    return shape.joint(sink is not None).call(rows.dtype, *found, start, live, sink)
