"""What threads of a cluster do besides what those of a block can: see `attention.machine`."""

from collections.abc import Callable

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from pallas_kernels.attention.machine import Machine, Reg, _at, _f32, _flag, _i32, _results, _word

_STORE_REMOTE = (
    "{ .reg .pred p; .reg .b32 there; setp.ne.s32 p, $0, 0; "
    "mapa.shared::cluster.u32 there, $1, $2; @p st.shared::cluster.f32 [there], $3; }"
)
# The addition releases what this block's threads wrote (they have met before) and acquires what
# the others did. It wraps to 0 after the last block: the word is fit for the next launch.
_COUNT = (
    "{{ .reg .pred p; setp.eq.s32 p, $1, 0; mov.b32 $0, 0; "
    "@p atom.acq_rel.gpu.global.inc.u32 $0, [$2], {}; }}"
)


class ClusterMachine(Machine):
    """The threads of a block, one of `ranks` in a cluster."""

    def __init__(self, threads: int, ranks: int):
        super().__init__(threads)
        self.ranks = ranks

    def bits(self, value: Reg) -> Reg:
        """The bits of a float."""
        return _word(value)

    def rsqrt(self, x: Reg) -> Reg:
        """1 / sqrt(x)."""
        return _results(1, _f32(), [x.value], "rsqrt.approx.f32 $0, $1;", "=f,f")[0]

    def load_new(self, ref, index: Reg, where: Reg | None = None) -> Reg:
        """A float of global memory that another block of this launch wrote; 0 if not where."""
        del where  # What is there can always be read.
        text = "ld.relaxed.gpu.global.b32 $0, [$1];"
        (word,) = _results(1, _i32(), [_at(ref, index, 4)], text, "=r,l", True)
        return self.as_float(word)

    def store_remote(self, ref, index: Reg, value: Reg, rank: Reg, where: Reg) -> None:
        """A float to the shared memory of a block of the cluster, where the condition holds."""
        if self.ranks == 1:
            self.store_shared(ref, index, [value], where)
            return
        operands = [_flag(where), _at(ref, index, 4), rank.value, value.value]
        llvm.inline_asm(None, operands, _STORE_REMOTE, "r,r,r,f", has_side_effects=True)

    def cluster_barrier(self) -> None:
        """All threads of the cluster meet; what they wrote to shared memory can be read."""
        if self.ranks == 1:
            self.barrier()
            return
        text = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
        llvm.inline_asm(None, [], text, "", has_side_effects=True)

    def warp_max(self, value: Reg) -> Reg:
        """The greatest int of the warp's lanes."""
        return self._reduce(value, "max.s32")

    def warp_min(self, value: Reg) -> Reg:
        """The least int of the warp's lanes."""
        return self._reduce(value, "min.s32")

    def warp_or(self, value: Reg) -> Reg:
        """The bits that a lane of the warp has."""
        return self._reduce(value, "or.b32")

    def _reduce(self, value: Reg, operation: str) -> Reg:
        text = f"redux.sync.{operation} $0, $1, -1;"
        return _results(1, _i32(), [value.value], text, "=r,r", True)[0]

    def is_last(self, counter, word: int, blocks: int, flag) -> Reg:
        """Whether this is the last of so many blocks to come here; what they wrote can be read.

        Args:
          counter: words of global memory.
          word: of them, the one that counts: 0 before the first block, and after the last.
          blocks: that come.
          flag: a word of shared memory.
        """
        self.barrier()
        operands = [self.thread.value, _at(counter, self.const(word), 4)]
        (before,) = _results(1, _i32(), operands, _COUNT.format(blocks - 1), "=&r,r,l", True)
        last = Reg(arith.extui(_i32(), before.equals(blocks - 1).value))
        self.store_shared(flag, self.const(0), [self.as_float(last)], self.thread.equals(0))
        self.barrier()
        return self.bits(self.load_shared(flag, self.const(0), 1)[0]).equals(1)

    def when(self, condition: Reg, then: Callable) -> None:
        """then(), in blocks for all of whose threads the condition holds."""
        branch = scf.IfOp(condition.value)
        with ir.InsertionPoint(branch.then_block):
            then()
            scf.yield_([])
