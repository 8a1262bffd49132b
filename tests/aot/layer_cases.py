"""The programs of the attention layer that test_attention_layer_h200.py compiles."""

import jax
import jax.numpy as jnp
from h200 import Case

from mimo_jax.decode.program import GPU_OPTIONS
from pallas_kernels.attention_layer import attention_layer, flag_words

LAYERS = 6


def abstract(d: int, heads: int, t: int, output_fp8: bool = False) -> dict:
    """Arguments of a layer of one rank of eight of Pro or Flash, by name."""

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, s, f32 = (heads + 1) * 192 + 128, 136, jnp.float32
    codes = jnp.float8_e4m3fn
    output_scale = array(d // 128, heads, dtype=f32) if output_fp8 else None
    return dict(
        h=array(1, t, d),
        norm=array(d),
        qkv=array(rows, d, dtype=codes),
        qkv_scale=array(rows // 64, d // 128, dtype=f32),
        cos=array(1, t, 32, dtype=f32),
        sin=array(1, t, 32, dtype=f32),
        keys=array(1, 1, s, 192),
        values=array(1, 1, s, 128),
        start=array(1, dtype=jnp.int32),
        live=array(1, dtype=jnp.int32),
        sink=array(heads),
        output=array(d, heads * 128, dtype=codes if output_fp8 else jnp.bfloat16),
        output_scale=output_scale,
        flags=array(flag_words(rows, heads * 128), dtype=jnp.uint32),
        ahead=array(384, d),
    )


def layer(arguments, **more):
    """One of them."""
    options = dict(window=128, value_scale=0.612, epsilon=1e-5, stream=True)
    options |= dict(implementation="mosaic_gpu") | more
    return attention_layer(**arguments, **options)


def pro(mesh) -> Case:
    """A block of eight."""
    return Case(jax.jit(layer), (abstract(6144, 16, 8),))


def pro_one(mesh) -> Case:
    """One token."""
    return Case(jax.jit(layer), (abstract(6144, 16, 1),))


def pro_part(mesh) -> Case:
    """One device's part of a sum: without the stream."""
    return Case(jax.jit(lambda given: layer(given, stream=False)), (abstract(6144, 16, 8),))


def pro_fp8(mesh) -> Case:
    """The output projection in FP8 too."""
    return Case(jax.jit(layer), (abstract(6144, 16, 8, True),))


def flash(mesh) -> Case:
    """MiMo-V2.6-Flash."""
    return Case(jax.jit(layer), (abstract(4096, 8, 8),))


def loop(mesh) -> Case:
    """Layers, in a loop that decides on the device when it ends."""

    def run(h, layers):
        def body(carry):
            count, h, caches = carry
            written = []
            for arguments, cache in zip(layers, caches, strict=True):
                y, *cache = layer(arguments | cache | dict(h=h), stream=False)
                h = h + y
                written.append(dict(zip(("keys", "values"), cache, strict=True)))
            return count + 1, h, written

        caches = [{name: a.pop(name) for name in ("keys", "values")} for a in layers]
        return jax.lax.while_loop(lambda c: c[0] < 9, body, (0, h, caches))

    layers = [abstract(6144, 16, 8) for _ in range(LAYERS)]
    h = [a.pop("h") for a in layers][0]
    return Case(jax.jit(run, donate_argnums=1), (h, layers), options=GPU_OPTIONS)
