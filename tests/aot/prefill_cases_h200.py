"""The programs of prefill attention that test_prefill_h200.py compiles."""

import functools

import jax
import jax.numpy as jnp
from h200 import Case

from mimo_jax.bench.prefill import make_prefill
from mimo_jax.bench.rank_run import shorten
from mimo_jax.cache import LayerCache
from mimo_jax.decode.kernel_weights import kernel_plan
from mimo_jax.decode.program import Settings, make_plan, state_maker
from mimo_jax.decode.rank import rank_plan
from mimo_jax.model.prefill_attention import attend_chunk
from mimo_jax.planning.sizes import abstract_mesh
from mimo_jax.presets import drafter_preset, preset
from pallas_kernels.attention.shapes import SHAPES
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prefill_attention.mosaic_gpu import Launch, prefill_attention_mosaic


def kernel(name: str, t: int, rows: int, b: int = 1, launch: Launch | None = None) -> Case:
    """The kernel by itself."""
    shape = SHAPES[name]
    kind = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    number = jax.ShapeDtypeStruct((b,), jnp.int32)
    arguments = (
        kind((b, t, shape.n, shape.h)),
        kind((b, shape.k, rows, shape.h)),
        kind((b, shape.k, rows, shape.v)),
        number,
        number,
        number if shape.window else None,
        jax.ShapeDtypeStruct((shape.n,), jnp.float32) if shape.sink else None,
    )

    def run(q, keys, values, start, live, first, sink):
        if launch is not None:
            arguments = q, keys, values, start, live, first, sink
            return prefill_attention_mosaic(*arguments, window=shape.window, launch=launch)
        options = dict(first=first, window=shape.window, sink=sink)
        given = q, keys, values, start, live
        return prefill_attention(*given, **options, implementation="mosaic_gpu")

    return Case(jax.jit(run), arguments)


def rank_pro(mesh) -> Case:
    """The benchmark's program: three layers of one rank of eight, the drafter, 256 K tokens."""
    name = "mimo-v2.6-pro"
    config, drafter = shorten(preset(name), drafter_preset(name), 3)
    whole = make_plan(config, drafter, abstract_mesh(8), fp8=True, dtype=jnp.bfloat16)
    plan = rank_plan(kernel_plan(whole), mesh)
    settings = Settings(1, (1 << 18) + 64, 8, 2048, jnp.bfloat16)
    state = jax.eval_shape(state_maker(plan, settings))
    return Case(make_prefill(plan, state, 2048), (plan.params, state))


def full_pro(mesh) -> Case:
    """A rank of eight, 256 K positions and a block of slack that no tile divides."""
    return kernel("pro-tp8-full", 2048, (1 << 18) + 8)


def full_pro_3(mesh) -> Case:
    """Three warpgroups multiply."""
    launch = Launch(tile=64, turns=False, warpgroups=3)
    return kernel("pro-tp8-full", 2048, (1 << 18) + 8, launch=launch)


def window_pro(mesh) -> Case:
    """A rank of eight; ring and chunk by position."""
    return kernel("pro-tp8-window", 2048, 2304)


def full_flash(mesh) -> Case:
    """Four key/value heads, two sequences."""
    return kernel("flash-full", 512, 8192, b=2)


def full_nano(mesh) -> Case:
    """The shipped model."""
    return kernel("nano-full", 64, 2056)


def window_nano(mesh) -> Case:
    """The shipped model."""
    return kernel("nano-window", 64, 384, b=2)


def layers_pro(mesh) -> Case:
    """Two layers of each kind, one after the other, each with the chunk's rows and a cache."""
    t, max_len, block = 2048, 1 << 18, 8
    kind = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    shapes = [SHAPES[f"pro-tp8-{name}"] for name in ("window", "full", "window", "full")]

    def cache(shape):
        rows = shape.window + block - 1 if shape.window else max_len + block
        return LayerCache(kind((1, shape.k, rows, shape.h)), kind((1, shape.k, rows, shape.v)))

    one = shapes[0]
    chunk = kind((1, t, one.n, one.h)), kind((1, t, one.k, one.h)), kind((1, t, one.k, one.v))

    def run(q, k, v, caches, start, live, sink):
        written = []
        for shape, held in zip(shapes, caches, strict=True):
            given = q, k, v, held, start, live, shape.window
            held, heads = attend_chunk(*given, sink if shape.sink else None)
            q = q + jnp.pad(heads, ((0, 0), (0, 0), (0, 0), (0, one.h - one.v)))
            written.append(held)
        return q, written

    arguments = (
        *chunk, [cache(shape) for shape in shapes], jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1, t), jnp.bool_), jax.ShapeDtypeStruct((one.n,), jnp.float32),
    )  # fmt: skip
    return Case(jax.jit(run, donate_argnums=3), arguments)
