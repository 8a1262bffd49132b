"""The small pieces of which kernels build MLIR and inline PTX by hand.

Types, integers, addresses, loads, inline assembly. A value is MLIR's: one register of each thread,
32 bits of it where nothing else is said. Kernels say `ptx.add(...)`; a test that carries them out
on a CPU puts other functions in the place of MLIR's, here and in the kernels' modules.
"""

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import vector as vectors

THREADS = 128
"""Of a warpgroup."""
RAISE = 2.0**64
"""What `raised` multiplies by."""
_RAISED = 0x5F805F80  # the pair (2^64, 2^64) in bfloat16


def i32():
    """The type of an int of 32 bits."""
    return ir.IntegerType.get_signless(32)


def f32():
    """The type of a float of 32 bits."""
    return ir.F32Type.get()


def vector(n, kind):
    """The type of a vector of n values of type `kind`."""
    return ir.VectorType.get((n,), kind)


def int32(value):
    """A Python int as a constant."""
    return utils.c(value, i32())


def float32(value):
    """A Python float as a constant."""
    return utils.c(value, f32())


def _operand(b):
    return int32(b) if isinstance(b, int) else b


def add(a, b):
    """The ints a + b; b may be Python's."""
    return arith.addi(a, _operand(b))


def mul(a, b):
    """The ints a * b; b may be Python's."""
    return arith.muli(a, _operand(b))


def shr(a, bits):
    """The int a, without sign, shifted right by a Python int."""
    return arith.shrui(a, int32(bits))


def and_(a, mask):
    """The bits of a that a Python int has too."""
    return arith.andi(a, int32(mask))


def below(a, b):
    """The condition a < b of ints without sign; b may be Python's."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, _operand(b))


def flag(condition):
    """A condition as the int 0 or 1."""
    return arith.extui(i32(), condition)


def thread():
    """Which thread of its warpgroup this is, an int."""
    return arith.remui(utils.thread_idx(), int32(THREADS))


def warp_and_lane():
    """Which warp of its warpgroup this is and which lane of the warp, two ints."""
    number = thread()
    return shr(number, 5), and_(number, 31)


def address(ref, index, size):
    """Pointer to element `index` of a contiguous reference; an int, or Python's; size in bytes."""
    i64 = ir.IntegerType.get_signless(64)
    num_bytes = arith.muli(arith.extsi(i64, _operand(index)), utils.c(size, i64))
    return offset(utils.memref_ptr(ref), num_bytes)


def offset(pointer, num_bytes):
    """The pointer that is `num_bytes` further on: an int, or Python's."""
    return utils.getelementptr(pointer, [_operand(num_bytes)], ir.IntegerType.get_signless(8))


def load(ref, index, kind):
    """Element `index` of a reference: of type `kind`, of 32 bits."""
    return llvm.load(kind, address(ref, index, 4), alignment=4)


def load_at(pointer, num_bytes, kind, alignment):
    """What is `num_bytes` beyond a pointer: of type `kind`, with an alignment in bytes."""
    return llvm.load(kind, offset(pointer, num_bytes), alignment=alignment)


def load_values(pointer, num_bytes, count, kind):
    """A list of `count` values there, of type `kind`, in one load, aligned to all of them."""
    return split(load_at(pointer, num_bytes, vector(count, kind), 4 * count))


def split(vec):
    """The values of a vector, a list."""
    n = ir.VectorType(vec.type).shape[0]
    return [
        vectors.extract(vec, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(n)
    ]


def join(values):
    """The vector of a list of values."""
    return vectors.from_elements(vector(len(values), values[0].type), list(values))


def scalar(fragment):
    """The one value of an array that all threads have whole, as arguments of hooks are."""
    return fragment.registers.item()


def asm(kind, operands, text, constraints, effects=False):
    """What inline assembly gives: a value of type `kind`, or nothing if that is None."""
    return llvm.inline_asm(kind, operands, text, constraints, has_side_effects=effects)


def results(count, kind, operands, text, constraints, effects=False):
    """The same with `count` values of type `kind`, a list."""
    if count == 1:
        return [asm(kind, operands, text, constraints, effects)]
    struct = llvm.StructType.get_literal([kind] * count)
    result = asm(struct, operands, text, constraints, effects)
    return [llvm.extractvalue(kind, result, [i]) for i in range(count)]


def fma(a, b, c):
    """The float a b + c, rounded once."""
    return asm(f32(), [a, b, c], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")


def rsqrt(x):
    """The float 1 / sqrt(x), approximately."""
    return asm(f32(), [x], "rsqrt.approx.f32 $0, $1;", "=f,f")


def raised(pair):
    """Two bfloat16 of a word times 2^64: exact; against products with codes that are subnormal."""
    return asm(i32(), [pair, int32(_RAISED)], "mul.bf16x2 $0, $1, $2;", "=r,r,r")
