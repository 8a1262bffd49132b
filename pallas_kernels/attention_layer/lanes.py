"""What blocks do together, in PTX: exchange words, and attend. `interpreted.py` has it in jnp."""

import dataclasses

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import barriers, carriers, ptx
from pallas_kernels.attention.machine import Machine, Reg
from pallas_kernels.attention_layer.exchange import Exchange, Left
from pallas_kernels.expert_ffn.grid import first_step
from pallas_kernels.linear.lanes import Lanes

_SPLAT = plgpu.Layout.WG_SPLAT
# As in expert_ffn/grid.py all add up to 2^31, so that bit 31 changes when all have come: until then
# it is what this block sees.
_COME = """{
.reg .b32 old;
atom.add.relaxed.gpu.global.u32 old, [$0], $1;
shr.u32 old, old, 31;
st.shared.b32 [$2], old;
}"""
_CLEAR = (
    "{ .reg .pred p; .reg .b32 zero; mov.b32 zero, 0; setp.ne.s32 p, $0, 0; "
    "@p st.relaxed.gpu.global.v4.b32 [$1], {zero, zero, zero, zero}; }"
)
_COPY = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p cp.async.cg.shared.global [$1], [$2], 16; }"
_SWAP_ROWS = "shfl.sync.bfly.b32 $0, $1, 4, 31, -1;"
_PACK = "cvt.rn.bf16x2.f32 $0, $1, $2;"
# A lane for each token that there is looks at a word of its own, until all of the warp are there:
# then all words are asked for. So a wait of microseconds is no load on the L2 cache.
_PROBE = """{{
.reg .pred p, q;
.reg .b32 word;
setp.ne.s32 q, $1, 0;
mov.b32 word, 1;
WAIT:
@q ld.relaxed.gpu.global.b32 word, [$0+{}];
setp.ne.s32 p, word, 0;
vote.sync.all.pred p, p, -1;
@!p bra WAIT;
}}"""


def await_words(places, there=None):
    """Four words of each place, once all of them have been left; zeros where nothing is `there`.

    Args:
      places: pairs of a pointer and so many bytes beyond it.
      there: a flag, or None.
    """
    pointers = list(dict.fromkeys(pointer for pointer, _ in places))
    words = [[f"${4 * i + k}" for k in range(4)] for i in range(len(places))]
    every, first = [word for four in words for word in four], 4 * len(places)
    name = {pointer: f"${first + i}" for i, pointer in enumerate(pointers)}
    flag, only = f"${first + len(pointers)}", "" if there is None else "@q "
    lines = [".reg .pred p, q;", ".reg .b32 least;"]
    if there is not None:
        lines += [f"setp.ne.s32 q, {flag}, 0;", *(f"mov.b32 {word}, 0;" for word in every)]
    lines.append("WAIT:")
    for (pointer, offset), four in zip(places, words, strict=True):
        target = "{" + ", ".join(four) + "}"
        lines.append(f"{only}ld.relaxed.gpu.global.v4.b32 {target}, [{name[pointer]}+{offset}];")
    lines.append(f"min.u32 least, {every[0]}, {every[1]};")
    lines += [f"min.u32 least, least, {word};" for word in every[2:]]
    lines.append("setp.eq.u32 p, least, 0;" if there is None else "setp.eq.and.u32 p, least, 0, q;")
    lines.append("@p bra WAIT;")
    lines += [f"{only}not.b32 {word}, {word};" for word in every]
    lines.append("bar.warp.sync 0xffffffff;")
    constraints = ",".join(["=&r"] * len(every) + ["l"] * len(pointers) + ["r"] * bool(only))
    operands = [*pointers, *([] if there is None else [there])]
    text = "{\n" + "\n".join(lines) + "\n}"
    return ptx.results(len(every), ptx.i32(), operands, text, constraints, effects=True)


def _half(turn, half: int):
    """The first word of the half that the turn says."""
    return ptx.mul(ptx.load(turn, 0, ptx.i32()), half)


