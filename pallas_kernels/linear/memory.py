"""How a lane reaches memory: bulk copies, rows of x, scales, the residual, results; in PTX."""

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx

# Thread 0 says how many bytes will come, then the first threads of its warp each copy some.
_COPY = (
    "{\n.reg .pred p;\nsetp.eq.s32 p, $0, 0;\n"
    "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;\nbar.warp.sync 0xffffffff;\n"
    "setp.lt.u32 p, $0, $3;\n"
    "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$4], [$5], $6, [$1];\n}"
)
_LOAD_ROW = (
    "{\n.reg .pred p;\nmov.b32 $0, 0;\nmov.b32 $1, 0;\nmov.b32 $2, 0;\nmov.b32 $3, 0;\n"
    "setp.ne.s32 p, $5, 0;\n@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];\n}"
)
# Not a plain load, so that it is issued before the wait for sums that comes next.
_LOAD_HALF = (
    "{ .reg .b16 h; .reg .b32 w; .reg .f32 a; ld.relaxed.gpu.global.b16 h, [$1]; "
    "cvt.u32.u16 w, h; shl.b32 w, w, 16; mov.b32 a, w; mov.f32 $0, a; }"
)
_STORE = "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.global.f32 [$1], $2; }"
_STORE_HALF = (
    "{ .reg .pred p; .reg .b16 h; cvt.rn.bf16.f32 h, $2; "
    "setp.ne.s32 p, $0, 0; @p st.global.b16 [$1], h; }"
)


def copy(thread, told, pieces, target, source, size):
    """The first `pieces` threads of a warp each start to copy `size` bytes to shared memory.

    Args:
      thread: its number.
      told: the barrier that completes when all have come.
      pieces: Python's, as is `size`.
      target: where the thread's piece goes to.
      source: where it is.
      size: of a piece.
    """
    counts = ptx.int32(pieces * size), ptx.int32(pieces)
    operands = [thread, told, *counts, target, source, ptx.int32(size)]
    ptx.asm(None, operands, _COPY, "r,r,r,r,r,l,r", effects=True)


def load_row(pointer, there):
    """16 bytes of a row that is there, else zeros; not moved before what comes before.

    Nobody writes them during the launch.

    Args:
      pointer: to them.
      there: a flag.
    """
    constraints = "=&r,=&r,=&r,=&r,l,r"
    return ptx.results(4, ptx.i32(), [pointer, there], _LOAD_ROW, constraints, effects=True)


def load_floats(base, count, pitch):
    """`count` neighbours in a row of `pitch` floats, in one load where its place allows.

    Not a plain one, so that it is issued before the wait for weights that comes next.
    """
    if count not in (2, 4) or pitch % count:
        texts = [f"ld.relaxed.gpu.global.f32 $0, [$1+{4 * i}];" for i in range(count)]
        return [ptx.asm(ptx.f32(), [base], text, "=f,l", effects=True) for text in texts]
    names = ", ".join(f"${i}" for i in range(count))
    text = f"ld.relaxed.gpu.global.v{count}.f32 {{{names}}}, [${count}];"
    return ptx.results(count, ptx.f32(), [base], text, "=f," * count + "l", effects=True)


def load_half(pointer):
    """A bfloat16 as a float."""
    return ptx.asm(ptx.f32(), [pointer], _LOAD_HALF, "=f,l", effects=True)


def write(out, index, value, condition):
    """Stores a sum in the result's type, where the condition holds."""
    flag = ptx.flag(condition)
    wide = isinstance(ir.MemRefType(out.type).element_type, ir.F32Type)
    at = ptx.address(out, arith.select(condition, index, ptx.int32(0)), 4 if wide else 2)
    ptx.asm(None, [flag, at, value], _STORE if wide else _STORE_HALF, "r,l,f", effects=True)
