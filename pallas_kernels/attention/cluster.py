"""What threads of a cluster do besides what those of a block can: see `machine.Machine`.

Blocks of a cluster send each other floats, straight to shared memory. A message completes a barrier
of the receiver's by its bytes, so that who has received may read; nothing goes through L2.
"""

from collections.abc import Callable, Sequence

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels import ptx
from pallas_kernels.attention.machine import Machine, Reg

# Barriers of shared memory that complete when so many bytes have come. A barrier of the cluster
# that orders stores has a fence, which waits for all loads under way: weights', or a cache's.
_MAKE = "mbarrier.init.shared::cta.b64 [$1+{0}], 1;\n"
_EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1+{0}], {1};\n"
_MADE = (
    "{{\n.reg .pred p;\nsetp.ne.s32 p, $0, 0;\n@p bra DONE;\n{}"
    "fence.mbarrier_init.release.cluster;\nDONE:\n}}"
)
_SEND = (
    "{{ .reg .pred p; .reg .b32 there, told; setp.ne.s32 p, $0, 0; "
    "mapa.shared::cluster.u32 there, $1, $2; mapa.shared::cluster.u32 told, $3, $2; "
    "@p st.async.shared::cluster.mbarrier::complete_tx::bytes{0}.f32 [there], {1}, [told]; }}"
)
_RECEIVE = (
    "{\n.reg .pred p;\nWAIT:\n"
    "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], 0, 10000000;\n"
    "@!p bra WAIT;\n}"
)


class ClusterMachine(Machine):
    """The threads of a block, number `rank` of `ranks` in a cluster."""

    def __init__(self, threads: int, ranks: int, rank: Reg):
        super().__init__(threads)
        self.ranks, self.rank = ranks, rank

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

    def send(
        self, ref, index: Reg, values: Sequence[Reg], rank: Reg, inbox: tuple, where: Reg
    ) -> None:
        """1, 2 or 4 floats to the shared memory of a block of the cluster, where `where` holds.

        Args:
          ref: an array of shared memory, the same in all blocks.
          index: their place there.
          values: the floats.
          rank: the block.
          inbox: where that block is told: `told`, and which.
          where: the condition.
        """
        if self.ranks == 1:
            self.store_shared(ref, index, values, where)
            return
        told = ptx.address(inbox[0], 2 * inbox[1], 4)
        flag, there = ptx.flag(where.value), ptx.address(ref, index.value, 4)
        n = len(values)
        sources = [f"${4 + i}" for i in range(n)]
        kind, source = ("", sources[0]) if n == 1 else (f".v{n}", f"{{{', '.join(sources)}}}")
        operands = [flag, there, rank.value, told, *(value.value for value in values)]
        constraints = ",".join(["r"] * 4 + ["f"] * n)
        ptx.asm(None, operands, _SEND.format(kind, source), constraints, effects=True)

    def receive(self, inbox: tuple) -> None:
        """Waits until an inbox of this block is full; what was sent can be read."""
        if self.ranks == 1:
            self.barrier()
            return
        told = ptx.address(inbox[0], 2 * inbox[1], 4)
        ptx.asm(None, [told], _RECEIVE, "r", effects=True)

    def when(self, condition: Reg, then: Callable) -> None:
        """then(), in warps for which the condition holds: for all of a warp's lanes, or none."""
        branch = scf.IfOp(condition.value)
        with ir.InsertionPoint(branch.then_block):
            then()
            scf.yield_([])
