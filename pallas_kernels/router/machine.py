"""What threads of a router do besides what those of a cluster can: see `attention.cluster`."""

from pallas_kernels import ptx
from pallas_kernels.attention.cluster import ClusterMachine
from pallas_kernels.attention.machine import Reg

# The addition releases what this block's threads wrote (they have met before) and acquires what
# the others did. It wraps to 0 after the last block: the word is fit for the next launch.
_COUNT = (
    "{{ .reg .pred p; setp.eq.s32 p, $1, 0; mov.b32 $0, 0; "
    "@p atom.acq_rel.gpu.global.inc.u32 $0, [$2], {}; }}"
)


class RouterMachine(ClusterMachine):
    """The threads of a block, one of `ranks` in a cluster, one of several."""

    def load_new(self, ref, index: Reg) -> Reg:
        """A float of global memory that another block of this launch wrote."""
        text = "ld.relaxed.gpu.global.b32 $0, [$1];"
        word = Reg(
            ptx.asm(ptx.i32(), [ptx.address(ref, index.value, 4)], text, "=r,l", effects=True)
        )
        return self.as_float(word)

    def meet_warp(self) -> None:
        """The lanes of a warp meet; what they wrote to shared memory can be read by them."""
        ptx.asm(None, [], "bar.warp.sync 0xffffffff;", "", effects=True)

    def warp_max(self, value: Reg) -> Reg:
        """The greatest int of the warp's lanes."""
        return self._reduce(value, "max.s32")

    def warp_min(self, value: Reg) -> Reg:
        """The least int of the warp's lanes."""
        return self._reduce(value, "min.s32")

    def of_lane(self, value: Reg, lane: int) -> Reg:
        """What a lane of the warp has."""
        text = f"shfl.sync.idx.b32 $0, $1, {lane}, 31, -1;"
        found = Reg(ptx.asm(ptx.i32(), [self.bits(value).value], text, "=r,r", effects=True))
        return self.as_float(found) if value.is_float else found

    def _reduce(self, value: Reg, operation: str) -> Reg:
        text = f"redux.sync.{operation} $0, $1, -1;"
        return Reg(ptx.asm(ptx.i32(), [value.value], text, "=r,r", effects=True))

    def is_last(self, counter, word: int, blocks: int, flag) -> Reg:
        """Whether this is the last of so many blocks to come here; what they wrote can be read.

        Args:
          counter: words of global memory.
          word: of them, the one that counts: 0 before the first block, and after the last.
          blocks: that come.
          flag: a word of shared memory.
        """
        self.barrier()
        operands = [self.thread.value, ptx.address(counter, word, 4)]
        before = Reg(
            ptx.asm(ptx.i32(), operands, _COUNT.format(blocks - 1), "=&r,r,l", effects=True)
        )
        last = Reg(ptx.flag(before.equals(blocks - 1).value))
        self.store_shared(flag, self.const(0), [self.as_float(last)], self.thread.equals(0))
        self.barrier()
        return self.bits(self.load_shared(flag, self.const(0), 1)[0]).equals(1)
