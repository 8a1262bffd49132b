"""What threads of a cluster do besides what those of a block can: see `attention.machine`."""

from collections.abc import Callable, Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels import ptx
from pallas_kernels.attention.machine import Machine, Reg

# Barriers of shared memory that complete when so many bytes have come. A barrier of the cluster
# that orders stores has a fence, which waits for all loads under way: here those of the weights.
_MAKE = "mbarrier.init.shared::cta.b64 [$1+{0}], 1;\n"
_EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1+{0}], {1};\n"
_MADE = (
    "{{\n.reg .pred p;\nsetp.ne.s32 p, $0, 0;\n@p bra DONE;\n{}"
    "fence.mbarrier_init.release.cluster;\nDONE:\n}}"
)
_SEND = (
    "{ .reg .pred p; .reg .b32 there, told; setp.ne.s32 p, $0, 0; "
    "mapa.shared::cluster.u32 there, $1, $2; mapa.shared::cluster.u32 told, $3, $2; "
    "@p st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], $4, [told]; }"
)
_RECEIVE = (
    "{\n.reg .pred p;\nWAIT:\n"
    "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], 0, 10000000;\n"
    "@!p bra WAIT;\n}"
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

    def rsqrt(self, x: Reg) -> Reg:
        """1 / sqrt(x)."""
        return Reg(ptx.rsqrt(x.value))

    def load_new(self, ref, index: Reg) -> Reg:
        """A float of global memory that another block of this launch wrote."""
        text = "ld.relaxed.gpu.global.b32 $0, [$1];"
        word = Reg(
            ptx.asm(ptx.i32(), [ptx.address(ref, index.value, 4)], text, "=r,l", effects=True)
        )
        return self.as_float(word)

    def open_inboxes(self, told, sizes: Sequence[int]) -> None:
        """Makes a block's inboxes, each for so many floats, used once; all threads come here.

        Args:
          told: shared memory, two words an inbox.
          sizes: floats that will come, from this block too.
        """
        if self.ranks == 1:
            return
        lines = [_MAKE.format(8 * i) + _EXPECT.format(8 * i, 4 * n) for i, n in enumerate(sizes)]
        operands = [self.thread.value, ptx.address(told, 0, 4)]
        text = _MADE.format("".join(lines))
        ptx.asm(None, operands, text, "r,r", effects=True)

    def begin(self) -> None:
        """Tells the cluster that the inboxes are open, once loads that come before are under way.

        ptxas moves no load across the barrier; else it puts off those that are not needed first.
        """
        self.barrier()
        if self.ranks > 1:
            text = "barrier.cluster.arrive.relaxed.aligned;"
            ptx.asm(None, [], text, "", effects=True)

    def meet_cluster(self) -> None:
        """Waits until all blocks of the cluster have opened their inboxes."""
        if self.ranks > 1:
            text = "barrier.cluster.wait.aligned;"
            ptx.asm(None, [], text, "", effects=True)

    def send(self, ref, index: Reg, value: Reg, rank: Reg, inbox: tuple, where: Reg) -> None:
        """A float to the shared memory of a block of the cluster, where the condition holds.

        Args:
          ref: an array of shared memory, the same in all blocks.
          index: its place there.
          value: the float.
          rank: the block.
          inbox: where that block is told: `told`, and which.
          where: the condition.
        """
        if self.ranks == 1:
            self.store_shared(ref, index, [value], where)
            return
        told = ptx.address(inbox[0], 2 * inbox[1], 4)
        flag, there = ptx.flag(where.value), ptx.address(ref, index.value, 4)
        operands = [flag, there, rank.value, told, value.value]
        ptx.asm(None, operands, _SEND, "r,r,r,r,f", effects=True)

    def receive(self, inbox: tuple) -> None:
        """Waits until an inbox of this block is full; what was sent can be read."""
        if self.ranks == 1:
            self.barrier()
            return
        told = ptx.address(inbox[0], 2 * inbox[1], 4)
        ptx.asm(None, [told], _RECEIVE, "r", effects=True)

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

    def when(self, condition: Reg, then: Callable) -> None:
        """then(), in warps for which the condition holds: for all of a warp's lanes, or none."""
        branch = scf.IfOp(condition.value)
        with ir.InsertionPoint(branch.then_block):
            then()
            scf.yield_([])