class ExchangingLanes(Lanes):
    """`Lanes` that leave their rows, or take x, in an `Exchange`."""

    def fetch(self, x_ref, piece, group):
        """This warp's slice of all tokens, as soon as it is there."""
        if not isinstance(x_ref, Left):
            return Lanes.fetch(self, x_ref, piece, group)
        per_thread = self.plan.slice_columns // 8

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(), _SPLAT, _SPLAT),
            return_type=carriers.carried(per_thread, jnp.int32),
        )
        def run(_, flags, turn, piece, group):
            columns, _, lane = self._columns(piece, group)
            token, own = ptx.shr(lane, 2), ptx.mul(ptx.and_(lane, 3), self.block // 4)
            there = ptx.below(token, self.t)
            row = ptx.mul(arith.select(there, token, ptx.int32(0)), x_ref.columns)
            # All columns of a slice are a known number of them from its first.
            apart = self.plan.warps * self.plan.part_columns
            at = ptx.shr(ptx.add(ptx.add(row, columns[0]), own), 1)
            at = ptx.add(ptx.add(at, x_ref.first), _half(turn, x_ref.half))
            base = ptx.address(flags, at, 4)
            offsets = [
                2 * (apart * part + start + eight)
                for part in range(self.plan.parts)
                for start in range(0, self.plan.part_columns, self.block)
                for eight in range(0, self.block // 4, 8)
            ]
            first = arith.cmpi(arith.CmpIPredicate.eq, ptx.and_(lane, 3), ptx.int32(0))
            probing = ptx.flag(arith.andi(there, first))
            ptx.asm(None, [base, probing], _PROBE.format(offsets[-1]), "l,r", effects=True)
            words = await_words([(base, offset) for offset in offsets], ptx.flag(there))
            return carriers.carry_values(words, signed=True)

        return run(x_ref.flags, x_ref.turn, piece, group)

    def finish(self, sums_ref, out_ref, first_row, step, piece, residual=None):
        """Adds a step's slices in order, and leaves its rows, a tile a warp."""
        if not isinstance(out_ref, Left):
            return Lanes.finish(self, sums_ref, out_ref, first_row, step, piece, residual)

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 3, _SPLAT, _SPLAT))
        def run(_, sums, flags, turn, first_row, step):
            warp, lane = ptx.warp_and_lane()
            base, begin = ptx.address(sums, 0, 4), _half(turn, out_ref.half)
            for start in range(0, self.plan.tiles, 4):
                tile = arith.minui(ptx.add(warp, start), ptx.int32(self.plan.tiles - 1))
                pair = self._add_slices(base, tile, lane)
                places = self._places(start, ptx.scalar(first_row), ptx.scalar(step), ptx.int32(0))
                self._leave_pair(flags, ptx.add(begin, out_ref.first), pair, places, lane)

        return run(sums_ref, out_ref.flags, out_ref.turn, first_row, step)

    @staticmethod
    def _leave_pair(flags, begin, pair, places, lane):
        """A lane has a row for two tokens; with its neighbour's a word of two rows for one.

        Lanes of even rows take the first token, the others the second.
        """
        odd = arith.cmpi(arith.CmpIPredicate.ne, ptx.and_(lane, 4), ptx.int32(0))
        given, kept = arith.select(odd, *pair), arith.select(odd, *pair[::-1])
        taken = ptx.asm(ptx.f32(), [given], _SWAP_ROWS, "=f,f", effects=True)
        low, high = arith.select(odd, taken, kept), arith.select(odd, kept, taken)
        word = ptx.asm(ptx.i32(), [high, low], _PACK, "=r,f,f")
        (at, live), (second, second_live) = places
        at, live = arith.select(odd, second, at), arith.select(odd, second_live, live)
        publish(flags, ptx.add(ptx.shr(at, 1), begin), [word], ptx.flag(live))


def publish(flags, index, words, flag):
    """Leaves 1, 2 or 4 words, where the flag is set."""
    n = len(words)
    left = [f"w{i}" for i in range(n)]
    target = left[0] if n == 1 else "{" + ", ".join(left) + "}"
    lines = [f"not.b32 {name}, ${i + 2};" for i, name in enumerate(left)]
    kind = f"st.relaxed.gpu.global{'' if n == 1 else f'.v{n}'}.b32"
    text = (
        f"{{ .reg .pred p; .reg .b32 {', '.join(left)}; setp.ne.s32 p, $0, 0; {' '.join(lines)} "
        f"@p {kind} [$1], {target}; }}"
    )
    operands = [flag, ptx.address(flags, index, 4), *words]
    ptx.asm(None, operands, text, ",".join(["r", "l"] + ["r"] * n), effects=True)


class ExchangingMachine(Machine):
    """A block's threads that exchange words with other blocks."""

    def __init__(self, threads: int, told=None, number: int = 0):
        super().__init__(threads)
        self.told, self.number = told, number

    def wait(self) -> None:
        """Returns when what the block's finisher took can be read."""
        barriers.wait_here(self.told, self.number)

    def publish(self, ref, index: Reg, words, where: Reg) -> None:
        """Leaves 1, 2 or 4 words, where the condition holds."""
        publish(ref, index.value, [word.value for word in words], ptx.flag(where.value))

    def await_words(self, ref, indices) -> list[list[Reg]]:
        """Four words from each index on, once they have been left."""
        words = await_words([(ptx.address(ref, index.value, 4), 0) for index in indices])
        return [[Reg(word) for word in words[i : i + 4]] for i in range(0, len(words), 4)]

    def load_shared_words(self, ref, index: Reg, words: int, where=None, other=None) -> list[Reg]:
        """1, 2 or 4 words of shared memory; if not `where`, those of `other`, in its registers."""
        if where is None:
            return [self.bits(value) for value in self.load_shared(ref, index, words)]
        outputs = [f"${i}" for i in range(words)]
        target = outputs[0] if words == 1 else "{" + ", ".join(outputs) + "}"
        kind = f"ld.shared{'' if words == 1 else f'.v{words}'}.b32"
        text = (
            f"{{ .reg .pred p; setp.ne.s32 p, ${words + 1}, 0; @p {kind} {target}, [${words}]; }}"
        )
        operands = [ptx.address(ref, index.value, 4), ptx.flag(where.value)]
        operands += [word.value for word in other]
        constraints = ",".join(["=&r"] * words + ["r", "r"] + [str(i) for i in range(words)])
        found = ptx.results(words, ptx.i32(), operands, text, constraints, effects=True)
        return [Reg(word) for word in found]

    def store_shared_words(self, ref, index: Reg, words) -> None:
        """Four words to shared memory."""
        self.store_shared(ref, index, [self.as_float(word) for word in words], self.thread >= 0)

    def exclusive_or(self, a: Reg, b: Reg) -> Reg:
        """Bits of a or of b, not of both."""
        return a._with(b, "xori")

    def copy(self, target, to: Reg, source, index: Reg, where: Reg) -> None:
        """Starts to copy four words to shared memory, from elements of 2 bytes, where it holds."""
        operands = [
            ptx.flag(where.value),
            ptx.address(target, to.value, 4),
            ptx.address(source, index.value, 2),
        ]
        ptx.asm(None, operands, _COPY, "r,r,l", effects=True)

    def await_copies(self) -> None:
        """Waits until what the warp's lanes copy can be read by all of them."""
        ptx.asm(None, [], "cp.async.wait_all;\nbar.warp.sync 0xffffffff;", "", effects=True)

    def meet_warp(self) -> None:
        """All lanes of the warp meet."""
        ptx.asm(None, [], "bar.warp.sync 0xffffffff;", "", effects=True)


