"""What each lane of a warp does with a matrix, in PTX: fetch x, decode and multiply, add up, write.

A class of hooks. `interpreted.py` holds the same in plain jnp, for machines without a GPU. Arrays
between the hooks are `carriers`. `memory.py` and `arithmetic.py` hold what the hooks are made of.

A product is `mma.sync.m16n8k16`: 16 rows by 8 tokens over 16 columns. Which columns those are, and
in which order, is the lanes' own affair, as long as weights and x agree: lane (g, c) = (lane / 4,
lane mod 4) takes 16 bytes of row g of the weights with one load, from the c-th of four such pieces,
and of token g what belongs to the same columns. So weights are used as a checkpoint stores them.

The four words of a product's weights are, for a lane, rows g and g + 8 of two pairs of columns
each. Here all four are of row g: words 0 and 2 as row g, words 1 and 3 as "row g + 8". One product
with x for words 0 and 2 gives sums of which the first half is wanted, one with x for words 1 and 3
gives sums of which the second half is; the other halves are never looked at. That is twice the
products that there must be, and no instruction to bring words in order. A tile is then 8 rows, so
that whole rows, contiguous, make a small stage. Where a step has an even number of tiles, words 0
and 2 of two tiles' rows make one product, words 1 and 3 the other: the same sums by half as many.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import barriers, carriers, ptx
from pallas_kernels.ahead import prefetch
from pallas_kernels.linear import arithmetic, memory
from pallas_kernels.linear.plan import TILE, Plan

_SPLATS = (plgpu.Layout.WG_SPLAT,) * 4
_INIT = (
    "{{\n.reg .pred p;\nsetp.ne.u32 p, $1, 0;\n@p bra DONE;\n{}"
    "fence.mbarrier_init.release.cluster;\nDONE:\nbar.sync 0;\n}}"
)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The hooks for a matrix cut by `plan`, and t tokens.

    Attributes:
      plan: of the matrix.
      t: tokens, at most `plan.tokens`.
      unit: rows that share a scale; FP8.
      epsilon: of the norm, if there is one.
    """

    plan: Plan
    t: int
    unit: int = 0
    epsilon: float = 0.0

    @property
    def halves(self) -> int:
        """Of the 16 tokens of a product, how many halves are in use."""
        return -(-self.t // 8)

    @property
    def fp8(self) -> bool:
        """Whether weights are codes with scales."""
        return self.plan.itemsize == 1

    @property
    def block(self) -> int:
        """Columns of 64 bytes of a row of the weights, one load of the four lanes that share it."""
        return 64 // self.plan.itemsize

    def _columns(self, piece, group):
        """The first column of a warp's slice in each part; warp of the block and lane."""
        warp, lane = ptx.warp_and_lane()
        warp = ptx.add(warp, ptx.mul(ptx.scalar(group), 4))
        width, parts = self.plan.part_columns, self.plan.parts
        start = ptx.mul(ptx.scalar(piece), parts * self.plan.warps * width)
        start = ptx.add(start, ptx.mul(warp, width))
        return [ptx.add(start, part * self.plan.warps * width) for part in range(parts)], warp, lane

    barrier_types = staticmethod(barriers.types)
    arrive = staticmethod(barriers.arrive)
    wait = staticmethod(barriers.wait)

    @staticmethod
    def make_barriers(refs, groups) -> dict:
        """Makes them, called by all threads; returns each name's place."""
        places, counts = barriers.places(refs["told"], groups)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def run(_, ref):
            lines = [
                f"mbarrier.init.shared::cta.b64 [$0+{8 * i}], {count};\n"
                for i, count in enumerate(counts)
            ]
            operands = [ptx.address(ref, 0, 8), utils.thread_idx()]
            ptx.asm(None, operands, _INIT.format("".join(lines)), "r,r", effects=True)

        run(refs["told"])
        return places

    def give_back(self, place, index, sums):
        """Arrives for this warpgroup when the sums are known.

        They depend on every word of the stage that was multiplied. Without that the copy engine
        would write over what is still to be read.
        """
        kept = 2 * self.halves

        @plgpu.inline_mgpu(
            arg_types=(
                plgpu.RefType(),
                plgpu.Layout.WG_SPLAT,
                carriers.carrier(kept * self.plan.tiles),
            )
        )
        def run(_, ref, index, sums):
            words = [arith.bitcast(ptx.i32(), value) for value in carriers.values(sums)]
            barriers.arrive_knowing(ref, index, [functools.reduce(arith.ori, words)])

        run(place[0], place[1] + index, sums)

    def copy(self, weight_ref, row, rows, piece, part, stage_ref, place, index):
        """Starts to copy rows of a part: all in one piece if they are contiguous, else each."""
        plan = self.plan
        line = plan.warps * plan.part_columns * plan.itemsize
        pieces, size = (1, rows * line) if plan.contiguous else (rows, line)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), *_SPLATS[:3])
        )
        def run(_, weight, stage, told, row, piece, index):
            thread = ptx.thread()
            mine = arith.minui(thread, ptx.int32(pieces - 1))
            source = ptx.mul(ptx.add(ptx.scalar(row), mine), plan.split * plan.parts)
            source = ptx.add(ptx.add(source, ptx.mul(ptx.scalar(piece), plan.parts)), part)
            target = ptx.offset(ptx.address(stage, 0, 1), ptx.mul(mine, line))
            told = ptx.address(told, ptx.scalar(index), 8)
            memory.copy(thread, told, pieces, target, ptx.address(weight, source, line), size)

        run(weight_ref, stage_ref, place[0], row, piece, place[1] + index)

    def copy_norm(self, norm_ref, target_ref, place):
        """Starts to copy the norm's weight."""
        size = 2 * self.plan.columns

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType()))
        def run(_, norm, target, told):
            told, source = ptx.address(told, place[1], 8), ptx.address(norm, 0, 1)
            memory.copy(ptx.thread(), told, 1, ptx.address(target, 0, 1), source, size)

        run(norm_ref, target_ref, place[0])

    def prefetch(self, ahead_ref, num_bytes, block):
        """Starts to bring some of an array to the L2 cache, a part of each block's share."""
        prefetch(ahead_ref, num_bytes, block, self.plan.groups * self.plan.split)

    def fetch(self, x_ref, piece, group):
        """Starts to load this warp's slice of all tokens; those that are not there are zeros."""
        per_thread = self.plan.slice_columns // 8 * self.halves

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT),
            return_type=carriers.carried(per_thread, jnp.int32),
        )
        def run(_, x, piece, group):
            columns, _, lane = self._columns(piece, group)
            words = []
            for half in range(self.halves):
                token = ptx.add(ptx.shr(lane, 2), 8 * half)
                there = ptx.below(token, self.t)
                row = ptx.mul(arith.select(there, token, ptx.int32(0)), self.plan.columns)
                flag = ptx.flag(there)

                def load(at, row=row, flag=flag):
                    place = ptx.address(x, ptx.add(row, at), 2)
                    return memory.load_row(place, flag)

                words += self._row(columns, lane, load)
            return carriers.carry_values(words, signed=True)

        return run(x_ref, piece, group)

    def _row(self, columns, lane, load):
        """A lane's words of a row of x, or of the norm's weight: `load` takes a column."""
        own = ptx.mul(ptx.and_(lane, 3), self.block // 4)
        words = []
        for column in columns:
            column = ptx.add(column, own)
            for block in range(0, self.plan.part_columns, self.block):
                for at in range(0, self.block // 4, 8):
                    words += load(ptx.add(column, block + at))
        return words

    def squares(self, fetched, norms_ref, group):
        """Leaves each token's sum of squares over this warp's slice in shared memory."""
        per_thread = self.plan.slice_columns // 8 * self.halves

        @plgpu.inline_mgpu(
            arg_types=(carriers.carrier(per_thread), plgpu.RefType(), plgpu.Layout.WG_SPLAT)
        )
        def run(_, fetched, norms, group):
            warp, lane = ptx.warp_and_lane()
            warp = ptx.add(warp, ptx.mul(ptx.scalar(group), 4))
            words = carriers.values(fetched)
            count = len(words) // self.halves
            for half in range(self.halves):
                total = arithmetic.sum_of_squares(words[half * count : (half + 1) * count])
                row = ptx.add(ptx.mul(warp, 16), ptx.add(ptx.shr(lane, 2), 8 * half))
                # The four lanes of a token have the same sum.
                llvm.store(total, ptx.address(norms, row, 4), alignment=4)

        run(fetched, norms_ref, group)

    def normed(self, fetched, norms_ref, norm_ref, piece, group):
        """Fetched rows over their root mean square, rounded, times the norm's weight."""
        per_thread = self.plan.slice_columns // 8 * self.halves

        @plgpu.inline_mgpu(
            arg_types=(
                carriers.carrier(per_thread),
                plgpu.RefType(),
                plgpu.RefType(),
                plgpu.Layout.WG_SPLAT,
                plgpu.Layout.WG_SPLAT,
            ),
            return_type=carriers.carried(per_thread, jnp.int32),
        )
        def run(_, fetched, norms, norm, piece, group):
            columns, _, lane = self._columns(piece, group)

            def load(at):
                return ptx.load_values(ptx.address(norm, at, 2), 0, 4, ptx.i32())

            weights = self._row(columns, lane, load)
            words, out = carriers.values(fetched), []
            for half in range(self.halves):
                total = ptx.float32(0.0)
                base = ptx.address(norms, ptx.add(ptx.shr(lane, 2), 8 * half), 4)
                for warp in range(self.plan.warps):
                    total = arith.addf(total, ptx.load_at(base, 64 * warp, ptx.f32(), 4))
                scale = arithmetic.norm_scale(total, self.plan.columns, self.epsilon)
                own = words[half * len(weights) : (half + 1) * len(weights)]
                pairs = zip(own, weights, strict=True)
                out += [arithmetic.norm_pair(word, scale, weight) for word, weight in pairs]
            return carriers.carry_values(out, signed=True)

        return run(fetched, norms_ref, norm_ref, piece, group)

    def operands(self, fetched):
        """Fetched words as the products take them: pairs of words, one pair for 16 columns."""
        per_thread = self.plan.slice_columns // 8 * self.halves

        @plgpu.inline_mgpu(
            arg_types=(carriers.carrier(per_thread),),
            return_type=carriers.carried(per_thread, jnp.int32),
        )
        def run(_, fetched):
            words = arithmetic.operands(carriers.values(fetched), self.fp8)
            return carriers.carry_values(words, signed=True)

        return run(fetched)

    def scales(self, scale_ref, first_row, step, piece, group):
        """Starts to load the scales of a step: of this lane's row of each tile."""
        plan = self.plan
        units, tiles = scale_ref.shape

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 4),
            return_type=carriers.carried(plan.tiles * plan.segments, jnp.float32),
        )
        def run(_, scale, first_row, step, piece, group):
            columns, _, lane = self._columns(piece, group)
            row = ptx.add(ptx.scalar(first_row), ptx.mul(ptx.scalar(step), plan.step_rows))
            row = ptx.add(row, ptx.shr(lane, 2))
            found = []
            for tile in range(plan.tiles):
                unit = arith.divui(ptx.add(row, TILE * tile), ptx.int32(self.unit))
                # Rows of a last step that are not there.
                unit = arith.minui(unit, ptx.int32(units - 1))
                for column in columns:
                    # A part of fewer columns than a tile's lies within one.
                    base = ptx.address(scale, ptx.add(ptx.mul(unit, tiles), ptx.shr(column, 7)), 4)
                    found += memory.load_floats(base, plan.segments // plan.parts, tiles)
            return carriers.carry_values(found)

        return run(scale_ref, first_row, step, piece, group)

    def multiply(self, sums, x, scales, part, stage_ref, group):
        """Returns sums plus a stage's weights times x, 8 rows by 8 or 16 tokens a tile and warp."""
        plan = self.plan
        words = plan.slice_columns // 8 * self.halves
        types = [carriers.carrier(words), plgpu.RefType(), plgpu.Layout.WG_SPLAT]
        arguments = [x, stage_ref, group]
        if self.fp8:
            count = plan.tiles * plan.segments
            types, arguments = [*types, carriers.carrier(count)], [*arguments, scales]
        if sums is not None:
            count = 2 * self.halves * plan.tiles
            types, arguments = [*types, carriers.carrier(count)], [*arguments, sums]

        @plgpu.inline_mgpu(
            arg_types=tuple(types),
            return_type=carriers.carried(2 * self.halves * plan.tiles, jnp.float32),
        )
        def run(_, x, stage, group, *rest):
            rest = [carriers.values(fragment) for fragment in rest]
            scales = rest.pop(0) if self.fp8 else None
            old = rest.pop(0) if rest else None
            x, group = carriers.values(x), ptx.scalar(group)
            return carriers.carry_values(self._multiply(x, stage, group, scales, old, part))

        return run(*arguments)

    def _multiply(self, x, stage, group, scales, old, part):
        plan, kept = self.plan, 2 * self.halves
        warp, lane = ptx.warp_and_lane()
        warp = ptx.add(warp, ptx.mul(group, 4))
        pitch = plan.warps * plan.part_columns * plan.itemsize
        at = ptx.mul(warp, plan.part_columns * plan.itemsize)
        at = ptx.add(at, ptx.mul(ptx.and_(lane, 3), 16))
        base = ptx.offset(ptx.address(stage, 0, 1), ptx.add(at, ptx.mul(ptx.shr(lane, 2), pitch)))
        in_part, together = plan.segments // plan.parts, 2 - plan.tiles % 2
        totals = [old[kept * t : kept * (t + 1)] if old else None for t in range(plan.tiles)]
        for first_tile in range(0, plan.tiles, together):
            tiles = range(first_tile, first_tile + together)
            for segment in range(in_part):
                starts = [TILE * t * pitch + segment * plan.segment * plan.itemsize for t in tiles]
                first = part * plan.part_columns + segment * plan.segment
                fresh = self._segment(base, starts, x, first // 16)
                for tile, found in zip(tiles, fresh, strict=True):
                    nth = tile * plan.segments + part * in_part + segment
                    scale = arithmetic.rest(scales[nth]) if scales else None
                    totals[tile] = arithmetic.accumulate(totals[tile], found, scale)
        return [value for total in totals for value in total]

    def _segment(self, base, starts, x, k):
        """Sums of row g of one or two tiles over a segment, from the k-th 16 columns of the slice.

        By token: 2 c and 2 c + 1, and with 16 tokens 2 c + 8 and 2 c + 9.
        """
        sums = [[[ptx.float32(0.0)] * 4 for _ in range(2)] for _ in range(self.halves)]
        for block in range(self.plan.segment // self.block):
            words = [ptx.load_values(base, start + 64 * block, 4, ptx.i32()) for start in starts]
            quads = [arithmetic.quads(four) if self.fp8 else [four] for four in words]
            for some in zip(*quads, strict=True):
                for way in (0, 1):
                    for half in range(self.halves):
                        at = half * len(x) // self.halves + 2 * k
                        operands = _rows(some, way), x[at : at + 2], sums[half][way]
                        sums[half][way] = arithmetic.product(*operands)
                    k += 1
        # Of one tile, words 1 and 3 are in the place of the other's.
        places = ((0, 0), (2, 2)) if len(starts) == 2 else ((0, 2),)
        return [
            [arith.addf(one[a + i], other[b + i]) for one, other in sums for i in (0, 1)]
            for a, b in places
        ]

    def put(self, sums, ref):
        """Leaves a warpgroup's sums of a step in shared memory: tile, thread, values."""
        kept = 2 * self.halves

        @plgpu.inline_mgpu(arg_types=(carriers.carrier(kept * self.plan.tiles), plgpu.RefType()))
        def run(_, sums, ref):
            warp, lane = ptx.warp_and_lane()
            thread = ptx.add(ptx.mul(warp, 32), lane)
            values = carriers.values(sums)
            base = ptx.offset(ptx.address(ref, 0, 4), ptx.mul(thread, 4 * kept))
            for tile in range(self.plan.tiles):
                vector = ptx.join(values[kept * tile : kept * (tile + 1)])
                pointer = ptx.offset(base, 4 * kept * ptx.THREADS * tile)
                llvm.store(vector, pointer, alignment=4 * kept)

        run(sums, ref)

    @property
    def _finished(self) -> int:
        """Values of a step that a lane of the finisher writes."""
        return 2 * self.halves * -(-self.plan.tiles // 4)

    def residual(self, residual_ref, first_row, step):
        """Starts to load what is to be added to a step's rows, as `finish` takes it."""

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), *_SPLATS[:2]),
            return_type=carriers.carried(self._finished, jnp.float32),
        )
        def run(_, residual, first_row, step):
            first_row, step, found = ptx.scalar(first_row), ptx.scalar(step), []
            for start in range(0, self.plan.tiles, 4):
                for at, live in self._places(start, first_row, step, ptx.int32(0)):
                    at = ptx.address(residual, arith.select(live, at, ptx.int32(0)), 2)
                    found.append(memory.load_half(at))
            return carriers.carry_values(found)

        return run(residual_ref, first_row, step)

    def finish(self, sums_ref, out_ref, first_row, step, piece, residual=None):
        """Adds a step's slices in order, and the residual, and writes its rows, a tile a warp."""
        plan = self.plan
        more = [] if residual is None else [residual]
        types = [
            plgpu.RefType(),
            plgpu.RefType(),
            *_SPLATS[:3],
            *[carriers.carrier(self._finished)] * len(more),
        ]

        @plgpu.inline_mgpu(arg_types=tuple(types))
        def run(_, sums, out, first_row, step, piece, *more):
            warp, lane = ptx.warp_and_lane()
            base = ptx.address(sums, 0, 4)
            added = iter(carriers.values(more[0])) if more else None
            where = ptx.scalar(first_row), ptx.scalar(step), ptx.scalar(piece)
            for start in range(0, plan.tiles, 4):
                tile = arith.minui(ptx.add(warp, start), ptx.int32(plan.tiles - 1))
                total = self._add_slices(base, tile, lane)
                places = self._places(start, *where)
                for value, (at, live) in zip(total, places, strict=True):
                    value = arith.addf(value, next(added)) if more else value
                    memory.write(out, at, value, live)

        run(sums_ref, out_ref, first_row, step, piece, *more)

    def _places(self, start, first_row, step, piece):
        """Where a lane of the finisher writes its sums of tile `start` + warp, and whether."""
        plan = self.plan
        warp, lane = ptx.warp_and_lane()
        tile = ptx.add(warp, start)
        row = ptx.add(ptx.mul(step, plan.step_rows), ptx.mul(tile, TILE))
        row = ptx.add(row, ptx.shr(lane, 2))
        live = ptx.below(row, plan.block_rows)
        live = arith.andi(live, ptx.below(tile, plan.tiles))
        row, found = ptx.add(row, first_row), []
        for nth in range(2 * self.halves):
            token = ptx.add(ptx.mul(ptx.and_(lane, 3), 2), nth % 2 + 8 * (nth // 2))
            there = ptx.below(token, self.t)
            at = ptx.add(ptx.mul(ptx.add(ptx.mul(piece, self.t), token), plan.rows), row)
            found.append((at, arith.andi(live, there)))
        return found

    def _add_slices(self, base, tile, lane):
        """A lane's sums of a tile over all warps, in their order."""
        plan, kept = self.plan, 2 * self.halves
        base = ptx.offset(base, ptx.mul(tile, 4 * kept * ptx.THREADS))
        base = ptx.offset(base, ptx.mul(lane, 4 * kept))
        total = None
        for warp in range(plan.warps):
            group, own = divmod(warp, 4)
            at = 4 * (plan.sums_floats // (plan.warps // 4)) * group + 4 * kept * 32 * own
            values = ptx.load_values(base, at, kept, ptx.f32())
            total = values if total is None else arithmetic.accumulate(total, values, None)
        return total


def _rows(quads, way):
    """Words of a product: of one tile all four, of two tiles words `way` and `way` + 2 of both."""
    if len(quads) == 1:
        return quads[0]
    low, high = quads
    return low[way], high[way], low[way + 2], high[way + 2]
