"""Training's attention, forwards and backwards, to be compiled for an H200."""

import jax
import jax.numpy as jnp
from h200 import Case

from mimo_jax.bench.train import CASES
from pallas_kernels.sequence_attention import sequence_attention

ROWS = 4


class _OnMesh:
    """A jitted function that is traced for the mesh's devices: Triton's lowering asks for them."""

    def __init__(self, function, mesh):
        self.function, self.mesh = function, mesh

    def trace(self, *arguments):
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self.function.trace(*arguments)


def _case(mesh, name: str, layer: int) -> Case:
    shapes, t = CASES[name].config.attention(layer), CASES[name].length
    k, g = shapes.num_kv_heads, shapes.num_heads // shapes.num_kv_heads
    sizes = [(ROWS, k, g, t, shapes.head_dim), (ROWS, k, t, shapes.head_dim)]
    sizes += [(ROWS, k, t, shapes.v_head_dim), (ROWS, k, g, t, shapes.v_head_dim)]
    q, keys, values, gradient = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in sizes)

    def both(q, keys, values, sink, gradient):
        def attend(*arrays):
            return sequence_attention(*arrays, window=shapes.window)

        out, backward = jax.vjp(attend, q, keys, values, sink)
        return out, *backward(gradient)

    sink = jax.ShapeDtypeStruct((k, g), jnp.float32)
    return Case(_OnMesh(jax.jit(both), mesh), (q, keys, values, sink, gradient))


def nano_full(mesh) -> Case:
    """mimo-nano's layer that sees everything."""
    return _case(mesh, "nano", 0)


def nano_window(mesh) -> Case:
    """mimo-nano's sliding layer."""
    return _case(mesh, "nano", 1)


def billion_full(mesh) -> Case:
    """The larger model's layer that sees everything."""
    return _case(mesh, "1b", 0)


def billion_window(mesh) -> Case:
    """The larger model's sliding layer."""
    return _case(mesh, "1b", 1)
