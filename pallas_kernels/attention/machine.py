"""What threads do, written once: as machine code here, or by a test in numpy.

A `Reg` is one 32-bit register of each thread: an int, a float or a condition. `Machine` has what
has no operator. Tests hold a second machine whose registers are numpy arrays, one element a thread.
"""

from collections.abc import Callable, Sequence

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

from pallas_kernels import ptx

_PREDICATES = {"<": "slt", "<=": "sle", ">": "sgt", ">=": "sge", "==": "eq"}
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
)


class Reg:
    """A value of each thread; operators are those of signed ints, or of floats."""

    def __init__(self, value):
        self.value = value

    @property
    def is_float(self) -> bool:
        """Whether it is a float."""
        return isinstance(self.value.type, ir.F32Type)

    def _with(self, other, name: str) -> "Reg":
        other = other if isinstance(other, Reg) else Reg(utils.c(other, self.value.type))
        return Reg(getattr(arith, name)(self.value, other.value))

    def __add__(self, other):
        return self._with(other, "addf" if self.is_float else "addi")

    def __sub__(self, other):
        return self._with(other, "subf" if self.is_float else "subi")

    def __mul__(self, other):
        return self._with(other, "mulf" if self.is_float else "muli")

    def __truediv__(self, other):
        return self._with(other, "divf")

    def __floordiv__(self, other):
        return self._with(other, "divui")

    def __mod__(self, other):
        return self._with(other, "remui")

    def __and__(self, other):
        return self._with(other, "andi")

    def __or__(self, other):
        return self._with(other, "ori")

    def __lshift__(self, other):
        return self._with(other, "shli")

    def __rshift__(self, other):
        return self._with(other, "shrui")

    def _compare(self, other, sign: str) -> "Reg":
        other = other if isinstance(other, Reg) else Reg(utils.c(other, self.value.type))
        predicate = getattr(arith.CmpIPredicate, _PREDICATES[sign])
        return Reg(arith.cmpi(predicate, self.value, other.value))

    def __lt__(self, other):
        return self._compare(other, "<")

    def __le__(self, other):
        return self._compare(other, "<=")

    def __gt__(self, other):
        return self._compare(other, ">")

    def __ge__(self, other):
        return self._compare(other, ">=")

    def equals(self, other):
        """Whether they are the same int."""
        return self._compare(other, "==")


