"""What a warpgroup does for the whole grid, in PTX: list the work, meet the other blocks, add up.

`interpreted.py` holds the same hooks in plain jnp, for machines without a GPU.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels import ptx
from pallas_kernels.ahead import prefetch
from pallas_kernels.expert_ffn.layout import CLAIM, DONE
from pallas_kernels.expert_ffn.slots import TOKENS, most_slots

_SCALAR = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)
_AHEAD = 16
"""Slots beyond the one in question, that a look at the counts also asks about; and about all."""
_SLT = arith.CmpIPredicate.slt
_EQ = arith.CmpIPredicate.eq

# All blocks add up to 2^31 each time they meet: the last to come flips bit 31, which the others
# wait for, and the other bits are 0 again. So the word is fit for the next meeting, in this launch
# or another, and must be cleared only once, when it is made. The addition releases what this
# block's threads wrote (they have met before), the last load acquires what the others did.
_MEET = """{
.reg .pred p;
.reg .b32 old, now;
atom.add.release.gpu.global.u32 old, [$0], $1;
WAIT:
ld.acquire.gpu.global.u32 now, [$0];
xor.b32 now, now, old;
setp.ge.s32 p, now, 0;
@p bra WAIT;
}"""
_CLAIM = """{
.reg .pred p;
setp.eq.u32 p, $1, 0;
mov.b32 $0, 0;
@p atom.add.relaxed.gpu.global.u32 $0, [$2], 1;
}"""
_TELL = """{
.reg .pred p;
setp.eq.u32 p, $1, 0;
@p red.add.release.gpu.global.u32 [$0], 1;
}"""
_ACQUIRE = "ld.acquire.gpu.global.u32 $0, [$1];"
_BOTH_PROXIES = "fence.proxy.async;"
_ALL = """{
.reg .pred p, q;
setp.ne.u32 p, $1, 0;
barrier.cta.red.and.pred q, $2, 128, p;
selp.u32 $0, 1, 0, q;
}"""
_STORE_IF = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.shared.b32 [$1], $2; }"
_MARK_IF = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p red.shared.or.b32 [$1], $2; }"
# So many ones. A shift by 32 is 0 in PTX, so that they are then 32.
_MASK = "{ .reg .b32 m; shl.b32 m, 1, $1; sub.s32 $0, m, 1; }"
_STAMP = (
    "{ .reg .b32 ns, clocks; .reg .pred p; setp.eq.s32 p, $0, 0; mov.u32 ns, %globaltimer_lo; "
    "mov.u32 clocks, %clock; @p st.global.v2.b32 [$1], {ns, clocks}; }"
)
_HALVES = (
    "{ .reg .b32 w; shl.b32 w, $1, 16; mov.b32 $0, w; }",
    "{ .reg .b32 w; and.b32 w, $1, 0xFFFF0000; mov.b32 $0, w; }",
)
"""A word's two bfloat16 as float32."""
_PACK = "cvt.rn.bf16x2.f32 $0, $1, $2;"
EVENTS = 6
"""Moments that a warpgroup can note for a time line."""


def first_step(ctas: int) -> int:
    """What the first block adds when blocks meet, the others adding 1: 2^31 in all, as int32."""
    step = (1 << 31) - (ctas - 1)
    return step if step < 1 << 31 else -step


