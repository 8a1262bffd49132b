"""What blocks do together, in PTX: meet, and attend. `interpreted.py` has the same in jnp."""

import dataclasses

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import barriers, ptx
from pallas_kernels.attention.machine import Machine, Reg
from pallas_kernels.expert_ffn.grid import first_step

_SCALAR = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)
# As in expert_ffn/grid.py all add up to 2^31, so that bit 31 changes when all have come.
_COME = """{
.reg .pred p;
setp.eq.u32 p, $1, 0;
mov.b32 $0, 0;
@p atom.add.release.gpu.global.u32 $0, [$2], $3;
}"""
_WAIT = """{
.reg .pred p;
.reg .b32 now;
WAIT:
ld.acquire.gpu.global.u32 now, [$0];
xor.b32 now, now, $1;
setp.ge.s32 p, now, 0;
@p bra WAIT;
}"""


class WaitingMachine(Machine):
    """A block's threads that wait, once, for what other blocks write."""

    def __init__(self, threads: int, told, number: int):
        super().__init__(threads)
        self.told, self.number = told, number

    def wait(self) -> None:
        """Returns when it can be read."""
        barriers.wait_here(self.told, self.number)


@dataclasses.dataclass(frozen=True)
class Together:
    """Hooks of a launch of so many blocks."""

    blocks: int

    def come(self, flags_ref, word, block):
        """Says that this block has come: what its threads wrote can be read by those that wait.

        Returns:
          what `wait_for_all` takes.
        """
        rest = first_step(self.blocks)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=_SCALAR)
        def run(_, flags, block):
            utils.warpgroup_barrier()
            first = arith.cmpi(arith.CmpIPredicate.eq, ptx.scalar(block), ptx.int32(0))
            step = arith.select(first, ptx.int32(rest), ptx.int32(1))
            operands = [ptx.thread(), ptx.address(flags, word, 4), step]
            old = ptx.asm(ptx.i32(), operands, _COME, "=&r,r,l,r", effects=True)
            return mgpu.FragmentedArray.splat(old, (), is_signed=True)

        return run(flags_ref, block)

    def wait_for_all(self, flags_ref, word, before):
        """Returns when all blocks have come; what they wrote before can then be read."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
        def run(_, flags, before):
            with utils.when(arith.cmpi(arith.CmpIPredicate.eq, ptx.thread(), ptx.int32(0))):
                operands = [ptx.address(flags, word, 4), ptx.scalar(before)]
                ptx.asm(None, operands, _WAIT, "l,r", effects=True)
            utils.warpgroup_barrier()

        run(flags_ref, before)

    def bring(self, ring, refs, block):
        """Starts to bring what `attend` will read to the L2 cache."""
        self._on_machine(ring, ring.bring, refs, block)

    def attend(self, ring, refs, block):
        """A tile of attention, by the first warpgroups of a block, once all is projected."""
        self._on_machine(ring, ring.run, refs, block)

    def _on_machine(self, ring, function, refs, block):
        told, barrier = refs["projected"]
        taken = ("cos", "sin", "keys", "values", "start", "live", "sink")
        memory = {name: refs[name] for name in taken if name in refs}
        memory |= dict(qkv=refs["qkv_seen"], out=refs["heads"])
        memory |= {name: refs[f"ring_{name}"] for name in ring.shared}
        kinds = (*[plgpu.RefType()] * (len(memory) + 1), plgpu.Layout.WG_SPLAT)

        @plgpu.inline_mgpu(arg_types=kinds)
        def run(_, *given):
            *found, told, block = given
            machine = WaitingMachine(128 * ring.warpgroups, told, barrier)
            function(machine, Reg(ptx.scalar(block)), dict(zip(memory, found, strict=True)))

        run(*memory.values(), told, block)
