"""Barriers in shared memory at which warps arrive; in PTX.

Pallas' own count threads, and 32 arrivals of a warp at one address are carried out one after
another. Here one lane arrives for its warp. A place is a reference and the number of a barrier.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx

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
_WAIT = """{
.reg .pred p;
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1, 10000000;
@!p bra WAIT;
}"""


def types(groups) -> dict:
    """Shared memory of barriers: `groups` has name, number, and warpgroups that arrive."""
    return dict(told=plgpu.SMEM((2 * sum(number for _, number, _ in groups),), jnp.uint32))


def places(ref, groups) -> tuple[dict, list[int]]:
    """Each name's first place, and how often each barrier is arrived at.

    Where no warpgroup arrives, a copy does.
    """
    found, counts = {}, []
    for name, number, arrivals in groups:
        found[name] = ref, len(counts)
        counts += [4 * arrivals or 1] * number
    return found, counts


def arrive(place, index):
    """Arrives for this warpgroup: a lane for each warp, after what its lanes did before."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(_, ref, index):
        arrive_knowing(ref, index, [])

    run(place[0], place[1] + index)


def arrive_knowing(ref, index, known):
    """The same inside a hook, once the words in `known` are there in all lanes.

    An arrival alone waits for no load under way. That its address depends on the words, by bits
    that are always zero, makes it wait for their loads.
    """
    address = ptx.address(ref, ptx.scalar(index), 8)
    zero = ptx.int32(0)
    for word in known:
        zero = arith.ori(zero, word)
    ptx.asm(None, [address, zero], _ARRIVE, "r,r", effects=True)


def wait(place, index, nth):
    """Waits until the barrier has been completed nth + 1 times, and has not been once more."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def run(_, ref, index, nth):
        operands = [ptx.address(ref, ptx.scalar(index), 8), ptx.and_(ptx.scalar(nth), 1)]
        ptx.asm(None, operands, _WAIT, "r,r", effects=True)

    run(place[0], place[1] + index, nth)


def wait_here(ref, number):
    """Waits inside a hook until a barrier has been completed once, and has not been once more."""
    operands = [ptx.address(ref, ptx.int32(number), 8), ptx.int32(0)]
    ptx.asm(None, operands, _WAIT, "r,r", effects=True)
