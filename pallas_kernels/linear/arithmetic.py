"""What a lane computes in registers: squares, the norm, decoded codes, products; in PTX."""

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx

# Decoded FP8 codes are bfloat16 times 2^-120 (their exponent field holds 4 bits, of another bias);
# x is raised by 2^64 (exact) so that no product is subnormal, scales by the rest.
_REST = 2.0**56

# A word of four codes, bytes 0 to 3: `odd` gets the pair (1, 3), `even` the pair (0, 2), each with
# its sign in bit 15 and its other bits from bit 10 down, subnormal codes as subnormal bfloat16.
_DECODE = """
shr.u32 t, w, 4;
and.b32 t, t, 0x07F007F0;
lop3.b32 odd, t, w, 0x80008000, 0xF8;
shl.b32 u, w, 8;
shl.b32 t, w, 4;
and.b32 t, t, 0x07F007F0;
lop3.b32 even, t, u, 0x80008000, 0xF8;
"""
DECODE_ASM = (
    "{\n.reg .b32 t, u, w, odd, even;\nmov.b32 w, $2;"
    + _DECODE
    + "mov.b32 $0, odd;\nmov.b32 $1, even;\n}"
)
"""From a word of codes to its pairs of columns 1 and 3, and 0 and 2."""
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
_NORM_PAIR = (
    "{\n.reg .b32 p, lo, hi;\n.reg .f32 a, b;\nshl.b32 lo, $1, 16;\nand.b32 hi, $1, 0xFFFF0000;\n"
    "mov.b32 a, lo;\nmov.b32 b, hi;\nmul.rn.f32 a, a, $2;\nmul.rn.f32 b, b, $2;\n"
    "cvt.rn.bf16x2.f32 p, b, a;\nmul.bf16x2 $0, p, $3;\n}"
)
_SQUARES = (
    "{\n.reg .b32 lo, hi;\n.reg .f32 a, b, s;\nshl.b32 lo, $1, 16;\nand.b32 hi, $1, 0xFFFF0000;\n"
    "mov.b32 a, lo;\nmov.b32 b, hi;\nfma.rn.f32 s, a, a, $2;\nfma.rn.f32 $0, b, b, s;\n}"
)


def sum_of_squares(words):
    """Of the bfloat16 in a token's words, over the four lanes that hold its others."""
    total = ptx.float32(0.0)
    for word in words:
        total = ptx.asm(ptx.f32(), [word, total], _SQUARES, "=f,r,f")
    for step in (1, 2):
        text = f"shfl.sync.bfly.b32 $0, $1, {step}, 31, -1;"
        total = arith.addf(total, ptx.asm(ptx.f32(), [total], text, "=f,f", effects=True))
    return total


def norm_scale(total, columns, epsilon):
    """One over the root mean square of a row, from its sum of squares."""
    mean = arith.mulf(total, ptx.float32(1.0 / columns))
    return ptx.rsqrt(arith.addf(mean, ptx.float32(epsilon)))


def norm_pair(word, scale, weight):
    """Two bfloat16 of a word times the row's scale, rounded, times the norm's weights."""
    return ptx.asm(ptx.i32(), [word, scale, weight], _NORM_PAIR, "=r,r,f,r")


def operands(words, fp8):
    """Words of x in the order in which products take them; raised, where weights are codes."""
    if not fp8:
        starts = range(0, len(words), 4)
        return [words[start + i] for start in starts for i in (0, 2, 1, 3)]
    found = []
    for low, high in zip(words[::2], words[1::2], strict=True):
        for selector in ("0x7632", "0x5410"):
            text = f"prmt.b32 $0, $1, $2, {selector};"
            found.append(ptx.raised(ptx.asm(ptx.i32(), [low, high], text, "=r,r,r")))
    return found


def quads(words):
    """Sixteen codes of row g as the weights of two products: of words 0 and 1, of words 2 and 3."""
    pairs = [ptx.results(2, ptx.i32(), [word], DECODE_ASM, "=&r,=r,r") for word in words]
    return [(a[0], b[0], a[1], b[1]) for a, b in (pairs[:2], pairs[2:])]


def product(a, b, c):
    """A warp's product of 16 x 16 and 16 x 8 bfloat16 plus c; fragments as PTX has them."""
    assert len(a) == 4 and len(b) == 2
    constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
    return ptx.results(4, ptx.f32(), [*a, *b, *c], _MMA, constraints)


def rest(scale):
    """The scale of a product whose codes were decoded and whose x is raised."""
    return arith.mulf(scale, ptx.float32(_REST))


def accumulate(total, values, scale):
    """total + values * scale, in one rounding each."""
    if scale is None:
        if total is None:
            return list(values)
        return [arith.addf(a, b) for a, b in zip(total, values, strict=True)]
    if total is None:
        return [arith.mulf(value, scale) for value in values]
    return [ptx.fma(value, scale, old) for old, value in zip(total, values, strict=True)]
