"""What each lane of a warp does with one matrix, in PTX: fetch x, multiply, finish a unit.

A class of hooks. `interpreted.py` holds the same in plain jnp, for machines without a GPU. Arrays
between the hooks are `carriers`: flat, thread by thread, each thread's registers in vectors of
four.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.expert_ffn.layout import Plan

_LANES = 128
# Decoded codes are bfloat16 times 2^-126 (their exponent field holds 2 bits); x is raised by 2^64
# (exact) so that no product is subnormal, and the sums by the rest at the end. Hidden values are
# written raised.
_RAISED = 0x5F805F80  # the pair (2^64, 2^64) in bfloat16
_RAISE = 2.0**64
_REST = 2.0**62
_FOLDED_REST = 2.0**-2
# Bits that no sum has: arithmetic makes one NaN only, 0x7FFFFFFF.
_NEVER = 0x7FEDCBA9
RELEASES = ("loaded", "used", "fence", "none")
"""Ways to give a stage back to the copy engine, see `Lanes.multiply`."""

_DECODE = """
and.b32 a0, {w}, 0x81C081C0;
shl.b32 t, {w}, 3;
and.b32 a1, t, 0x81C081C0;
shl.b32 t, {w}, 6;
and.b32 a2, t, 0x01C001C0;
shl.b32 u, {w}, 1;
lop3.b32 a2, a2, u, 0x80008000, 0xF8;
shr.u32 t, {w}, 3;
and.b32 a3, t, 0x01C001C0;
shl.b32 u, {w}, 2;
lop3.b32 a3, a3, u, 0x80008000, 0xF8;
"""
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{{{d}}}, {{a0,a1,a2,a3}}, {{{b}}}, {{{c}}};\n"
)
# Scales on the sums. Operands: 0-3 new sums, 4-7 old sums (tied), 8-9 words, 10-13 x, 14-15 scales
# of rows g and g + 8.
_BLOCK = (
    "{\n.reg .b32 a0,a1,a2,a3,t,u;\n.reg .f32 d0,d1,d2,d3,z;\nmov.f32 z, 0f00000000;\n"
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
    "{\n.reg .b32 a0,a1,a2,a3,t,u;\n"
    + _DECODE.format(w="$8")
    + _SCALED
    + _MMA.format(d="$0,$1,$2,$3", b="$10,$11", c="$4,$5,$6,$7")
    + _DECODE.format(w="$9")
    + _SCALED
    + _MMA.format(d="$0,$1,$2,$3", b="$12,$13", c="$0,$1,$2,$3")
    + "}"
)

# The grid is one-dimensional, so that %ctaid.z is zero, which the compiler does not know.
_ARRIVE = """{
.reg .pred p;
.reg .b32 zero, at, lane;
mov.u32 zero, %ctaid.z;
and.b32 zero, zero, $1;
add.u32 at, $0, zero;
mov.u32 lane, %laneid;
setp.eq.u32 p, lane, 0;
bar.warp.sync 0xffffffff;
@p mbarrier.arrive.release.cta.shared::cta.b64 _, [at];
}"""
_INIT = """{
.reg .pred p;
setp.lt.u32 p, $2, $3;
@p mbarrier.init.shared::cta.b64 [$0], $1;
bar.sync 0;
}"""
_WAIT = """{
.reg .pred p;
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1, 10000000;
@!p bra WAIT;
}"""
_TRAP_IF_NEVER = (
    "{\n.reg .pred p;\n.reg .b32 a, b;\nmov.b32 a, $0;\nmov.b32 b, $1;\n"
    "setp.eq.b32 p, a, $2;\nsetp.eq.or.b32 p, b, $2, p;\n@p trap;\n}"
)
_LOAD_ROW = (
    "{\n.reg .pred p;\nmov.b32 $0, 0;\nmov.b32 $1, 0;\nmov.b32 $2, 0;\nmov.b32 $3, 0;\n"
    "setp.ge.s32 p, $5, 0;\n@p ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4];\n}"
)


def carrier(per_thread: int) -> Any:
    """Layout of a flat array that holds `per_thread` 32-bit values of each of 128 threads."""
    return plgpu.Layout.WG_STRIDED((_LANES * per_thread,), vec_size=4)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The hooks for one matrix, whose rows are gate and up (`swiglu`) or a down projection."""

    plan: Plan
    swiglu: bool
    fold: bool = False
    release: str = "loaded"
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
            return_type=plgpu.ShapeDtypeStruct(
                (_LANES * per_thread,), jnp.int32, layout=carrier(per_thread)
            ),
        )
        def run(_, x, *rest):
            *listed, slot, group = rest
            warp, lane = _warp_and_lane()
            warp = _add(warp, _mul(_scalar(group), 4))
            row = _shr(lane, 2)
            if listed:
                row = _load(listed[0], _add(_mul(_scalar(slot), 8), row), _i32())
            elif rows < 8:
                exists = arith.cmpi(arith.CmpIPredicate.ult, row, _c(rows))
                row = arith.select(exists, row, _c(-1))
            piece = arith.remui(warp, _c(self.plan.column_warps))
            start = _add(_mul(piece, self.plan.slice_columns), _mul(_and(lane, 3), 8))
            at = _add(_mul(arith.maxsi(row, _c(0)), self.plan.columns), start)
            base = _at(x, at, 2)
            registers = [
                _load_row(_offset(base, _c(64 * block)), row)
                for block in range(self.plan.slice_columns // 32)
            ]
            return _carry(registers, per_thread, signed=True)

        return run(*refs, slot, group)

    def held(self, rows_ref, group):
        """This warp's columns of hidden rows in shared memory, as MMA operands."""
        per_thread = self.plan.slice_columns // 8
        kind = plgpu.ShapeDtypeStruct((_LANES * per_thread,), jnp.int32, layout=carrier(per_thread))

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=kind)
        def run(_, rows, group):
            warp, lane = _warp_and_lane()
            warp = _add(warp, _mul(_scalar(group), 4))
            piece = arith.remui(warp, _c(self.plan.column_warps))
            blocks = self.plan.slice_columns // 32
            base = _at(rows, _c(0), 2)
            base = _offset(base, _add(_mul(piece, 512 * blocks), _mul(lane, 16)))
            loads = [_load_at(base, 512 * i, _vector(4, _i32()), 16) for i in range(blocks)]
            return _carry(loads, per_thread, signed=True)

        return run(rows_ref, group)

    def operands(self, fetched):
        """What was fetched, as MMA operands: raised, which hidden values are already."""
        if not self.swiglu:
            return fetched
        per_thread = self.plan.slice_columns // 8
        kind = plgpu.ShapeDtypeStruct((_LANES * per_thread,), jnp.int32, layout=carrier(per_thread))

        @plgpu.inline_mgpu(arg_types=(carrier(per_thread),), return_type=kind)
        def run(_, fetched):
            raised = [
                _join(
                    [
                        _asm(_i32(), [word, _c(_RAISED)], "mul.bf16x2 $0, $1, $2;", "=r,r,r")
                        for word in _split(words)
                    ]
                )
                for words in fetched.registers.flat
            ]
            return _carry(raised, per_thread, signed=True)

        return run(fetched)

    def multiply(self, sums, x, part, stage_ref, group, give_back):
        """Decodes a stage's codes and multiplies: sums + weights x, 16 rows by 8 tokens a warp.

        The stage goes back (`give_back`, a row of barriers and an index) as `release` says:

        "loaded": when all its words are in registers, on which the arrival's address depends.
        "used": when the sums are known, which depend on every word. "fence": likewise, after a
        fence between ordinary reads of shared memory and the copy engine's writes. An arrival
        alone waits for no load under way: with "none" a stage was seen to be written over while it
        was read (H200, November 2026).
        """
        plan, first = self.plan, sums is None
        per_thread = plan.slice_columns // 8
        blocks = plan.part_columns // 32
        out = plgpu.ShapeDtypeStruct((_LANES * 4,), jnp.float32, layout=carrier(4))

        early = self.release == "loaded"
        (place, first_place), stage_index = give_back

        def run(_, x, stage, group, told, index, *sums):
            warp, lane = _warp_and_lane()
            warp = _add(warp, _mul(_scalar(group), 4))
            base = _at(stage, _c(0), 4)
            codes = _offset(base, _add(_mul(warp, blocks * 256), _mul(lane, 16)))
            scale_at = _add(_mul(warp, 16 * blocks), _mul(_shr(lane, 2), 2 * blocks))
            scales = _offset(base, _add(scale_at, 4 * plan.code_words))
            scales = _load_words(scales, blocks // 2)
            total = [_constant(0.0)] * 4 if first else _split(sums[0].registers.flat[0])
            registers = [w for vec in x.registers.flat for w in _split(vec)]
            registers = registers[part * blocks * 4 :]
            loads = [
                _split(_load_at(codes, 512 * pair, _vector(4, _i32()), 16))
                for pair in range(blocks // 2)
            ]
            if early:
                _arrive(told, index, [words[0] for words in loads] + scales[:: _in_a_load(scales)])
            for pair, words in enumerate(loads):
                for block in (2 * pair, 2 * pair + 1):
                    scale = _pair_scale if self.fold else _scale
                    factors = [scale(scales, block + half * blocks) for half in (0, 1)]
                    two = words[2 * (block % 2) : 2 * (block % 2) + 2]
                    x_block = registers[4 * block : 4 * block + 4]
                    total = _multiply_block(total, two, x_block, factors, self.fold)
            if not early:
                self._free(total)
                _arrive(told, index, [])
            return _carry([_join(total)], 4)

        types = [carrier(per_thread), plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.RefType()]
        types = [*types, plgpu.Layout.WG_SPLAT]
        arguments = [x, stage_ref, group, place, first_place + stage_index]
        if not first:
            types, arguments = [*types, carrier(4)], [*arguments, sums]
        return plgpu.inline_mgpu(arg_types=tuple(types), return_type=out)(run)(*arguments)

    def _free(self, total):
        """Waits for this thread's reads of a stage."""
        if self.release == "fence":
            _asm(None, [], "fence.proxy.async.shared::cta;", "", effects=True)
        elif self.release == "used":
            # Of rows g and g + 8: each has scales of its own.
            _asm(None, [*total[::2], _c(_NEVER)], _TRAP_IF_NEVER, "f,f,r", effects=True)

    @staticmethod
    def told_types(groups) -> dict:
        """Shared memory of barriers for warps; `groups` has name, number, arriving warpgroups."""
        return dict(told=plgpu.SMEM((2 * sum(number for _, number, _ in groups),), jnp.uint32))

    @staticmethod
    def make_told(refs, groups) -> dict:
        """Initialises the barriers, called by all threads; returns each name's place."""
        places, counts = {}, []
        for name, number, arrivals in groups:
            places[name] = refs["told"], len(counts)
            counts += [4 * arrivals] * number

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def run(_, ref):
            # A thread for each barrier.
            thread, mine = utils.thread_idx(), _c(counts[0])
            for i, (before, count) in enumerate(itertools.pairwise(counts), 1):
                if count != before:
                    here = arith.cmpi(arith.CmpIPredicate.uge, thread, _c(i))
                    mine = arith.select(here, _c(count), mine)
            operands = [_at(ref, thread, 8), mine, thread, _c(len(counts))]
            _asm(None, operands, _INIT, "r,r,r,r", effects=True)

        run(refs["told"])
        return places

    def arrive(self, place, index):
        """Arrives for this warpgroup: a lane for each warp, after all of them."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def run(_, ref, index):
            _arrive(ref, index, [])

        run(place[0], place[1] + index)

    def arrive_after(self, place, index, held):
        """The same, after the loads of what is held."""

        @plgpu.inline_mgpu(
            arg_types=(
                plgpu.RefType(),
                plgpu.Layout.WG_SPLAT,
                carrier(self.plan.slice_columns // 8),
            )
        )
        def run(_, ref, index, held):
            _arrive(ref, index, [_split(words)[0] for words in held.registers.flat])

        run(place[0], place[1] + index, held)

    def wait(self, place, index, nth):
        """Waits until the barrier has been completed nth + 1 times, and has not been once more."""

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
        )
        def run(_, ref, index, nth):
            _asm(
                None, [_at(ref, _scalar(index), 8), _and(_scalar(nth), 1)], _WAIT, "r,r",
                effects=True,
            )  # fmt: skip

        run(place[0], place[1] + index, nth)

    def put(self, sums, ref):
        """Leaves a warpgroup's sums in shared memory, 16 bytes a thread."""

        @plgpu.inline_mgpu(arg_types=(carrier(4), plgpu.RefType()))
        def run(_, sums, ref):
            thread = arith.remui(utils.thread_idx(), _c(_LANES))
            llvm.store(
                sums.registers.flat[0], _offset(_at(ref, _c(0), 4), _mul(thread, 16)), alignment=16
            )

        run(sums, ref)

    def finish(self, sums_ref, row_ref, share_ref, out_ref, slot, unit):
        """Adds the slices in order and writes the unit's rows of tokens that chose the expert."""
        plan = self.plan

        @plgpu.inline_mgpu(
            arg_types=(*[plgpu.RefType()] * 4, plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
        )
        def run(_, sums, rows, share, out, slot, unit):
            warp, lane = _warp_and_lane()
            column = _add(_mul(_scalar(slot), 8), _mul(_and(lane, 3), 2))
            targets = [_load(rows, _add(column, i), _i32()) for i in (0, 1)]
            shares = [_load(share, _add(column, i), _f32()) for i in (0, 1)]
            base = _offset(_at(sums, _c(0), 4), _mul(lane, 16))
            for j in range(-(-plan.row_warps // 4)):
                tile = _add(warp, 4 * j)
                live = arith.cmpi(arith.CmpIPredicate.ult, tile, _c(plan.row_warps))
                tile_base = _offset(
                    base, _mul(arith.minui(tile, _c(plan.row_warps - 1)), 512 * plan.column_warps)
                )
                total = _split(_load_at(tile_base, 0, _vector(4, _f32()), 16))
                for piece in range(1, plan.column_warps):
                    more = _split(_load_at(tile_base, 512 * piece, _vector(4, _f32()), 16))
                    total = [arith.addf(a, b) for a, b in zip(total, more, strict=True)]
                total = [
                    arith.mulf(v, _constant(_FOLDED_REST if self.fold else _REST)) for v in total
                ]
                tile = _add(_mul(_scalar(unit), plan.row_warps), tile)
                for token in (0, 1):
                    target = arith.select(live, targets[token], _c(-1))
                    g, pair = _shr(lane, 2), total[token::2]
                    if not self.swiglu:
                        _write_down(plan, out, target, tile, g, pair)
                        continue
                    if self.blocked:
                        # Blocks of 32 columns, of 8 tokens each.
                        line = _add(_mul(_and(lane, 3), 2), token)
                        at = _add(_mul(_scalar(slot), plan.rows * 4), _mul(_shr(tile, 2), 256))
                        at = _add(_add(at, _mul(line, 32)), _mul(_and(tile, 3), 8))
                    else:
                        at = _add(_mul(target, plan.rows // 2), _mul(tile, 8))
                    _write_hidden(out, target, _add(at, g), pair, shares[token])

        run(sums_ref, row_ref, share_ref, out_ref, slot, unit)


def _arrive(barriers, index, known):
    """One lane arrives for its warp, once the words in `known` are there in all lanes.

    32 arrivals of a warp at one address would be carried out one after another. That the address
    depends on the words, by bits that are always zero, makes the arrival wait for their loads.
    """
    address = _at(barriers, _scalar(index), 8)
    zero = _c(0)
    for word in known:
        zero = arith.ori(zero, word)
    _asm(None, [address, zero], _ARRIVE, "r,r", effects=True)


def _load_row(pointer, row):
    """16 bytes of a row that exists, else zeros; not moved before what comes before."""
    struct = llvm.StructType.get_literal([_i32()] * 4)
    result = llvm.inline_asm(
        struct, [pointer, row], _LOAD_ROW, "=&r,=&r,=&r,=&r,l,r", has_side_effects=True
    )
    return _join([llvm.extractvalue(_i32(), result, [i]) for i in range(4)])


def _write_down(plan, out, target, tile, g, pair):
    """Stores a token's values of rows g and g + 8 of a tile, unless its target row is -1."""
    for half, value in enumerate(pair):
        row = _add(_add(_mul(tile, 16), g), 8 * half)
        at = _at(out, _add(_mul(target, plan.rows), row), 4)
        store = "{ .reg .pred p; setp.ge.s32 p, $0, 0; @p st.global.f32 [$1], $2; }"
        _asm(None, [target, at, value], store, "r,l,f", effects=True)


def _write_hidden(out, target, at, pair, share):
    """Stores a token's SwiGLU of gate and up, times its share, raised; unless its row is -1."""
    gate, up = pair
    power = arith.mulf(gate, _constant(-1.4426950408889634))
    power = _asm(_f32(), [power], "ex2.approx.f32 $0, $1;", "=f,f")
    inverse = _asm(_f32(), [arith.addf(power, _constant(1.0))], "rcp.approx.f32 $0, $1;", "=f,f")
    share = arith.mulf(share, _constant(_RAISE))
    value = arith.mulf(arith.mulf(arith.mulf(gate, inverse), up), share)
    store = (
        "{ .reg .pred p; .reg .b16 h; cvt.rn.bf16.f32 h, $2; "
        "setp.ge.s32 p, $0, 0; @p st.global.b16 [$1], h; }"
    )
    _asm(None, [target, _at(out, at, 2), value], store, "r,l,f", effects=True)


def _multiply_block(total, words, x, factors, fold):
    """One scale block (32 columns): two products into fresh sums, these times the scales."""
    struct = llvm.StructType.get_literal([_f32()] * 4)
    block, kind = (_FOLDED_BLOCK, "r") if fold else (_BLOCK, "f")
    constraints = f"=&f,=&f,=&f,=&f,f,f,f,f,r,r,r,r,r,r,{kind},{kind}"
    result = llvm.inline_asm(
        struct, [*total, *words, *x, *factors], block, constraints, has_side_effects=False
    )
    return [llvm.extractvalue(_f32(), result, [i]) for i in range(4)]


def _scale(words, index):
    """Byte `index` b as the float32 2^(b - 127): b in the exponent field (0 gives 0)."""
    word, byte = words[index // 4], index % 4
    shifted = arith.shrui(word, _c(1)) if byte == 3 else arith.shli(word, _c(23 - 8 * byte))
    return arith.bitcast(_f32(), arith.andi(shifted, _c(0x7F800000)))


def _pair_scale(words, index):
    """Byte `index` b as a pair of bfloat16 2^(b - 63), for b up to 190."""
    byte = _and(_shr(words[index // 4], 8 * (index % 4)), 255)
    return _add(_mul(byte, 128 * 65537), 64 * 128 * 65537)


def _warp_and_lane():
    thread = arith.remui(utils.thread_idx(), _c(_LANES))
    return _shr(thread, 5), _and(thread, 31)


def zeros():
    """A warpgroup's sums before anything is added."""
    return _carry([_join([_constant(0.0)] * 4)], 4)


def _carry(registers, per_thread, signed=None):
    layout = carrier(per_thread).to_mgpu()
    array = np.empty(layout.registers_shape((_LANES * per_thread,)), dtype=object)
    array[:] = registers
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=signed)


def _at(ref, index, size):
    """Pointer to element `index` (32-bit) of a contiguous reference of elements of `size` bytes."""
    wide = arith.extsi(ir.IntegerType.get_signless(64), index)
    wide = arith.muli(wide, utils.c(size, wide.type))
    pointer = utils.memref_ptr(ref)
    return utils.getelementptr(pointer, [wide], ir.IntegerType.get_signless(8))


def _offset(pointer, num_bytes):
    return utils.getelementptr(pointer, [num_bytes], ir.IntegerType.get_signless(8))


def _load_at(pointer, num_bytes, kind, alignment):
    return llvm.load(kind, _offset(pointer, _c(num_bytes)), alignment=alignment)


def _load_words(pointer, count):
    """`count` 32-bit words, four at a time where that leaves 16-byte alignment to every lane."""
    if count % 4:
        return [_load_at(pointer, 4 * i, _i32(), 4) for i in range(count)]
    loads = [_load_at(pointer, 16 * i, _vector(4, _i32()), 16) for i in range(count // 4)]
    return [word for load in loads for word in _split(load)]


def _in_a_load(words):
    """How many of `_load_words` come in one load."""
    return 1 if len(words) % 4 else 4


def _load(ref, index, kind):
    return llvm.load(kind, _at(ref, index, 4), alignment=4)


def _asm(kind, operands, text, constraints, effects=False):
    return llvm.inline_asm(kind, operands, text, constraints, has_side_effects=effects)


def _i32():
    return ir.IntegerType.get_signless(32)


def _f32():
    return ir.F32Type.get()


def _vector(n, kind):
    return ir.VectorType.get((n,), kind)


def _c(value):
    return utils.c(value, _i32())


def _constant(value):
    return utils.c(value, _f32())


def _add(a, b):
    return arith.addi(a, _c(b) if isinstance(b, int) else b)


def _mul(a, b):
    return arith.muli(a, _c(b) if isinstance(b, int) else b)


def _shr(a, bits):
    return arith.shrui(a, _c(bits))


def _and(a, mask):
    return arith.andi(a, _c(mask))


def _split(vec):
    n = ir.VectorType(vec.type).shape[0]
    return [
        vector.extract(vec, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(n)
    ]


def _join(values):
    return vector.from_elements(_vector(len(values), values[0].type), list(values))


def _scalar(fragment):
    return fragment.registers.item()