@dataclasses.dataclass(frozen=True)
class Together:
    """Hooks of a launch of so many blocks, which share an exchange."""

    blocks: int
    exchange: Exchange

    def outputs(self, layer) -> dict:
        """Arrays beside y that are written: none."""
        del layer
        return {}

    def exchanged(self, refs) -> dict:
        """The projection and the heads, as `ExchangingLanes` take and leave them."""
        part, both = self.exchange, (refs["flags"], refs["turn"])
        return dict(
            qkv=Left(*both, part.halves, part.half, part.rows),
            heads=Left(*both, part.heads, part.half, part.columns),
        )

    def begin(self, refs, block):
        """Learns which half it is, and clears this block's part of the other."""
        part, rest = self.exchange, first_step(self.blocks)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _SPLAT))
        def run(_, flags, turn, block):
            block, thread = ptx.scalar(block), ptx.thread()
            first = arith.cmpi(arith.CmpIPredicate.eq, block, ptx.int32(0))
            step = arith.select(first, ptx.int32(rest), ptx.int32(1))
            with utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread, ptx.int32(0))):
                operands = [ptx.address(flags, part.word, 4), step, ptx.address(turn, 0, 4)]
                ptx.asm(None, operands, _COME, "l,r,r", effects=True)
            utils.warpgroup_barrier()
            other = arith.subi(ptx.int32(1), ptx.load(turn, 0, ptx.i32()))
            begin = ptx.add(ptx.mul(other, part.half), part.halves)
            pieces = part.half // 4
            place = ptx.add(ptx.mul(block, ptx.THREADS), thread)
            for start in range(0, pieces, self.blocks * ptx.THREADS):
                at = ptx.add(place, start)
                there = ptx.flag(ptx.below(at, pieces))
                pointer = ptx.address(flags, ptx.add(begin, ptx.mul(at, 4)), 4)
                ptx.asm(None, [there, pointer], _CLEAR, "r,l", effects=True)

        run(refs["flags"], refs["turn"], block)

    def bring(self, ring, refs, block):
        """Starts to bring what `attend` will read to the L2 cache."""
        self._on_machine(ring, ring.bring, 128 * ring.warpgroups, refs, block)

    def take(self, ring, refs, block):
        """What a tile of attention needs of the projection, to shared memory, once it is there."""
        self._on_machine(ring, ring.take, ptx.THREADS, refs, block)

    def attend(self, ring, refs, block):
        """A tile of attention, by the first warpgroups of a block, once that has been taken."""
        self._on_machine(ring, ring.run, 128 * ring.warpgroups, refs, block)

    def _on_machine(self, ring, function, threads, refs, block):
        told, barrier = refs["projected"]
        names = ("cos", "sin", "keys", "values", "start", "live", "sink", "flags", "turn")
        memory_of = {name: refs[name] for name in names if name in refs}
        memory_of |= {name: refs[f"ring_{name}"] for name in ring.shared}
        kinds = (*[plgpu.RefType()] * (len(memory_of) + 1), _SPLAT)
        part = self.exchange

        @plgpu.inline_mgpu(arg_types=kinds)
        def run(_, *given):
            *found, told, block = given
            machine = ExchangingMachine(threads, told, barrier)
            # One warpgroup counts its own threads: the finisher's are not the block's first.
            machine.thread = Reg(ptx.thread()) if threads == ptx.THREADS else machine.thread
            here = dict(zip(memory_of, found, strict=True))
            (turn,) = machine.load_shared_words(here["turn"], machine.const(0), 1)
            begin = turn * part.half
            here |= dict(exchange=here["flags"], qkv=begin + part.halves, out=begin + part.heads)
            function(machine, Reg(ptx.scalar(block)), here)

        run(*memory_of.values(), told, block)
