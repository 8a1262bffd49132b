"""The programs of the router that test_router_h200.py compiles."""

import jax
import jax.numpy as jnp
from h200 import Case

from mimo_jax.decode.program import GPU_OPTIONS
from pallas_kernels.router import Routed, route
from pallas_kernels.router.shapes import SHAPES

LAYERS = 6


def abstract(name: str, t: int) -> tuple:
    """h, norm, weight, bias, live, counter."""
    shape = SHAPES[name]
    return (
        jax.ShapeDtypeStruct((t, shape.d), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.d,), jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.e, shape.d), jnp.float32 if shape.wide else jnp.bfloat16),
        jax.ShapeDtypeStruct((shape.e,), jnp.float32),
        jax.ShapeDtypeStruct((t,), jnp.bool_),
        jax.ShapeDtypeStruct((1,), jnp.uint32),
    )


def run(name: str, h, norm, weight, bias, live, counter) -> Routed:
    """The kernel, by name."""
    options = dict(live=live, counter=counter, implementation="mosaic_gpu")
    return route(h, norm, weight, bias, choices=SHAPES[name].c, epsilon=1e-5, **options)


def kernel(name: str, t: int) -> Case:
    """The kernel by itself, without dead rows."""
    h, norm, weight, bias, _, counter = abstract(name, t)

    def program(h, norm, weight, bias, counter):
        return run(name, h, norm, weight, bias, None, counter)

    return Case(jax.jit(program), (h, norm, weight, bias, counter))


def pro(mesh) -> Case:
    """A block of eight."""
    return kernel("pro", 8)


def pro_16(mesh) -> Case:
    """The most tokens."""
    return kernel("pro", 16)


def pro_wide(mesh) -> Case:
    """Weights in float32, the most registers."""
    return kernel("pro-wide", 16)


def flash(mesh) -> Case:
    """One token."""
    return kernel("flash", 1)


def nano(mesh) -> Case:
    """The shipped model: no clusters."""
    return kernel("nano", 3)


def loop(mesh) -> Case:
    """Layers in a while-loop, each adding to the stream, with dead rows."""
    h, norm, weight, bias, live, counter = abstract("pro", 8)

    def program(h, norm, layers, bias, live, rounds):
        def one_round(carry):
            left, h = carry
            for weight, counter in layers:
                x, ids, weights = run("pro", h, norm, weight, bias, live, counter)
                h = h + norm * (weights.sum() + ids.sum().astype(jnp.float32)).astype(x.dtype) * x
            return left - 1, h

        return jax.lax.while_loop(lambda carry: carry[0] > 0, one_round, (rounds, h))[1]

    rounds = jax.ShapeDtypeStruct((), jnp.int32)
    layers = [(weight, counter)] * LAYERS
    return Case(jax.jit(program), (h, norm, layers, bias, live, rounds), GPU_OPTIONS)
