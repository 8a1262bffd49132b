"""What each lane of a warp does with one matrix, in PTX: fetch x, multiply, finish a unit.

A class of hooks. `interpreted.py` holds the same in plain jnp, for machines without a GPU. Arrays
between the hooks are `carriers`, each thread's registers in vectors of at most four.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels import barriers, carriers, ptx
from pallas_kernels.expert_ffn.layout import Plan

# Decoded codes are bfloat16 times 2^-126 (their exponent field holds 2 bits); x is raised by 2^64
# (exact) so that no product is subnormal, and the sums by the rest at the end. Hidden values are
# written raised.
_REST = 2.0**62
_FOLDED_REST = 2.0**-2
# The product of the last code's pieces with 2^14 + 2^8 + 2^3 has each of them in its place, and
# copies elsewhere: no two in one place, so that nothing is carried.
_DECODE = """
and.b32 a0, {w}, 0x81C081C0;
shf.l.wrap.b32 t, {w}, {w}, 10;
and.b32 a1, t, 0x81C081C0;
shf.l.wrap.b32 t, {w}, {w}, 13;
and.b32 a2, t, 0x81C081C0;
and.b32 t, {w}, 0x001B001B;
mul.lo.u32 t, t, 0x4108;
and.b32 a3, t, 0x81C081C0;
"""
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{{{d}}}, {{a0,a1,a2,a3}}, {{{b}}}, {{{c}}};\n"
)
# Scales on the sums. Operands: 0-3 new sums, 4-7 old sums (tied), 8-9 words, 10-13 x, 14-15 scales
# of rows g and g + 8.
_BLOCK = (
    "{\n.reg .b32 a0,a1,a2,a3,t;\n.reg .f32 d0,d1,d2,d3,z;\nmov.f32 z, 0f00000000;\n"
    + _DECODE.format(w="$8")
    + _MMA.format(d="d0,d1,d2,d3", b="$10,$11", c="z,z,z,z")
    + _DECODE.format(w="$9")
    + _MMA.format(d="d0,d1,d2,d3", b="$12,$13", c="d0,d1,d2,d3")
    + "".join(
        f"fma.rn.f32 $${i}, d{i}, ${14 + i // 2}, ${4 + i};\n".replace("$$", "$") for i in range(4)
    )
    + "}"
)

# Scales on the weights, two bfloat16 products more a word; same operands, but 14-15 are pairs of
# bfloat16.
_SCALED = "".join(f"mul.bf16x2 a{i}, a{i}, ${14 + i % 2};\n" for i in range(4))
_FOLDED_BLOCK = (
    "{\n.reg .b32 a0,a1,a2,a3,t;\n"
    + _DECODE.format(w="$8")
    + _SCALED
    + _MMA.format(d="$0,$1,$2,$3", b="$10,$11", c="$4,$5,$6,$7")
    + _DECODE.format(w="$9")
    + _SCALED
    + _MMA.format(d="$0,$1,$2,$3", b="$12,$13", c="$0,$1,$2,$3")
    + "}"
)

_INIT = """{
.reg .pred p;
setp.lt.u32 p, $2, $3;
@p mbarrier.init.shared::cta.b64 [$0], $1;
bar.sync 0;
}"""
# The grid is one-dimensional, so that %ctaid.z is zero, which the compiler does not know.
_ZERO = "{ .reg .b32 zero; mov.u32 zero, %ctaid.z; and.b32 $0, zero, $1; }"
_LOAD_ROW = (
    "{\n.reg .pred p;\nmov.b32 $0, 0;\nmov.b32 $1, 0;\nmov.b32 $2, 0;\nmov.b32 $3, 0;\n"
    "setp.ge.s32 p, $5, 0;\n@p ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4];\n}"
)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The hooks for one matrix, whose rows are gate and up (`swiglu`) or a down projection."""

    plan: Plan
    swiglu: bool
    fold: bool = False
    blocked: bool = False

    def fetch(self, x_ref, row_ref, slot, group):
        """Starts to load this warp's slice of 8 rows of x; a row of -1 is zeros.

        Without `row_ref` they are the first 8 rows of x. Past the L1 cache: other blocks write
        hidden values while this one runs, and no two of its warps share columns of x.
        """
        per_thread, rows = self.plan.slice_columns // 8, x_ref.shape[0]
        refs = [x_ref] if row_ref is None else [x_ref, row_ref]

        @plgpu.inline_mgpu(
            arg_types=(
                *[plgpu.RefType()] * len(refs),
                plgpu.Layout.WG_SPLAT,
                plgpu.Layout.WG_SPLAT,
            ),
            return_type=carriers.carried(per_thread, jnp.int32),
        )
        def run(_, x, *rest):
            *listed, slot, group = rest
            warp, lane = ptx.warp_and_lane()
            warp = ptx.add(warp, ptx.mul(ptx.scalar(group), 4))
            row = ptx.shr(lane, 2)
            if listed:
                row = ptx.load(listed[0], ptx.add(ptx.mul(ptx.scalar(slot), 8), row), ptx.i32())
            elif rows < 8:
                exists = ptx.below(row, rows)
                row = arith.select(exists, row, ptx.int32(-1))
            piece = arith.remui(warp, ptx.int32(self.plan.column_warps))
            start = ptx.add(ptx.mul(piece, self.plan.slice_columns), ptx.mul(ptx.and_(lane, 3), 8))
            at = ptx.add(ptx.mul(arith.maxsi(row, ptx.int32(0)), self.plan.columns), start)
            base = ptx.address(x, at, 2)
            registers = [
                _load_row(ptx.offset(base, 64 * block), row)
                for block in range(self.plan.slice_columns // 32)
            ]
            return carriers.carry(registers, per_thread, signed=True)

        return run(*refs, slot, group)

    def held(self, rows_ref, group):
        """This warp's columns of hidden rows in shared memory, as MMA operands."""
        per_thread = self.plan.slice_columns // 8
        kind = carriers.carried(per_thread, jnp.int32)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=kind)
        def run(_, rows, group):
            warp, lane = ptx.warp_and_lane()
            warp = ptx.add(warp, ptx.mul(ptx.scalar(group), 4))
            piece = arith.remui(warp, ptx.int32(self.plan.column_warps))
            blocks = self.plan.slice_columns // 32
            base = ptx.address(rows, 0, 2)
            base = ptx.offset(base, ptx.add(ptx.mul(piece, 512 * blocks), ptx.mul(lane, 16)))
            loads = [
                ptx.load_at(base, 512 * i, ptx.vector(4, ptx.i32()), 16) for i in range(blocks)
            ]
            return carriers.carry(loads, per_thread, signed=True)

        return run(rows_ref, group)

    def operands(self, fetched):
        """What was fetched, as MMA operands: raised, which hidden values are already."""
        if not self.swiglu:
            return fetched
        per_thread = self.plan.slice_columns // 8
        kind = carriers.carried(per_thread, jnp.int32)

        @plgpu.inline_mgpu(arg_types=(carriers.carrier(per_thread),), return_type=kind)
        def run(_, fetched):
            raised = [
                ptx.join([ptx.raised(word) for word in ptx.split(words)])
                for words in fetched.registers.flat
            ]
            return carriers.carry(raised, per_thread, signed=True)

        return run(fetched)

    @property
    def _blocks(self) -> int:
        """Scale blocks of a stage that a lane multiplies."""
        return self.plan.part_columns // 32

    @property
    def _held_words(self) -> int:
        """Words of a stage that a lane holds: codes, then scales."""
        return 2 * self._blocks + self._blocks // 2

    def load(self, stage_ref, group):
        """Starts to load this warp's codes and scales of a stage."""
        blocks, count = self._blocks, self._held_words

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
            return_type=carriers.carried(count, jnp.int32),
        )
        def run(_, stage, group):
            warp, lane = ptx.warp_and_lane()
            warp = ptx.add(warp, ptx.mul(ptx.scalar(group), 4))
            base = ptx.address(stage, 0, 4)
            codes = ptx.offset(base, ptx.add(ptx.mul(warp, blocks * 256), ptx.mul(lane, 16)))
            scale_at = ptx.add(ptx.mul(warp, 16 * blocks), ptx.mul(ptx.shr(lane, 2), 2 * blocks))
            scales = ptx.offset(base, ptx.add(scale_at, 4 * self.plan.code_words))
            factors, words = _load_words(scales, blocks // 2), []
            for pair in range(blocks // 2):
                words += ptx.load_values(codes, 512 * pair, 4, ptx.i32())
            return carriers.carry_values(words + factors, signed=True)

        return run(stage_ref, group)

    def give_back(self, loaded, place, index):
        """What was loaded from shared memory can be overwritten, once it is in registers.

        The arrival's address depends on its words. An arrival alone waits for no load under way: a
        stage was seen to be written over while it was read (H200, November 2026).
        """
        count = loaded.shape[0] // ptx.THREADS

        @plgpu.inline_mgpu(
            arg_types=(carriers.carrier(count), plgpu.RefType(), plgpu.Layout.WG_SPLAT)
        )
        def run(_, loaded, told, index):
            barriers.arrive_knowing(told, index, self._of_each_load(carriers.values(loaded)))

        run(loaded, place[0], place[1] + index)

    def _of_each_load(self, words):
        """A word of each load of a stage, or of hidden rows, which have no scales."""
        if len(words) != self._held_words:
            return words[::4]
        codes, scales = words[: 2 * self._blocks], words[2 * self._blocks :]
        return codes[::4] + scales[:: _in_a_load(scales)]

    def multiply(self, sums, x, part, loaded, ahead=None):
        """Decodes a stage's codes and multiplies: sums + weights x, 16 rows by 8 tokens a warp.

        After five eighths of its blocks what is loaded `ahead`, the next stage, must be there (a
        stage of two blocks, mimo-nano's, waits for nothing). The compiler, short of registers,
        would move these loads to the end, and earlier they cost spills: the kernel took 53.6 us
        instead of 52.5, or 53.1 to 55.1 (H200, November 2026).
        """
        per_thread = self.plan.slice_columns // 8
        more = {"sums": (4, sums), "ahead": (self._held_words, ahead)}
        more = {name: given for name, given in more.items() if given[1] is not None}

        def run(_, x, loaded, *rest):
            rest = dict(zip(more, map(carriers.values, rest), strict=True))
            x, words = carriers.values(x)[part * self._blocks * 4 :], carriers.values(loaded)
            total = rest.get("sums", [ptx.float32(0.0)] * 4)
            zero = _zero_knowing(self._of_each_load(rest["ahead"])) if "ahead" in rest else None
            scale, scales = _pair_scale if self.fold else _scale, words[2 * self._blocks :]
            for block in range(self._blocks):
                codes = words[2 * block : 2 * block + 2]
                if zero is not None and 8 * block >= 5 * self._blocks:
                    codes = [arith.ori(codes[0], zero), codes[1]]
                factors = [scale(scales, block + half * self._blocks) for half in (0, 1)]
                x_block = x[4 * block : 4 * block + 4]
                total = _multiply_block(total, codes, x_block, factors, self.fold)
            return carriers.carry([ptx.join(total)], 4)

        types = [carriers.carrier(n) for n in (per_thread, self._held_words)]
        types += [carriers.carrier(n) for n, _ in more.values()]
        out, arrays = carriers.carried(4, jnp.float32), [array for _, array in more.values()]
        return plgpu.inline_mgpu(arg_types=tuple(types), return_type=out)(run)(x, loaded, *arrays)

    told_types = staticmethod(barriers.types)
    arrive = staticmethod(barriers.arrive)
    wait = staticmethod(barriers.wait)

    @staticmethod
    def make_told(refs, groups) -> dict:
        """Initialises the barriers, called by all threads; returns each name's place."""
        places, counts = barriers.places(refs["told"], groups)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def run(_, ref):
            # A thread for each barrier.
            thread, mine = utils.thread_idx(), ptx.int32(counts[0])
            for i, (before, count) in enumerate(itertools.pairwise(counts), 1):
                if count != before:
                    here = arith.cmpi(arith.CmpIPredicate.uge, thread, ptx.int32(i))
                    mine = arith.select(here, ptx.int32(count), mine)
            operands = [ptx.address(ref, thread, 8), mine, thread, ptx.int32(len(counts))]
            ptx.asm(None, operands, _INIT, "r,r,r,r", effects=True)

        run(refs["told"])
        return places

    def put(self, sums, ref):
        """Leaves a warpgroup's sums in shared memory, 16 bytes a thread."""

        @plgpu.inline_mgpu(arg_types=(carriers.carrier(4), plgpu.RefType()))
        def run(_, sums, ref):
            thread = ptx.thread()
            pointer = ptx.offset(ptx.address(ref, 0, 4), ptx.mul(thread, 16))
            llvm.store(sums.registers.flat[0], pointer, alignment=16)

        run(sums, ref)

    def finish(self, sums_ref, row_ref, share_ref, out_ref, slot, unit):
        """Adds the slices in order and writes the unit's rows of tokens that chose the expert."""
        plan = self.plan

        @plgpu.inline_mgpu(
            arg_types=(*[plgpu.RefType()] * 4, plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
        )
        def run(_, sums, rows, share, out, slot, unit):
            warp, lane = ptx.warp_and_lane()
            column = ptx.add(ptx.mul(ptx.scalar(slot), 8), ptx.mul(ptx.and_(lane, 3), 2))
            targets = [ptx.load(rows, ptx.add(column, i), ptx.i32()) for i in (0, 1)]
            shares = [ptx.load(share, ptx.add(column, i), ptx.f32()) for i in (0, 1)]
            base = ptx.offset(ptx.address(sums, 0, 4), ptx.mul(lane, 16))
            for j in range(-(-plan.row_warps // 4)):
                tile = ptx.add(warp, 4 * j)
                live = ptx.below(tile, plan.row_warps)
                total = self._add_slices(base, tile)
                tile = ptx.add(ptx.mul(ptx.scalar(unit), plan.row_warps), tile)
                for token in (0, 1):
                    target = arith.select(live, targets[token], ptx.int32(-1))
                    g, pair = ptx.shr(lane, 2), total[token::2]
                    if not self.swiglu:
                        _write_down(plan, out, target, tile, g, pair)
                        continue
                    at = self._hidden(target, ptx.scalar(slot), tile, lane, token)
                    _write_hidden(out, target, ptx.add(at, g), pair, shares[token])

        run(sums_ref, row_ref, share_ref, out_ref, slot, unit)

    def _add_slices(self, base, tile):
        """A lane's sums of a tile over all slices, in their order; a tile beyond the last is it."""
        there = arith.minui(tile, ptx.int32(self.plan.row_warps - 1))
        base = ptx.offset(base, ptx.mul(there, 512 * self.plan.column_warps))
        total = ptx.load_values(base, 0, 4, ptx.f32())
        for piece in range(1, self.plan.column_warps):
            more = ptx.load_values(base, 512 * piece, 4, ptx.f32())
            total = [arith.addf(a, b) for a, b in zip(total, more, strict=True)]
        return [arith.mulf(v, ptx.float32(_FOLDED_REST if self.fold else _REST)) for v in total]

    def _hidden(self, target, slot, tile, lane, token):
        """Where a tile's first hidden value of a token is."""
        if not self.blocked:
            return ptx.add(ptx.mul(target, self.plan.rows // 2), ptx.mul(tile, 8))
        # Blocks of 32 columns, of 8 tokens each.
        line = ptx.add(ptx.mul(ptx.and_(lane, 3), 2), token)
        at = ptx.add(ptx.mul(slot, self.plan.rows * 4), ptx.mul(ptx.shr(tile, 2), 256))
        return ptx.add(ptx.add(at, ptx.mul(line, 32)), ptx.mul(ptx.and_(tile, 3), 8))


def _load_row(pointer, row):
    """16 bytes of a row that exists, else zeros; not moved before what comes before."""
    constraints = "=&r,=&r,=&r,=&r,l,r"
    words = ptx.results(4, ptx.i32(), [pointer, row], _LOAD_ROW, constraints, effects=True)
    return ptx.join(words)


def _write_down(plan, out, target, tile, g, pair):
    """Stores a token's values of rows g and g + 8 of a tile, unless its target row is -1."""
    for half, value in enumerate(pair):
        row = ptx.add(ptx.add(ptx.mul(tile, 16), g), 8 * half)
        at = ptx.address(out, ptx.add(ptx.mul(target, plan.rows), row), 4)
        store = "{ .reg .pred p; setp.ge.s32 p, $0, 0; @p st.global.f32 [$1], $2; }"
        ptx.asm(None, [target, at, value], store, "r,l,f", effects=True)


def _write_hidden(out, target, at, pair, share):
    """Stores a token's SwiGLU of gate and up, times its share, raised; unless its row is -1."""
    gate, up = pair
    power = arith.mulf(gate, ptx.float32(-1.4426950408889634))
    power = ptx.asm(ptx.f32(), [power], "ex2.approx.f32 $0, $1;", "=f,f")
    inverse = ptx.asm(
        ptx.f32(), [arith.addf(power, ptx.float32(1.0))], "rcp.approx.f32 $0, $1;", "=f,f"
    )
    share = arith.mulf(share, ptx.float32(ptx.RAISE))
    value = arith.mulf(arith.mulf(arith.mulf(gate, inverse), up), share)
    store = (
        "{ .reg .pred p; .reg .b16 h; cvt.rn.bf16.f32 h, $2; "
        "setp.ge.s32 p, $0, 0; @p st.global.b16 [$1], h; }"
    )
    ptx.asm(None, [target, ptx.address(out, at, 2), value], store, "r,l,f", effects=True)


def _multiply_block(total, words, x, factors, fold):
    """One scale block (32 columns): two products into fresh sums, these times the scales."""
    block, kind = (_FOLDED_BLOCK, "r") if fold else (_BLOCK, "f")
    constraints = f"=&f,=&f,=&f,=&f,f,f,f,f,r,r,r,r,r,r,{kind},{kind}"
    return ptx.results(4, ptx.f32(), [*total, *words, *x, *factors], block, constraints)


def _zero_knowing(words):
    """Zero, once the words are there."""
    return ptx.asm(ptx.i32(), [functools.reduce(arith.ori, words)], _ZERO, "=r,r")


def _scale(words, index):
    """Byte `index` b as the float32 2^(b - 127): b in the exponent field (0 gives 0)."""
    word, byte = words[index // 4], index % 4
    shifted = ptx.shr(word, 1) if byte == 3 else arith.shli(word, ptx.int32(23 - 8 * byte))
    return arith.bitcast(ptx.f32(), ptx.and_(shifted, 0x7F800000))


def _pair_scale(words, index):
    """Byte `index` b as a pair of bfloat16 2^(b - 63), for b up to 190."""
    byte = ptx.and_(ptx.shr(words[index // 4], 8 * (index % 4)), 255)
    return ptx.add(ptx.mul(byte, 128 * 65537), 64 * 128 * 65537)


def zeros():
    """A warpgroup's sums before anything is added."""
    return carriers.carry([ptx.join([ptx.float32(0.0)] * 4)], 4)


def _load_words(pointer, count):
    """`count` 32-bit words, four at a time where that leaves 16-byte alignment to every lane."""
    if count % 4:
        return [ptx.load_at(pointer, 4 * i, ptx.i32(), 4) for i in range(count)]
    loads = [ptx.load_values(pointer, 16 * i, 4, ptx.i32()) for i in range(count // 4)]
    return [word for words in loads for word in words]


def _in_a_load(words):
    """How many of `_load_words` come in one load."""
    return 1 if len(words) % 4 else 4
