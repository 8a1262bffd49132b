"""Brings what a later kernel will read to the L2 cache, when memory would be idle; in PTX."""

import math

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels.expert_ffn.lanes import _add, _asm, _at, _c, _mul, _scalar

_THREADS = 128
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
        thread = arith.remui(utils.thread_idx(), _c(_THREADS))
        start = _add(_mul(_scalar(block), share), _mul(thread, chunk))
        end = arith.minui(_c(total), _mul(_add(_scalar(block), 1), share))
        size = arith.minui(_c(chunk), arith.subi(arith.maxui(end, start), start))
        live = arith.cmpi(arith.CmpIPredicate.ult, thread, _c(32))
        size = arith.select(live, size, _c(0))
        at = _at(ref, arith.select(live, start, _c(0)), 1)
        _asm(None, [size, at], _PREFETCH, "r,l", effects=True)

    run(ref, block)
