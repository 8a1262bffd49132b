"""The programs of the few-token linear that test_linear_h200.py compiles."""

import jax
import jax.numpy as jnp
from h200 import Case

from mimo_jax.decode.program import GPU_OPTIONS
from pallas_kernels.linear.mosaic_gpu import linear_mosaic
from pallas_kernels.linear.shapes import SHAPES, Shape

LAYERS = 6


def abstract(shape: Shape, t: int, norm: bool = False):
    """x, weight, scale and norm."""
    kind = jnp.float8_e4m3fn if shape.unit else jnp.bfloat16
    scale = None
    if shape.unit:
        scale = jax.ShapeDtypeStruct((shape.n // shape.unit, shape.d // 128), jnp.float32)
    return (
        jax.ShapeDtypeStruct((t, shape.d), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.n, shape.d), kind),
        scale,
        jax.ShapeDtypeStruct((shape.d,), jnp.bfloat16) if norm else None,
    )


def kernel(name: str, t: int, norm=False, ahead=None, **options) -> Case:
    """The kernel by itself."""

    def run(x, weight, scale, norm, ahead):
        return linear_mosaic(x, weight, scale, norm, 1e-5, None, ahead, **options)

    return Case(jax.jit(run), (*abstract(SHAPES[name], t, norm), ahead))


def qkv(mesh) -> Case:
    """FP8, all columns in a block."""
    return kernel("pro-qkv", 8)


def qkv_norm(mesh) -> Case:
    """The same with the norm before it."""
    return kernel("pro-qkv", 8, norm=True, out_dtype=jnp.bfloat16)


def qkv_16(mesh) -> Case:
    """In two launches: sixteen rows of that many columns are too many registers."""
    return kernel("pro-qkv", 16)


def o(mesh) -> Case:
    """Bfloat16."""
    return kernel("pro-o", 8, out_dtype=jnp.bfloat16)


def o_16(mesh) -> Case:
    """Sixteen tokens in one launch."""
    return kernel("pro-o", 16)


def o_fp8(mesh) -> Case:
    """FP8, several tiles a stage."""
    return kernel("pro-o-fp8", 1)


def flash_qkv_16(mesh) -> Case:
    """The most registers."""
    return kernel("flash-qkv", 16, norm=True)


def head(mesh) -> Case:
    """A ring that is used again."""
    return kernel("pro-head", 8)


def features(mesh) -> Case:
    """Columns divided among blocks, added by XLA."""
    return kernel("pro-draft-features", 8, out_dtype=jnp.bfloat16)


def nano(mesh) -> Case:
    """The shipped model."""
    return kernel("nano-up", 3)


def loop(mesh) -> Case:
    """Layers in a while-loop."""
    x, weight, _, norm = abstract(SHAPES["nano-o"], 8, True)

    def program(x, weights, norm, rounds):
        def one_round(carry):
            left, x = carry
            for weight in weights:
                y = linear_mosaic(x, weight, None, norm, 1e-5, out_dtype=jnp.bfloat16)
                x = x + y
            return left - 1, x

        return jax.lax.while_loop(lambda carry: carry[0] > 0, one_round, (rounds, x))[1]

    rounds = jax.ShapeDtypeStruct((), jnp.int32)
    return Case(jax.jit(program), (x, [weight] * LAYERS, norm, rounds), GPU_OPTIONS)


def ahead(mesh) -> Case:
    """With another matrix brought to the L2 cache."""
    weight = jax.ShapeDtypeStruct((3392, 6144), jnp.float8_e4m3fn)
    return kernel("pro-o", 8, ahead=weight, ahead_bytes=16 << 20)