@dataclasses.dataclass(frozen=True)
class Grid:
    """The hooks of a launch: t tokens of c choices among `experts`, on `ctas` thread blocks."""

    t: int
    c: int
    experts: int
    ctas: int

    def meet(self, barrier_ref, block):
        """Returns when every block has come here; what they wrote before can then be read."""
        rest = first_step(self.ctas)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def run(_, barrier, block):
            utils.warpgroup_barrier()
            first = arith.cmpi(_EQ, ptx.scalar(block), ptx.int32(0))
            step = arith.select(first, ptx.int32(rest), ptx.int32(1))
            with utils.when(arith.cmpi(_EQ, ptx.thread(), ptx.int32(0))):
                ptx.asm(None, [ptx.address(barrier, 0, 4), step], _MEET, "l,r", effects=True)
            utils.warpgroup_barrier()

        run(barrier_ref, block)

    def claim(self, flags_ref, nth):
        """Asks for the next number of the queue; only `publish` may look at the answer."""
        del nth

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_SCALAR)
        def run(_, flags):
            operands = [ptx.thread(), ptx.address(flags, CLAIM, 4)]
            return _splat(ptx.asm(ptx.i32(), operands, _CLAIM, "=&r,r,l", effects=True))

        return run(flags_ref)

    def publish(self, ticket, claims_ref, place):
        """The number that was asked for, to all threads; and into shared memory, for the others."""

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WG_SPLAT, plgpu.RefType(), plgpu.Layout.WG_SPLAT),
            return_type=_SCALAR,
        )
        def run(_, ticket, claims, place):
            first = arith.cmpi(_EQ, ptx.thread(), ptx.int32(0))
            _store_if(first, claims, ptx.scalar(place), ptx.scalar(ticket))
            utils.warpgroup_barrier()
            return _splat(ptx.load(claims, ptx.scalar(place), ptx.i32()))

        return run(ticket, claims_ref, place)

    def slots_done(self, flags_ref, slot, known, need, count, wait):
        """Whether a slot's `need` units and all slots' before it are done.

        Args:
          flags_ref: counts of what is done.
          slot: in question.
          known: slots that are known to be done, from the last call.
          need: units of a slot.
          count: slots in use.
          wait: whether to look until they are; else one look must do.

        Returns:
          how many slots are known to be done, often more than were asked for.
        """

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 4), return_type=_SCALAR
        )
        def run(_, flags, known, *places):
            # A thread for each slot: whether it is done. Then: are all up to this one, and beyond?
            at = ptx.address(flags, ptx.add(ptx.thread(), DONE), 4)
            barrier = utils.warpgroup_barrier_idx(sync=False)
            loop = scf.WhileOp([ptx.i32()], [ptx.int32(0)])
            with ir.InsertionPoint(loop.before.blocks.append(ptx.i32())):
                count = ptx.asm(ptx.i32(), [at], _ACQUIRE, "=r,l", effects=True)
                done = arith.cmpi(_EQ, count, ptx.int32(need))
                found = ptx.scalar(known)
                for last in map(ptx.scalar, places):
                    enough = arith.ori(done, arith.cmpi(_SLT, last, ptx.thread()))
                    operands = [ptx.flag(enough), barrier]
                    every = ptx.asm(ptx.i32(), operands, _ALL, "=r,r,r", effects=True)
                    some = arith.cmpi(_EQ, every, ptx.int32(0))
                    found = arith.select(some, found, ptx.add(last, 1))
                again = arith.cmpi(_SLT, found, ptx.add(ptx.scalar(places[0]), 1))
                scf.condition(again if wait else _false(), [found])
            with ir.InsertionPoint(loop.after.blocks.append(ptx.i32())) as point:
                scf.yield_([point.block.arguments[0]])
            # The copy engine reads what ordinary stores wrote.
            ptx.asm(None, [], _BOTH_PROXIES, "", effects=True)
            return _splat(loop.results[0])

        places = slot, jnp.minimum(slot + _AHEAD, count - 1), count - 1
        return lax.cond(known > slot, lambda: known, lambda: run(flags_ref, known, *places))

    def tell_done(self, flags_ref, slot):
        """Counts one more unit of a slot as done: what this warpgroup wrote can be read."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def run(_, flags, slot):
            utils.warpgroup_barrier()
            at = ptx.address(flags, ptx.add(ptx.scalar(slot), DONE), 4)
            ptx.asm(None, [at, ptx.thread()], _TELL, "l,r", effects=True)

        run(flags_ref, slot)

    def clear(self, flags_ref):
        """Claims and counts are zero again, for the next launch."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def run(_, flags):
            for at in (ptx.int32(CLAIM), ptx.add(ptx.thread(), DONE)):
                llvm.store(ptx.int32(0), ptx.address(flags, at, 4), alignment=4)

        run(flags_ref)

    def stamp(self, stamps_ref, block, group, event):
        """Notes the time: nanoseconds of the device and clocks of the SM."""

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
        )
        def run(_, stamps, block, group):
            groups = ir.MemRefType(stamps.type).shape[1]
            row = ptx.add(ptx.mul(ptx.scalar(block), groups), ptx.scalar(group))
            at = ptx.address(stamps, ptx.add(ptx.mul(row, EVENTS), event), 8)
            ptx.asm(None, [ptx.thread(), at], _STAMP, "r,l", effects=True)

        run(stamps_ref, block, group)

    def make_list(self, ids_ref, routing_ref, lists):
        """This warpgroup makes the work list in shared memory: `slots.make_slots` for few tokens.

        A thread for each of at most 128 choices. It compares its expert with its token's others
        (its row of the results, doubles), with earlier tokens' (its place, beyond 8 tokens), marks
        it in a bit map, and counts the marks before it, which is its slot.
        """
        names = tuple(lists)

        @plgpu.inline_mgpu(arg_types=tuple([plgpu.RefType()] * (2 + len(names))))
        def run(_, ids, routing, *refs):
            self._make_list(ids, routing, dict(zip(names, refs, strict=True)))

        run(ids_ref, routing_ref, *lists.values())

    def _make_list(self, ids, routing, lists):
        c, thread = self.c, ptx.thread()
        self._clear(lists, thread)
        active = ptx.below(thread, self.t * c)
        pair = arith.minui(thread, ptx.int32(self.t * c - 1))
        token = arith.divui(pair, ptx.int32(c))
        mine = _load_row(ids, ptx.mul(token, c), c, ptx.i32())
        shares = _load_row(routing, ptx.mul(token, c), c, ptx.f32())
        nth = arith.subi(pair, ptx.mul(token, c))
        expert = ptx.load(ids, pair, ptx.i32())
        row, rank, live, share = self._among_own(expert, nth, mine, shares)
        row = arith.andi(row, active)
        place = self._place(ids, expert, token)
        utils.warpgroup_barrier()
        bit = arith.shli(ptx.int32(1), ptx.and_(expert, 31))
        word = arith.select(row, ptx.shr(expert, 5), ptx.int32(0))
        _mark_if(row, lists["bits"], word, bit)
        second = arith.andi(row, arith.cmpi(_EQ, place, ptx.int32(TOKENS)))
        if self.t > TOKENS:
            _mark_if(second, lists["bits"], ptx.add(word, self.words), bit)
        utils.warpgroup_barrier()
        below, total = self._count(lists["bits"], expert)
        slot = arith.select(row, ptx.add(below, ptx.shr(place, 3)), ptx.int32(0))
        lane = token if self.t <= TOKENS else ptx.and_(place, TOKENS - 1)
        cell = ptx.add(ptx.mul(slot, TOKENS), lane)
        _store_if(row, lists["expert"], slot, expert)
        _store_if(row, lists["choice"], cell, ptx.add(ptx.mul(token, c), rank))
        _store_if(row, lists["share"], cell, share)
        if "token" in lists:
            _store_if(row, lists["token"], cell, token)
        first = arith.andi(active, arith.cmpi(_EQ, nth, ptx.int32(0)))
        _store_if(first, lists["live"], token, live)
        _store_if(arith.cmpi(_EQ, thread, ptx.int32(0)), lists["count"], ptx.int32(0), total)
        utils.warpgroup_barrier()

    @property
    def words(self) -> int:
        """Of a bit map of all experts, a multiple of 4."""
        return -(-self.experts // 128) * 4

    def _clear(self, lists, thread):
        """Empty slots and an empty bit map."""
        cells = TOKENS * most_slots(self.t, self.c, self.experts)
        for name in ("choice", "token"):
            for start in range(0, cells if name in lists else 0, ptx.THREADS):
                index = ptx.add(thread, start)
                live = ptx.below(index, cells)
                _store_if(live, lists[name], arith.select(live, index, ptx.int32(0)), ptx.int32(-1))
        maps = self.words * (1 + (self.t > TOKENS))
        for start in range(0, maps, ptx.THREADS):
            index = ptx.add(thread, start)
            live = ptx.below(index, maps)
            _store_if(live, lists["bits"], arith.select(live, index, ptx.int32(0)), ptx.int32(0))

    def _among_own(self, expert, nth, mine, shares):
        """Whether this is its expert's first choice by the token, its rank, its share."""
        valid = [ptx.below(own, self.experts) for own in mine]
        repeated, rank, live, share = _false(), ptx.int32(0), ptx.int32(0), ptx.float32(0.0)
        for k, own in enumerate(mine):
            same = arith.cmpi(_EQ, own, expert)
            share = arith.addf(share, arith.select(same, shares[k], ptx.float32(0.0)))
            earlier = ptx.below(ptx.int32(k), nth)
            repeated = arith.ori(repeated, arith.andi(same, earlier))
            first = valid[k]
            for before in mine[:k]:
                differs = arith.cmpi(arith.CmpIPredicate.ne, before, own)
                first = arith.andi(first, differs)
            live = arith.addi(live, ptx.flag(first))
            smaller = arith.andi(first, arith.cmpi(_SLT, own, expert))
            rank = arith.addi(rank, ptx.flag(smaller))
        known = ptx.below(expert, self.experts)
        row = arith.andi(known, arith.xori(repeated, _true()))
        return row, rank, live, share

    def _place(self, ids, expert, token):
        """How many earlier tokens chose the expert; of no interest up to 8 tokens."""
        place = ptx.int32(0)
        for other in range(self.t - 1 if self.t > TOKENS else 0):
            chose = _false()
            for theirs in _load_row(ids, ptx.int32(other * self.c), self.c, ptx.i32()):
                chose = arith.ori(chose, arith.cmpi(_EQ, theirs, expert))
            chose = arith.andi(chose, ptx.below(ptx.int32(other), token))
            place = arith.addi(place, ptx.flag(chose))
        return place

    def _count(self, bits, expert):
        """Slots of experts before this one, and of all."""
        below, total = ptx.int32(0), ptx.int32(0)
        maps = 1 + (self.t > TOKENS)
        for start in range(0, maps * self.words, 4):
            loaded = ptx.load_values(ptx.address(bits, start, 4), 0, 4, ptx.i32())
            for k, word in enumerate(loaded):
                offset = arith.subi(expert, ptx.int32(32 * ((start + k) % self.words)))
                offset = arith.minsi(arith.maxsi(offset, ptx.int32(0)), ptx.int32(32))
                mask = ptx.asm(ptx.i32(), [offset], _MASK, "=r,r")
                below = arith.addi(below, _popcount(arith.andi(word, mask)))
                total = arith.addi(total, _popcount(word))
        return below, total

    def prefetch(self, ahead_ref, block):
        """Starts to bring an array to the L2 cache."""
        size = math.prod(ahead_ref.shape) * ahead_ref.dtype.itemsize
        prefetch(ahead_ref, size, block, self.ctas)

    def add(self, results_ref, live_ref, residual_ref, out_ref, block):
        """Sums each token's results by ascending expert, all blocks together.

        With a residual, that is added last, before the sum is rounded.
        """
        d, kind = out_ref.shape[1], out_ref.dtype
        added = [] if residual_ref is None else [residual_ref]

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType()] * (3 + len(added))))
        def run(_, block, results, live, out, *added):
            start = ptx.add(ptx.mul(ptx.scalar(block), ptx.THREADS), ptx.thread())
            pieces = self.t * (d // 4)
            for first in range(0, pieces, self.ctas * ptx.THREADS):
                index = ptx.add(start, first)
                with utils.when(ptx.below(index, pieces)):
                    token = arith.divui(index, ptx.int32(d // 4))
                    column = ptx.mul(arith.subi(index, ptx.mul(token, d // 4)), 4)
                    self._add_piece(results, live, added, out, token, column, d, kind)

        run(block, results_ref, live_ref, out_ref, *added)

    def _add_piece(self, results, live, added, out, token, column, d, kind):
        at = ptx.add(ptx.mul(token, d), column)
        pairs = ptx.load_values(ptx.address(added[0], at, 2), 0, 2, ptx.i32()) if added else []
        count = ptx.load(live, token, ptx.i32())
        base = ptx.address(results, ptx.add(ptx.mul(token, self.c * d), column), 4)
        total = [ptx.float32(0.0)] * 4
        for k in range(self.c):
            exists = ptx.below(ptx.int32(k), count)
            values = _load_past_l1(base, 4 * d * k, exists)
            total = [
                arith.select(exists, arith.addf(a, b), a)
                for a, b in zip(total, values, strict=True)
            ]
        for i, pair in enumerate(pairs):
            halves = [ptx.asm(ptx.f32(), [pair], half, "=f,r") for half in _HALVES]
            both = zip(halves, total[2 * i : 2 * i + 2], strict=True)
            total[2 * i : 2 * i + 2] = [arith.addf(a, b) for a, b in both]
        if kind == jnp.float32:
            llvm.store(ptx.join(total), ptx.address(out, at, 4), alignment=16)
            return
        words = [
            ptx.asm(ptx.i32(), [total[i + 1], total[i]], _PACK, "=r,f,f")
            for i in range(0, len(total), 2)
        ]
        llvm.store(ptx.join(words), ptx.address(out, at, 2), alignment=8)


def _load_past_l1(base, num_bytes, exists):
    text = (
        "{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; "
        "mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000; "
        f"@p ld.global.cg.v4.f32 {{$0, $1, $2, $3}}, [$4+{num_bytes}]; }}"
    )
    operands, constraints = [base, ptx.flag(exists)], "=&f,=&f,=&f,=&f,l,r"
    return ptx.results(4, ptx.f32(), operands, text, constraints, effects=True)


def _load_row(ref, start, count, kind):
    """`count` elements from `start`, four at a time if they can be."""
    if count % 4:
        return [ptx.load(ref, ptx.add(start, k), kind) for k in range(count)]
    base = ptx.address(ref, start, 4)
    loads = [ptx.load_values(base, 16 * k, 4, kind) for k in range(count // 4)]
    return [value for values in loads for value in values]


def _store_if(condition, ref, index, value):
    kind = "f" if isinstance(value.type, ir.F32Type) else "r"
    operands = [ptx.flag(condition), ptx.address(ref, index, 4), value]
    ptx.asm(None, operands, _STORE_IF, f"r,r,{kind}", effects=True)


def _mark_if(condition, ref, index, bits):
    operands = [ptx.flag(condition), ptx.address(ref, index, 4), bits]
    ptx.asm(None, operands, _MARK_IF, "r,r,r", effects=True)


def _popcount(word):
    return ptx.asm(ptx.i32(), [word], "popc.b32 $0, $1;", "=r,r")


def _splat(value):
    return mgpu.FragmentedArray.splat(value, (), is_signed=True)


def _true():
    return utils.c(1, ir.IntegerType.get_signless(1))


def _false():
    return utils.c(0, ir.IntegerType.get_signless(1))
