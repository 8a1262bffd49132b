"""What each lane of a warp does with a matrix, in PTX: fetch x, decode and multiply, add up, write.

A class of hooks. `interpreted.py` holds the same in plain jnp, for machines without a GPU. Arrays
between the hooks are `carriers`: flat, thread by thread.

A product is `mma.sync.m16n8k16`: 16 rows by 8 tokens over 16 columns. Which columns those are, and
in which order, is the lanes' own affair, as long as weights and x agree: lane (g, c) = (lane / 4,
lane mod 4) takes 16 bytes of row g of the weights with one load, from the c-th of four such pieces,
and of token g what belongs to the same columns. So weights are used as a checkpoint stores them.

The four words of a product's weights are, for a lane, rows g and g + 8 of two pairs of columns
each. Here all four are of row g: words 0 and 2 as row g, words 1 and 3 as "row g + 8". One product
with x for words 0 and 2 gives sums of which the first half is wanted, one with x for words 1 and 3
gives sums of which the second half is; the other halves are never looked at. That is twice the
products that there must be, which cost nothing where memory is the limit, and no instruction to
bring words in order. A tile is then 8 rows, so that whole rows, contiguous, make a small stage.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.ahead import prefetch
from pallas_kernels.expert_ffn.lanes import (
    _add,
    _and,
    _asm,
    _at,
    _c,
    _constant,
    _f32,
    _i32,
    _join,
    _load_at,
    _mul,
    _offset,
    _scalar,
    _shr,
    _split,
    _vector,
    _warp_and_lane,
)
from pallas_kernels.linear.plan import TILE, Plan

_THREADS = 128
_SPLATS = (plgpu.Layout.WG_SPLAT,) * 4
# Decoded FP8 codes are bfloat16 times 2^-120 (their exponent field holds 4 bits, of another bias);
# x is raised by 2^64 (exact) so that no product is subnormal, scales by the rest.
_RAISED = 0x5F805F80  # the pair (2^64, 2^64) in bfloat16
_REST = 2.0**56

# A word of four codes, bytes 0 to 3: `odd` gets the pair (1, 3), `even` the pair (0, 2), each with
# its sign in bit 15 and its other bits from bit 10 down, subnormal codes as subnormal bfloat16.
_DECODE = """
shr.u32 t, w, 4;
and.b32 t, t, 0x07F007F0;
lop3.b32 odd, t, w, 0x80008000, 0xF8;
shl.b32 u, w, 8;
shl.b32 t, w, 4;
and.b32 t, t, 0x07F007F0;
lop3.b32 even, t, u, 0x80008000, 0xF8;
"""
_DECODE_ASM = (
    "{\n.reg .b32 t, u, w, odd, even;\nmov.b32 w, $2;"
    + _DECODE
    + "mov.b32 $0, odd;\nmov.b32 $1, even;\n}"
)
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
_LOAD_ROW = (
    "{\n.reg .pred p;\nmov.b32 $0, 0;\nmov.b32 $1, 0;\nmov.b32 $2, 0;\nmov.b32 $3, 0;\n"
    "setp.ne.s32 p, $5, 0;\n@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];\n}"
)
_NORM_PAIR = (
    "{\n.reg .b32 p, lo, hi;\n.reg .f32 a, b;\nshl.b32 lo, $1, 16;\nand.b32 hi, $1, 0xFFFF0000;\n"
    "mov.b32 a, lo;\nmov.b32 b, hi;\nmul.rn.f32 a, a, $2;\nmul.rn.f32 b, b, $2;\n"
    "cvt.rn.bf16x2.f32 p, b, a;\nmul.bf16x2 $0, p, $3;\n}"
)
# Barriers for warps and for the copy engine: Pallas' own count threads, and 32 arrivals of a warp
# at one address are carried out one after another.
_INIT = (
    "{{\n.reg .pred p;\nsetp.ne.u32 p, $1, 0;\n@p bra DONE;\n{}"
    "fence.mbarrier_init.release.cluster;\nDONE:\nbar.sync 0;\n}}"
)
_ARRIVE = (
    "{\n.reg .pred p;\n.reg .b32 zero, at, lane;\nmov.u32 zero, %ctaid.z;\n"
    "and.b32 zero, zero, $1;\nadd.u32 at, $0, zero;\nmov.u32 lane, %laneid;\n"
    "setp.eq.u32 p, lane, 0;\nbar.warp.sync 0xffffffff;\n"
    "@p mbarrier.arrive.release.cta.shared::cta.b64 _, [at];\n}"
)
_WAIT = (
    "{\n.reg .pred p;\nWAIT:\n"
    "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1, 10000000;\n@!p bra WAIT;\n}"
)
# Thread 0 says how many bytes will come, then the first threads of its warp each copy some.
_COPY = (
    "{\n.reg .pred p;\nsetp.eq.s32 p, $0, 0;\n"
    "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;\nbar.warp.sync 0xffffffff;\n"
    "setp.lt.u32 p, $0, $3;\n"
    "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$4], [$5], $6, [$1];\n}"
)
# Not a plain load, so that it is issued before the wait for sums that comes next.
_LOAD_HALF = (
    "{ .reg .b16 h; .reg .b32 w; .reg .f32 a; ld.relaxed.gpu.global.b16 h, [$1]; "
    "cvt.u32.u16 w, h; shl.b32 w, w, 16; mov.b32 a, w; mov.f32 $0, a; }"
)
_SQUARES = (
    "{\n.reg .b32 lo, hi;\n.reg .f32 a, b, s;\nshl.b32 lo, $1, 16;\nand.b32 hi, $1, 0xFFFF0000;\n"
    "mov.b32 a, lo;\nmov.b32 b, hi;\nfma.rn.f32 s, a, a, $2;\nfma.rn.f32 $0, b, b, s;\n}"
)


def carrier(per_thread: int) -> Any:
    """Layout of a flat array that holds `per_thread` 32-bit values of each of 128 threads."""
    return plgpu.Layout.WG_STRIDED((_THREADS * per_thread,), vec_size=_width(per_thread))


def _width(per_thread: int) -> int:
    return next(n for n in (4, 2, 1) if per_thread % n == 0)


def _type(per_thread: int, dtype):
    return plgpu.ShapeDtypeStruct((_THREADS * per_thread,), dtype, layout=carrier(per_thread))


def _carry(values, signed=None):
    """A fragment of the scalars of this thread."""
    layout = carrier(len(values)).to_mgpu()
    width = _width(len(values))
    array = np.empty(layout.registers_shape((_THREADS * len(values),)), dtype=object)
    array[:] = [_join(values[i : i + width]) for i in range(0, len(values), width)]
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=signed)


def _values(fragment):
    return [value for register in fragment.registers.flat for value in _split(register)]


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
        warp, lane = _warp_and_lane()
        warp = _add(warp, _mul(_scalar(group), 4))
        width, parts = self.plan.part_columns, self.plan.parts
        start = _mul(_scalar(piece), parts * self.plan.warps * width)
        start = _add(start, _mul(warp, width))
        return [_add(start, part * self.plan.warps * width) for part in range(parts)], warp, lane

    @staticmethod
    def barrier_types(barriers) -> dict:
        """Shared memory of barriers: `barriers` has name, number, and warpgroups that arrive."""
        return dict(told=plgpu.SMEM((2 * sum(number for _, number, _ in barriers),), jnp.uint32))

    @staticmethod
    def make_barriers(refs, barriers) -> dict:
        """Makes them, called by all threads; returns each name's place.

        Where no warpgroup arrives, a copy does.
        """
        places, counts = {}, []
        for name, number, groups in barriers:
            places[name] = refs["told"], len(counts)
            counts += [4 * groups or 1] * number

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def run(_, ref):
            lines = [
                f"mbarrier.init.shared::cta.b64 [$0+{8 * i}], {count};\n"
                for i, count in enumerate(counts)
            ]
            operands = [_at(ref, _c(0), 8), utils.thread_idx()]
            _asm(None, operands, _INIT.format("".join(lines)), "r,r", effects=True)

        run(refs["told"])
        return places

    def arrive(self, place, index):
        """Arrives for this warpgroup: a lane for each warp, after what its lanes did before."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def run(_, ref, index):
            _asm(None, [_at(ref, _scalar(index), 8), _c(0)], _ARRIVE, "r,r", effects=True)

        run(place[0], place[1] + index)

    def give_back(self, place, index, sums):
        """The same when the sums are known.

        They depend on every word of the stage that was multiplied, and the arrival's address on
        them, by bits that are always zero (the grid is one-dimensional, which the compiler does not
        know). An arrival alone waits for no load under way, and the copy engine would write over
        what is still to be read.
        """
        kept = 2 * self.halves

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, carrier(kept * self.plan.tiles))
        )
        def run(_, ref, index, sums):
            known = _c(0)
            for value in _values(sums):
                known = arith.ori(known, arith.bitcast(_i32(), value))
            _asm(None, [_at(ref, _scalar(index), 8), known], _ARRIVE, "r,r", effects=True)

        run(place[0], place[1] + index, sums)

    def wait(self, place, index, nth):
        """Waits until the barrier has been completed nth + 1 times, and has not been once more."""

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
        )
        def run(_, ref, index, nth):
            operands = [_at(ref, _scalar(index), 8), _and(_scalar(nth), 1)]
            _asm(None, operands, _WAIT, "r,r", effects=True)

        run(place[0], place[1] + index, nth)

    def copy(self, weight_ref, row, rows, piece, part, stage_ref, place, index):
        """Starts to copy rows of a part: all in one piece if they are contiguous, else each."""
        plan = self.plan
        line = plan.warps * plan.part_columns * plan.itemsize
        pieces, size = (1, rows * line) if plan.contiguous else (rows, line)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), *_SPLATS[:3])
        )
        def run(_, weight, stage, told, row, piece, index):
            thread = arith.remui(utils.thread_idx(), _c(_THREADS))
            mine = arith.minui(thread, _c(pieces - 1))
            source = _mul(_add(_scalar(row), mine), plan.split * plan.parts)
            source = _add(_add(source, _mul(_scalar(piece), plan.parts)), part)
            target = _offset(_at(stage, _c(0), 1), _mul(mine, line))
            operands = [
                *(thread, _at(told, _scalar(index), 8), _c(rows * line), _c(pieces)),
                *(target, _at(weight, source, line), _c(size)),
            ]
            _asm(None, operands, _COPY, "r,r,r,r,r,l,r", effects=True)

        run(weight_ref, stage_ref, place[0], row, piece, place[1] + index)

    def copy_norm(self, norm_ref, target_ref, place):
        """Starts to copy the norm's weight."""
        size = 2 * self.plan.columns

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType()))
        def run(_, norm, target, told):
            thread = arith.remui(utils.thread_idx(), _c(_THREADS))
            operands = [
                *(thread, _at(told, _c(place[1]), 8), _c(size), _c(1)),
                *(_at(target, _c(0), 1), _at(norm, _c(0), 1), _c(size)),
            ]
            _asm(None, operands, _COPY, "r,r,r,r,r,l,r", effects=True)

        run(norm_ref, target_ref, place[0])

    def prefetch(self, ahead_ref, num_bytes, block):
        """Starts to bring some of an array to the L2 cache, a part of each block's share."""
        prefetch(ahead_ref, num_bytes, block, self.plan.groups * self.plan.split)

    def fetch(self, x_ref, piece, group):
        """Starts to load this warp's slice of all tokens; those that are not there are zeros."""
        per_thread = self.plan.slice_columns // 8 * self.halves

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT),
            return_type=_type(per_thread, jnp.int32),
        )
        def run(_, x, piece, group):
            columns, _, lane = self._columns(piece, group)
            words = []
            for half in range(self.halves):
                token = _add(_shr(lane, 2), 8 * half)
                there = arith.cmpi(arith.CmpIPredicate.ult, token, _c(self.t))
                row = _mul(arith.select(there, token, _c(0)), self.plan.columns)
                flag = arith.extui(_i32(), there)

                def load(at, row=row, flag=flag):
                    return _load_row(_at(x, _add(row, at), 2), flag)

                words += self._row(columns, lane, load)
            return _carry(words, signed=True)

        return run(x_ref, piece, group)

    def _row(self, columns, lane, load):
        """A lane's words of a row of x, or of the norm's weight: `load` takes a column."""
        own = _mul(_and(lane, 3), self.block // 4)
        words = []
        for column in columns:
            column = _add(column, own)
            for block in range(0, self.plan.part_columns, self.block):
                for at in range(0, self.block // 4, 8):
                    words += load(_add(column, block + at))
        return words

    def squares(self, fetched, norms_ref, group):
        """Leaves each token's sum of squares over this warp's slice in shared memory."""
        per_thread = self.plan.slice_columns // 8 * self.halves

        @plgpu.inline_mgpu(arg_types=(carrier(per_thread), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def run(_, fetched, norms, group):
            warp, lane = _warp_and_lane()
            warp = _add(warp, _mul(_scalar(group), 4))
            words = _values(fetched)
            count = len(words) // self.halves
            for half in range(self.halves):
                total = _constant(0.0)
                for word in words[half * count : (half + 1) * count]:
                    total = _asm(_f32(), [word, total], _SQUARES, "=f,r,f")
                for step in (1, 2):
                    text = f"shfl.sync.bfly.b32 $0, $1, {step}, 31, -1;"
                    total = arith.addf(total, _asm(_f32(), [total], text, "=f,f", effects=True))
                at = _at(norms, _add(_mul(warp, 16), _add(_shr(lane, 2), 8 * half)), 4)
                # The four lanes of a token have the same sum.
                llvm.store(total, at, alignment=4)

        run(fetched, norms_ref, group)

    def normed(self, fetched, norms_ref, norm_ref, piece, group):
        """Fetched rows over their root mean square, rounded, times the norm's weight."""
        per_thread = self.plan.slice_columns // 8 * self.halves

        @plgpu.inline_mgpu(
            arg_types=(
                carrier(per_thread),
                plgpu.RefType(),
                plgpu.RefType(),
                plgpu.Layout.WG_SPLAT,
                plgpu.Layout.WG_SPLAT,
            ),
            return_type=_type(per_thread, jnp.int32),
        )
        def run(_, fetched, norms, norm, piece, group):
            columns, _, lane = self._columns(piece, group)

            def load(at):
                return _split(_load_at(_at(norm, at, 2), 0, _vector(4, _i32()), 16))

            weights = self._row(columns, lane, load)
            words, out = _values(fetched), []
            for half in range(self.halves):
                total = _constant(0.0)
                base = _at(norms, _add(_shr(lane, 2), 8 * half), 4)
                for warp in range(self.plan.warps):
                    total = arith.addf(total, _load_at(base, 64 * warp, _f32(), 4))
                mean = arith.mulf(total, _constant(1.0 / self.plan.columns))
                mean = arith.addf(mean, _constant(self.epsilon))
                scale = _asm(_f32(), [mean], "rsqrt.approx.f32 $0, $1;", "=f,f")
                own = words[half * len(weights) : (half + 1) * len(weights)]
                out += [
                    _asm(_i32(), [word, scale, weight], _NORM_PAIR, "=r,r,f,r")
                    for word, weight in zip(own, weights, strict=True)
                ]
            return _carry(out, signed=True)

        return run(fetched, norms_ref, norm_ref, piece, group)

    def operands(self, fetched):
        """Fetched words as the products take them: pairs of words, one pair for 16 columns."""
        per_thread = self.plan.slice_columns // 8 * self.halves

        @plgpu.inline_mgpu(
            arg_types=(carrier(per_thread),), return_type=_type(per_thread, jnp.int32)
        )
        def run(_, fetched):
            words, out = _values(fetched), []
            if not self.fp8:
                for start in range(0, len(words), 4):
                    out += [words[start + i] for i in (0, 2, 1, 3)]
                return _carry(out, signed=True)
            for low, high in zip(words[::2], words[1::2], strict=True):
                for selector in ("0x7632", "0x5410"):
                    text = f"prmt.b32 $0, $1, $2, {selector};"
                    pair = _asm(_i32(), [low, high], text, "=r,r,r")
                    out.append(
                        _asm(_i32(), [pair, _c(_RAISED)], "mul.bf16x2 $0, $1, $2;", "=r,r,r")
                    )
            return _carry(out, signed=True)

        return run(fetched)

    def scales(self, scale_ref, first_row, step, piece, group):
        """Starts to load the scales of a step: of this lane's row of each tile."""
        plan = self.plan
        units, tiles = scale_ref.shape

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 4),
            return_type=_type(plan.tiles * plan.segments, jnp.float32),
        )
        def run(_, scale, first_row, step, piece, group):
            columns, _, lane = self._columns(piece, group)
            row = _add(_scalar(first_row), _mul(_scalar(step), plan.step_rows))
            row = _add(row, _shr(lane, 2))
            found = []
            for tile in range(plan.tiles):
                unit = arith.divui(_add(row, TILE * tile), _c(self.unit))
                # Rows of a last step that are not there.
                unit = arith.minui(unit, _c(units - 1))
                for column in columns:
                    # A part of fewer columns than a tile's lies within one.
                    base = _at(scale, _add(_mul(unit, tiles), _shr(column, 7)), 4)
                    found += _load_floats(base, plan.segments // plan.parts, tiles)
            return _carry(found)

        return run(scale_ref, first_row, step, piece, group)

    def multiply(self, sums, x, scales, part, stage_ref, group):
        """Returns sums plus a stage's weights times x, 8 rows by 8 or 16 tokens a tile and warp."""
        plan = self.plan
        words = plan.slice_columns // 8 * self.halves
        types = [carrier(words), plgpu.RefType(), plgpu.Layout.WG_SPLAT]
        arguments = [x, stage_ref, group]
        if self.fp8:
            types, arguments = [*types, carrier(plan.tiles * plan.segments)], [*arguments, scales]
        if sums is not None:
            count = 2 * self.halves * plan.tiles
            types, arguments = [*types, carrier(count)], [*arguments, sums]

        @plgpu.inline_mgpu(
            arg_types=tuple(types),
            return_type=_type(2 * self.halves * plan.tiles, jnp.float32),
        )
        def run(_, x, stage, group, *rest):
            rest = [_values(fragment) for fragment in rest]
            scales = rest.pop(0) if self.fp8 else None
            old = rest.pop(0) if rest else None
            return _carry(self._multiply(_values(x), stage, _scalar(group), scales, old, part))

        return run(*arguments)

    def _multiply(self, x, stage, group, scales, old, part):
        plan, kept = self.plan, 2 * self.halves
        warp, lane = _warp_and_lane()
        warp = _add(warp, _mul(group, 4))
        pitch = plan.warps * plan.part_columns * plan.itemsize
        at = _add(_mul(warp, plan.part_columns * plan.itemsize), _mul(_and(lane, 3), 16))
        base = _offset(_at(stage, _c(0), 1), _add(at, _mul(_shr(lane, 2), pitch)))
        in_part = plan.segments // plan.parts
        out = []
        for tile in range(plan.tiles):
            total = old[kept * tile : kept * (tile + 1)] if old else None
            for segment in range(in_part):
                start = TILE * tile * pitch + segment * plan.segment * plan.itemsize
                first = part * plan.part_columns + segment * plan.segment
                fresh = self._segment(base, start, x, first // 16)
                nth = tile * plan.segments + part * in_part + segment
                scale = arith.mulf(scales[nth], _constant(_REST)) if scales else None
                total = _accumulate(total, fresh, scale)
            out += total
        return out

    def _segment(self, base, start, x, k):
        """Sums of a tile's row g over a segment, from the k-th 16 columns of the slice, by token.

        Tokens 2 c and 2 c + 1, and with 16 tokens 2 c + 8 and 2 c + 9.
        """
        sums = [[[_constant(0.0)] * 4 for _ in range(2)] for _ in range(self.halves)]
        for block in range(self.plan.segment // self.block):
            words = _split(_load_at(base, start + 64 * block, _vector(4, _i32()), 16))
            for quad in _quads(words) if self.fp8 else [words]:
                for way in (0, 1):
                    for half in range(self.halves):
                        at = half * len(x) // self.halves + 2 * k
                        sums[half][way] = _product(quad, x[at : at + 2], sums[half][way])
                    k += 1
        return [arith.addf(first[i], second[2 + i]) for first, second in sums for i in (0, 1)]

    def put(self, sums, ref):
        """Leaves a warpgroup's sums of a step in shared memory: tile, thread, values."""
        kept = 2 * self.halves

        @plgpu.inline_mgpu(arg_types=(carrier(kept * self.plan.tiles), plgpu.RefType()))
        def run(_, sums, ref):
            warp, lane = _warp_and_lane()
            thread = _add(_mul(warp, 32), lane)
            values = _values(sums)
            base = _offset(_at(ref, _c(0), 4), _mul(thread, 4 * kept))
            for tile in range(self.plan.tiles):
                vector = _join(values[kept * tile : kept * (tile + 1)])
                pointer = _offset(base, _c(4 * kept * _THREADS * tile))
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
            return_type=_type(self._finished, jnp.float32),
        )
        def run(_, residual, first_row, step):
            found = []
            for start in range(0, self.plan.tiles, 4):
                for at, live in self._places(start, _scalar(first_row), _scalar(step), _c(0)):
                    at = _at(residual, arith.select(live, at, _c(0)), 2)
                    found.append(_asm(_f32(), [at], _LOAD_HALF, "=f,l", effects=True))
            return _carry(found)

        return run(residual_ref, first_row, step)

    def finish(self, sums_ref, out_ref, first_row, step, piece, residual=None):
        """Adds a step's slices in order, and the residual, and writes its rows, a tile a warp."""
        plan = self.plan
        more = [] if residual is None else [residual]
        types = [
            plgpu.RefType(),
            plgpu.RefType(),
            *_SPLATS[:3],
            *[carrier(self._finished)] * len(more),
        ]

        @plgpu.inline_mgpu(arg_types=tuple(types))
        def run(_, sums, out, first_row, step, piece, *more):
            warp, lane = _warp_and_lane()
            base = _at(sums, _c(0), 4)
            added = iter(_values(more[0])) if more else None
            for start in range(0, plan.tiles, 4):
                tile = arith.minui(_add(warp, start), _c(plan.tiles - 1))
                total = self._add_slices(base, tile, lane)
                places = self._places(start, _scalar(first_row), _scalar(step), _scalar(piece))
                for value, (at, live) in zip(total, places, strict=True):
                    value = arith.addf(value, next(added)) if more else value
                    _write(out, at, value, live)

        run(sums_ref, out_ref, first_row, step, piece, *more)

    def _places(self, start, first_row, step, piece):
        """Where a lane of the finisher writes its sums of tile `start` + warp, and whether."""
        plan = self.plan
        warp, lane = _warp_and_lane()
        tile = _add(warp, start)
        row = _add(_mul(step, plan.step_rows), _mul(tile, TILE))
        row = _add(row, _shr(lane, 2))
        live = arith.cmpi(arith.CmpIPredicate.ult, row, _c(plan.block_rows))
        live = arith.andi(live, arith.cmpi(arith.CmpIPredicate.ult, tile, _c(plan.tiles)))
        row, found = _add(row, first_row), []
        for nth in range(2 * self.halves):
            token = _add(_mul(_and(lane, 3), 2), nth % 2 + 8 * (nth // 2))
            there = arith.cmpi(arith.CmpIPredicate.ult, token, _c(self.t))
            at = _add(_mul(_add(_mul(piece, self.t), token), plan.rows), row)
            found.append((at, arith.andi(live, there)))
        return found

    def _add_slices(self, base, tile, lane):
        """A lane's sums of a tile over all warps, in their order."""
        plan, kept = self.plan, 2 * self.halves
        base = _offset(base, _mul(tile, 4 * kept * _THREADS))
        base = _offset(base, _mul(lane, 4 * kept))
        total = None
        for warp in range(plan.warps):
            group, own = divmod(warp, 4)
            at = 4 * (plan.sums_floats // (plan.warps // 4)) * group + 4 * kept * 32 * own
            values = _split(_load_at(base, at, _vector(kept, _f32()), 4 * kept))
            total = values if total is None else _accumulate(total, values, None)
        return total


def _accumulate(total, values, scale):
    """total + values * scale, in one rounding each."""
    if scale is None:
        if total is None:
            return list(values)
        return [arith.addf(a, b) for a, b in zip(total, values, strict=True)]
    if total is None:
        return [arith.mulf(value, scale) for value in values]
    return [
        _asm(_f32(), [value, scale, old], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")
        for old, value in zip(total, values, strict=True)
    ]


def _quads(words):
    """Sixteen codes of row g as the weights of two products: of words 0 and 1, of words 2 and 3."""
    struct = llvm.StructType.get_literal([_i32()] * 2)
    pairs = []
    for word in words:
        result = llvm.inline_asm(struct, [word], _DECODE_ASM, "=&r,=r,r", has_side_effects=False)
        pairs.append([llvm.extractvalue(_i32(), result, [i]) for i in range(2)])
    return [(a[0], b[0], a[1], b[1]) for a, b in (pairs[:2], pairs[2:])]


def _product(a, b, c):
    assert len(a) == 4 and len(b) == 2
    struct = llvm.StructType.get_literal([_f32()] * 4)
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    result = llvm.inline_asm(struct, [*a, *b, *c], _MMA, constraints, has_side_effects=False)
    return [llvm.extractvalue(_f32(), result, [i]) for i in range(4)]


def _load_row(pointer, there):
    """16 bytes of a row that is there, else zeros; not moved before what comes before."""
    struct = llvm.StructType.get_literal([_i32()] * 4)
    result = llvm.inline_asm(
        struct, [pointer, there], _LOAD_ROW, "=&r,=&r,=&r,=&r,l,r", has_side_effects=True
    )
    return [llvm.extractvalue(_i32(), result, [i]) for i in range(4)]


def _load_floats(base, count, pitch):
    """`count` neighbours in a row of `pitch` floats, in one load where its place allows.

    Not a plain one, so that it is issued before the wait for weights that comes next.
    """
    if count not in (2, 4) or pitch % count:
        return [
            _asm(
                _f32(), [base], f"ld.relaxed.gpu.global.f32 $0, [$1+{4 * i}];", "=f,l", effects=True
            )
            for i in range(count)
        ]
    struct = llvm.StructType.get_literal([_f32()] * count)
    names = ", ".join(f"${i}" for i in range(count))
    text = f"ld.relaxed.gpu.global.v{count}.f32 {{{names}}}, [${count}];"
    constraints = "=f," * count + "l"
    result = llvm.inline_asm(struct, [base], text, constraints, has_side_effects=True)
    return [llvm.extractvalue(_f32(), result, [i]) for i in range(count)]


def _write(out, index, value, condition):
    """Stores a sum in the result's type."""
    flag = arith.extui(_i32(), condition)
    wide = isinstance(ir.MemRefType(out.type).element_type, ir.F32Type)
    at = _at(out, arith.select(condition, index, _c(0)), 4 if wide else 2)
    if wide:
        store = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.global.f32 [$1], $2; }"
    else:
        store = (
            "{ .reg .pred p; .reg .b16 h; cvt.rn.bf16.f32 h, $2; "
            "setp.ne.s32 p, $0, 0; @p st.global.b16 [$1], h; }"
        )
    _asm(None, [flag, at, value], store, "r,l,f", effects=True)