class Machine:
    """The threads of a block; references are memrefs, indices count elements of `width` bytes."""

    def __init__(self, threads: int):
        self.threads = threads
        self.thread = Reg(utils.thread_idx())

    def const(self, value: int | float) -> Reg:
        """The same int or float in all threads."""
        return Reg(ptx.int32(value) if isinstance(value, int) else ptx.float32(value))

    def where(self, condition: Reg, a: Reg, b: Reg) -> Reg:
        """a or b."""
        return Reg(arith.select(condition.value, a.value, b.value))

    def minimum(self, a: Reg, b: Reg | int) -> Reg:
        """The lesser int."""
        return a._with(b, "minsi")

    def maximum(self, a: Reg, b: Reg | int) -> Reg:
        """The greater int or float."""
        return a._with(b, "maximumf" if a.is_float else "maxsi")

    def load(
        self,
        ref,
        index: Reg,
        width: int,
        words: int,
        where: Reg | None = None,
        other: Sequence[Reg] | None = None,
        offset: int = 0,
    ) -> list[Reg]:
        """1, 2 or 4 words of global memory, issued in the order of the calls.

        What is `offset` elements further needs no address of its own. If not `where`, they are
        those of `other`, in the registers that are loaded to; or zeros.

        Past the first-level cache only where the hardware must: others may have written before this
        launch, nobody else writes what is read during it.
        """
        pointer = ptx.address(ref, index.value, width)
        return self._load_at(pointer, offset * width, words, where, other)

    def _load_at(self, pointer, num_bytes: int, words: int, where=None, other=None) -> list[Reg]:
        """`load`, of what is so many bytes beyond a pointer."""
        outputs = [f"${i}" for i in range(words)]
        target = outputs[0] if words == 1 else "{" + ", ".join(outputs) + "}"
        kind = f"ld.global{'' if words == 1 else f'.v{words}'}.b32"
        operands, constraints = [], "l"
        text = f"{kind} {target}, [${words}+{num_bytes}];"
        if where is not None:
            zeros = " ".join(f"mov.b32 {out}, 0;" for out in outputs) if other is None else ""
            text = f"{{ .reg .pred p; setp.ne.s32 p, ${words + 1}, 0; {zeros} @p {text} }}"
            operands = [ptx.flag(where.value), *(word.value for word in other or ())]
            constraints = ",".join(["l", "r", *(str(i) for i in range(len(other or ())))])
        constraints = ",".join(["=&r"] * words + [constraints])
        operands = [pointer, *operands]
        found = ptx.results(words, ptx.i32(), operands, text, constraints, effects=True)
        return [Reg(word) for word in found]

    def load_either(
        self,
        condition: Reg,
        one,
        other,
        width: int,
        words: int,
        offset: int = 0,
        where: Reg | None = None,
    ) -> list[Reg]:
        """1, 2 or 4 words of one (reference, index) where the condition holds, else of the other.

        Zeros if not `where`.

        Two loads, of which each lane needs one, would wait for each other: their registers are the
        same.
        """
        places = [ptx.address(ref, index.value, width) for ref, index in (one, other)]
        place = arith.select(condition.value, *places)
        return self._load_at(place, offset * width, words, where)

    def store(
        self, ref, index: Reg, width: int, words: Sequence[Reg], where: Reg, offset: int = 0
    ) -> None:
        """1, 2 or 4 words to global memory, where the condition holds."""
        n = len(words)
        sources = [f"${i + 2}" for i in range(n)]
        source = sources[0] if n == 1 else "{" + ", ".join(sources) + "}"
        kind = f"st.global{'' if n == 1 else f'.v{n}'}.b32"
        text = (
            f"{{ .reg .pred p; setp.ne.s32 p, $0, 0; @p {kind} [$1+{offset * width}], {source}; }}"
        )
        flag, pointer = ptx.flag(where.value), ptx.address(ref, index.value, width)
        operands = [flag, pointer, *(self.bits(w).value for w in words)]
        ptx.asm(None, operands, text, ",".join(["r", "l"] + ["r"] * n), effects=True)

    def prefetch(self, ref, index: Reg, width: int, where: Reg) -> None:
        """Brings a word of global memory, and its neighbours, to the L2 cache."""
        text = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p prefetch.global.L2 [$1]; }"
        operands = [ptx.flag(where.value), ptx.address(ref, index.value, width)]
        ptx.asm(None, operands, text, "r,l", effects=True)

    def touch(self, ref, index: Reg, width: int, where: Reg) -> None:
        """Brings a word of global memory, and its neighbours, to the first-level cache."""
        self.load(ref, index, width, 1, where)

    def load_shared(self, ref, index: Reg, count: int) -> list[Reg]:
        """1, 2 or 4 floats of shared memory."""
        if count == 1:
            return [Reg(ptx.load(ref, index.value, ptx.f32()))]
        pointer = ptx.address(ref, index.value, 4)
        return [Reg(value) for value in ptx.load_values(pointer, 0, count, ptx.f32())]

    def store_shared(self, ref, index: Reg, values: Sequence[Reg], where: Reg) -> None:
        """1, 2 or 4 floats to shared memory, where the condition holds."""
        n = len(values)
        sources = [f"${i + 2}" for i in range(n)]
        source = sources[0] if n == 1 else "{" + ", ".join(sources) + "}"
        kind = f"st.shared{'' if n == 1 else f'.v{n}'}.f32"
        text = f"{{ .reg .pred p; setp.ne.s32 p, $0, 0; @p {kind} [$1], {source}; }}"
        flag, pointer = ptx.flag(where.value), ptx.address(ref, index.value, 4)
        operands = [flag, pointer, *(v.value for v in values)]
        ptx.asm(None, operands, text, ",".join(["r", "r"] + ["f"] * n), effects=True)

    def barrier(self) -> None:
        """All threads of the block meet; what they wrote to shared memory can be read."""
        ptx.asm(None, [], f"bar.sync 0, {self.threads};", "", effects=True)

    def multiply(self, a: Sequence[Reg], b: Sequence[Reg], c: Sequence[Reg]) -> list[Reg]:
        """A warp's product of 16 x 16 and 16 x 8 bfloat16 plus c; fragments as PTX has them."""
        operands = [r.value for r in (*a, *b, *c)]
        constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
        found = ptx.results(4, ptx.f32(), operands, _MMA, constraints)
        return [Reg(value) for value in found]

    def swap(self, value: Reg, mask: int) -> Reg:
        """The value of the lane whose number differs in the bits of `mask`."""
        text = f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, -1;"
        found = Reg(ptx.asm(ptx.i32(), [self.bits(value).value], text, "=r,r", effects=True))
        return self.as_float(found) if value.is_float else found

    def exp2(self, x: Reg) -> Reg:
        """2^x."""
        return Reg(ptx.asm(ptx.f32(), [x.value], "ex2.approx.ftz.f32 $0, $1;", "=f,f"))

    def rsqrt(self, x: Reg) -> Reg:
        """1 / sqrt(x)."""
        return Reg(ptx.rsqrt(x.value))

    def whole(self, x: Reg) -> Reg:
        """The nearest whole number."""
        return Reg(ptx.asm(ptx.f32(), [x.value], "cvt.rni.f32.f32 $0, $1;", "=f,f"))

    def fma(self, a: Reg, b: Reg, c: Reg) -> Reg:
        """a b + c, rounded once."""
        return Reg(ptx.fma(a.value, b.value, c.value))

    def pack(self, low: Reg, high: Reg) -> Reg:
        """Two floats, rounded to bfloat16, in one word."""
        operands = [high.value, low.value]
        return Reg(ptx.asm(ptx.i32(), operands, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"))

    def halves(self, a: Reg, b: Reg, high: bool) -> Reg:
        """The low halves of two words in one word, or their high halves."""
        selector = 0x7632 if high else 0x5410
        operands = [a.value, b.value]
        return Reg(ptx.asm(ptx.i32(), operands, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r"))

    def unpack(self, word: Reg) -> tuple[Reg, Reg]:
        """A word's two bfloat16 as floats, the low one first."""
        high = word & ~0xFFFF
        return self.as_float(word << 16), self.as_float(high)

    def as_float(self, word: Reg) -> Reg:
        """The float with the bits of an int."""
        return Reg(arith.bitcast(ptx.f32(), word.value))

    def bits(self, value: Reg) -> Reg:
        """The int with the bits of a float; an int is itself."""
        return Reg(arith.bitcast(ptx.i32(), value.value)) if value.is_float else value

    def to_float(self, value: Reg) -> Reg:
        """The float of an int."""
        return Reg(arith.sitofp(ptx.f32(), value.value))

    def repeat(self, count: Reg, step: Callable, carry: Sequence[Reg]) -> list[Reg]:
        """carry = step(i, carry) for i in 0 ... count - 1."""
        loop = scf.ForOp(ptx.int32(0), count.value, ptx.int32(1), [r.value for r in carry])
        with ir.InsertionPoint(loop.body):
            inner = [Reg(value) for value in loop.inner_iter_args]
            results = step(Reg(loop.induction_variable), inner)
            scf.yield_([r.value for r in results])
        return [Reg(value) for value in loop.results]

    def any(self, condition: Reg) -> Reg:
        """Whether it holds for a lane of the warp."""
        text = (
            "{ .reg .pred p, q; setp.ne.s32 p, $1, 0; vote.sync.any.pred q, p, -1; "
            "selp.b32 $0, 1, 0, q; }"
        )
        return Reg(ptx.asm(ptx.i32(), [ptx.flag(condition.value)], text, "=r,r", effects=True)) > 0

    def branch(self, condition: Reg, then: Callable, otherwise: Sequence[Reg]) -> list[Reg]:
        """then() in warps for all of whose lanes the condition holds, else `otherwise`."""
        branch = scf.IfOp(condition.value, [r.value.type for r in otherwise], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_([r.value for r in then()])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_([r.value for r in otherwise])
        return [Reg(value) for value in branch.results]
