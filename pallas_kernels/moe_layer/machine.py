"""What threads do before their experts besides what those of a router can: see `router.machine`."""

from pallas_kernels import ptx
from pallas_kernels.attention.machine import Reg
from pallas_kernels.router.machine import ClusterMachine

_STORE_NEW = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.relaxed.gpu.global.b32 [$1], $2; }"


class FrontMachine(ClusterMachine):
    """The threads of a block that multiply: the first ones of it."""

    def __init__(self, threads: int):
        super().__init__(threads, ranks=1)

    def times(self, a: Reg, b: Reg) -> Reg:
        """Products of two words' bfloat16, rounded."""
        return Reg(ptx.asm(ptx.i32(), [a.value, b.value], "mul.bf16x2 $0, $1, $2;", "=r,r,r"))

    def raised(self, word: Reg) -> Reg:
        """A word's bfloat16 times `ptx.RAISE`."""
        return Reg(ptx.raised(word.value))

    def store_new(self, ref, index: Reg, word: Reg, where: Reg) -> None:
        """A word of global memory, for which other blocks of this launch wait."""
        operands = [ptx.flag(where.value), ptx.address(ref, index.value, 4), word.value]
        ptx.asm(None, operands, _STORE_NEW, "r,l,r", effects=True)

    def await_marked(self, ref, index: Reg, count: int, pitch: int, mark: Reg) -> list[Reg]:
        """`count` words of global memory, each `pitch` from the one before, without their marks.

        Returns when the sign bits of all are that of `mark`, for all lanes of the warp. The words
        stand for themselves alone: nothing else that their writers wrote can be read for that.
        """
        loads = "".join(
            f"ld.relaxed.gpu.global.b32 ${i}, [${count}+{4 * pitch * i}];\n"
            f"xor.b32 ${i}, ${i}, ${count + 1};\n"
            for i in range(count)
        )
        together = "".join(f"or.b32 all, all, ${i};\n" for i in range(1, count))
        text = (
            "{\n.reg .pred p;\n.reg .b32 all;\nWAIT:\n"
            + loads
            + "mov.b32 all, $0;\n"
            + together
            + "setp.lt.s32 p, all, 0;\n@p bra WAIT;\nbar.warp.sync 0xffffffff;\n}"
        )
        operands = [ptx.address(ref, index.value, 4), mark.value]
        constraints = ",".join(["=&r"] * count + ["l", "r"])
        found = ptx.results(count, ptx.i32(), operands, text, constraints, effects=True)
        return [Reg(word) for word in found]
