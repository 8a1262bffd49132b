"""The programs of decode attention that test_attention_h200.py compiles."""

import functools

import jax
import jax.numpy as jnp
from h200 import Case

from mimo_jax.bench.attention_block_jobs import block_layers
from mimo_jax.bench.attention_jobs import layers
from mimo_jax.decode.program import GPU_OPTIONS
from mimo_jax.presets import drafter_preset
from pallas_kernels.attention.api import (
    block_attention,
    decode_attention,
    draft_attention,
    write_context,
)
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


def abstract_block(name: str, t: int, half: int, rows: int, b: int = 1):
    """The product, angles, start, live and sink; and a cache."""
    shape = SHAPES[name]
    kind = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    number = jax.ShapeDtypeStruct((b,), jnp.int32)
    angles = jax.ShapeDtypeStruct((b, t, half), jnp.float32)
    width = shape.n // shape.k * shape.h + shape.h + shape.v
    sink = kind((shape.n,)) if shape.sink else None
    cache = tuple(kind((b, shape.k, rows, d)) for d in (shape.h, shape.v))
    return kind((b, t, shape.k, width)), angles, angles, number, number, sink, cache


def block(name: str, t: int, half: int, max_len: int = 4096, b: int = 1) -> Case:
    """The fused kernels by themselves, on donated caches."""
    rows = SHAPES[name].rows(max_len, 16)
    qkv, cos, sin, start, live, sink, cache = abstract_block(name, t, half, rows, b)

    def run(qkv, cos, sin, keys, values, start, live, sink):
        options = dict(window=SHAPES[name].window, sink=sink, value_scale=0.707)
        return block_attention(
            qkv, cos, sin, keys, values, start, live, **options, implementation="mosaic_gpu"
        )

    arguments = qkv, cos, sin, *cache, start, live, sink
    return Case(jax.jit(run, donate_argnums=(3, 4)), arguments)


def block_ring_pro(mesh) -> Case:
    """A rank of eight, a block of 8."""
    return block("pro-tp8-window", 8, 32)


def block_ring_pro_16(mesh) -> Case:
    """The most rows."""
    return block("pro-tp8-window", 16, 32)


def block_ring_pro_1(mesh) -> Case:
    """One row."""
    return block("pro-tp8-window", 1, 32)


def block_ring_flash(mesh) -> Case:
    """Several key/value heads and sequences."""
    return block("flash-window", 8, 32, b=2)


def block_ring_nano(mesh) -> Case:
    """The shipped model: pairs of neighbouring lanes."""
    return block("nano-window", 8, 8)


def block_long_pro(mesh) -> Case:
    """A layer without a window."""
    return block("pro-tp8-full", 8, 32)


def block_long_flash(mesh) -> Case:
    """Several key/value heads and sequences, one row each."""
    return block("flash-full", 1, 32, b=2)


def block_long_nano(mesh) -> Case:
    """The shipped model."""
    return block("nano-full", 8, 8)


def block_chain(mesh, name: str, rows: int) -> Case:
    """The benchmark's program: layers in a loop whose carry their caches are, and donated."""
    qkv, cos, sin, start, live, sink, cache = abstract_block(name, 8, 32, rows)
    run = functools.partial(block_layers.__wrapped__, way="kernel", window=SHAPES[name].window)
    arguments = qkv, cos, sin, [cache] * LAYERS, start, live, sink
    return Case(jax.jit(run, donate_argnums=3), arguments, GPU_OPTIONS)


def block_rings_in_a_loop(mesh) -> Case:
    """Layers with windows."""
    return block_chain(mesh, "pro-tp8-window", 135)


def block_long_in_a_loop(mesh) -> Case:
    """Layers without."""
    return block_chain(mesh, "pro-tp8-full", 4160)


def draft(config, n: int, k: int, b: int = 1, t: int = 0) -> Case:
    """A drafter's kernel, with n query and k key/value heads; a block is its own if t is 0."""
    kind = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    attention, h, t = config.attention, config.head_dim, t or config.block_size
    angles = jax.ShapeDtypeStruct((b, t, attention.rotary_dim // 2), jnp.float32)
    qkv, held = kind((b, t, k, (n // k + 2) * h)), kind((b, k, attention.window + t - 1, h))
    start = jax.ShapeDtypeStruct((b,), jnp.int32)
    options = dict(value_scale=attention.value_scale, epsilon=config.rms_norm_eps)

    def run(*arguments):
        *arrays, sink = arguments
        options["window"], options["sink"] = attention.window, sink
        return draft_attention(*arrays, **options, implementation="mosaic_gpu")

    norm, sink = kind((h,)), kind((n,))
    return Case(jax.jit(run), (qkv, norm, norm, angles, angles, held, held, start, sink))


def context_pro(mesh) -> Case:
    """A rank of eight of MiMo-V2.6-Pro: the drafter's contexts, which are donated."""
    config = drafter_preset("mimo-v2.6-pro")
    kind = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    attention, h, t = config.attention, config.head_dim, config.block_size
    layers, options = config.num_hidden_layers, dict(value_scale=0.612, epsilon=1e-5)
    angles = jax.ShapeDtypeStruct((1, t, attention.rotary_dim // 2), jnp.float32)
    rings = (kind((1, 1, attention.window + t - 1, h)),) * layers
    number, kv = jax.ShapeDtypeStruct((1,), jnp.int32), kind((1, t, layers, 1, 2 * h))
    run = functools.partial(write_context, **options, implementation="mosaic_gpu")
    arguments = kv, kind((layers, h)), angles, angles, rings, rings, number, number
    return Case(jax.jit(run, donate_argnums=(4, 5)), arguments)


def draft_pro(mesh) -> Case:
    """A rank of eight of MiMo-V2.6-Pro."""
    config = drafter_preset("mimo-v2.6-pro")
    return draft(config, config.num_attention_heads // 8, 1)


def draft_pro_16(mesh) -> Case:
    """The most rows."""
    config = drafter_preset("mimo-v2.6-pro")
    return draft(config, config.num_attention_heads // 8, 1, t=16)


def draft_flash(mesh) -> Case:
    """One device with all heads."""
    config = drafter_preset("mimo-v2.6-flash")
    return draft(config, config.num_attention_heads, config.num_key_value_heads)


def draft_nano(mesh) -> Case:
    """The shipped drafter."""
    config = drafter_preset("mimo-nano")
    return draft(config, config.num_attention_heads, config.num_key_value_heads, b=2)
