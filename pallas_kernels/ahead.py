"""Brings what a later kernel will read to the L2 cache, when memory would be idle; in PTX."""

import math

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx

_PREFETCH = (
    "{\n.reg .pred p;\nsetp.gt.u32 p, $0, 0;\n@p cp.async.bulk.prefetch.L2.global [$1], $0;\n}"
)


def prefetch(ref, num_bytes: int, block, blocks: int) -> None:
    """A warpgroup starts to bring the beginning of its block's share of an array nearer.

    Args:
      ref: the array.
      num_bytes: wanted of it, by all blocks together.
      block: number of this one.
      blocks: that share the array, each a contiguous part.
    """
    total = math.prod(ref.shape) * ref.dtype.itemsize
    share = -(-total // blocks)
    share = -(-share // 128) * 128
    chunk = -(-min(share, -(-num_bytes // blocks)) // (32 * 128)) * 128

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def run(_, ref, block):
        thread = ptx.thread()
        start = ptx.add(ptx.mul(ptx.scalar(block), share), ptx.mul(thread, chunk))
        end = arith.minui(ptx.int32(total), ptx.mul(ptx.add(ptx.scalar(block), 1), share))
        size = arith.minui(ptx.int32(chunk), arith.subi(arith.maxui(end, start), start))
        live = ptx.below(thread, 32)
        size = arith.select(live, size, ptx.int32(0))
        at = ptx.address(ref, arith.select(live, start, ptx.int32(0)), 1)
        ptx.asm(None, [size, at], _PREFETCH, "r,l", effects=True)

    run(ref, block)
