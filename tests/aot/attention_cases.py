"""The programs of decode attention that test_attention_h200.py compiles."""

import functools

import jax
import jax.numpy as jnp
from h200 import Case

from mimo_jax.bench.attention_jobs import layers
from mimo_jax.decode.program import GPU_OPTIONS
from pallas_kernels.attention.api import decode_attention
from pallas_kernels.attention.shapes import SHAPES

LAYERS = 6


def abstract(name: str, t: int, max_len: int, b: int = 1):
    """Queries, cache, start, live and sink."""
    shape = SHAPES[name]
    rows = shape.rows(max_len, 16)
    kind = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    number = jax.ShapeDtypeStruct((b,), jnp.int32)
    return (
        kind((b, t, shape.n, shape.h)),
        kind((b, shape.k, rows, shape.h)),
        kind((b, shape.k, rows, shape.v)),
        number,
        number,
        jax.ShapeDtypeStruct((shape.n,), jnp.float32) if shape.sink else None,
    )


def kernel(name: str, t: int, max_len: int = 1 << 20, b: int = 1) -> Case:
    """The kernel by itself."""

    def run(q, keys, values, start, live, sink):
        options = dict(window=SHAPES[name].window, sink=sink, implementation="mosaic_gpu")
        return decode_attention(q, keys, values, start, live, **options)

    return Case(jax.jit(run), abstract(name, t, max_len, b))


def ring_pro(mesh) -> Case:
    """A rank of eight, a block of 8."""
    return kernel("pro-tp8-window", 8)


def ring_nano(mesh) -> Case:
    """The shipped model."""
    return kernel("nano-window", 16, b=2)


def long_pro(mesh) -> Case:
    """A rank of eight, a block of 8, up to a million positions."""
    return kernel("pro-tp8-full", 8)


def long_pro_1(mesh) -> Case:
    """One token: one warpgroup multiplies."""
    return kernel("pro-tp8-full", 1)


def long_pro_16(mesh) -> Case:
    """Two passes over the cache."""
    return kernel("pro-tp8-full", 16)


def long_flash(mesh) -> Case:
    """Four key/value heads, two sequences."""
    return kernel("flash-full", 8, 8192, b=2)


def long_nano(mesh) -> Case:
    """The shipped model."""
    return kernel("nano-full", 16, 2048)


def chain(mesh, name: str) -> Case:
    """The benchmark's program: layers in a loop."""
    q, keys, values, start, live, sink = abstract(name, 8, 4096)
    run = functools.partial(layers.__wrapped__, way="kernel", window=SHAPES[name].window)
    arguments = q, [(keys, values)] * LAYERS, start, live, sink, None
    return Case(jax.jit(run), arguments, GPU_OPTIONS)


def rings_in_a_loop(mesh) -> Case:
    """Layers with windows."""
    return chain(mesh, "pro-tp8-window")


def long_in_a_loop(mesh) -> Case:
    """Layers without."""
    return chain(mesh, "pro-tp8-full")
