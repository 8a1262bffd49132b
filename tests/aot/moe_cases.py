"""The programs of router and experts in one launch that test_moe_layer_h200.py compiles."""

import functools

import jax
import jax.numpy as jnp
from cases import abstract
from h200 import Case
from jax.sharding import PartitionSpec as P

from mimo_jax.decode.program import GPU_OPTIONS
from pallas_kernels.expert_ffn.shapes import SHAPES
from pallas_kernels.moe_layer import moe_layer

LAYERS = 6


def arguments(name: str, t: int, wide: bool = False) -> dict:
    """A layer's, by name."""
    shape = SHAPES[name]
    x, weights, *_ = abstract(shape, t)

    def array(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    return dict(
        h=x,
        norm=array(shape.d),
        router=array(shape.e, shape.d, dtype=jnp.float32 if wide else jnp.bfloat16),
        bias=array(shape.e, dtype=jnp.float32),
        weights=weights,
        live=array(t, dtype=jnp.bool_),
        ahead=array(3392, shape.d, dtype=jnp.float8_e4m3fn),
    )


def layer(given, choices=8):
    """One of them."""
    return moe_layer(**given, choices=choices, epsilon=1e-5, scale=2.5, implementation="mosaic_gpu")


def case(name: str, t: int, wide: bool = False) -> Case:
    """A layer by itself."""
    choices = SHAPES[name].c
    return Case(jax.jit(lambda given: layer(given, choices)), (arguments(name, t, wide),))


def pro(mesh) -> Case:
    """A rank of eight, a block of eight."""
    return case("pro-tp8", 8)


def pro_one(mesh) -> Case:
    """One token."""
    return case("pro-tp8", 1)


def flash(mesh) -> Case:
    """Sixteen warps."""
    return case("flash-tp8", 8)


def nano(mesh) -> Case:
    """The shipped model, whose router is float32."""
    return case("nano", 8, wide=True)


def loop(mesh) -> Case:
    """Layers, in a loop that decides on the device when it ends."""

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def run(h, layers):
        def body(carry):
            count, h = carry
            for given in layers:
                h = layer(given | dict(h=h))
            return count + 1, h

        return jax.lax.while_loop(lambda c: c[0] < 9, body, (0, h))

    layers = [arguments("pro-tp8", 8) for _ in range(LAYERS)]
    h = [a.pop("h") for a in layers][0]
    return Case(jax.jit(run), (h, layers), options=GPU_OPTIONS)
