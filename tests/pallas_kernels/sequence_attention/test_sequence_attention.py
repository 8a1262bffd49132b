"""Attention of whole sequences: the kernels, interpreted, against all scores at once in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sequence_attention import TILE, sequence_attention
from tests.tolerances import relative_norm


def draw(rng, b, k, g, t, h, v, dtype=jnp.float32):
    """Random q, k, v, sinks, and what the outputs' gradient is."""
    shapes = (b, k, g, t, h), (b, k, t, h), (b, k, t, v), (b, k, g, t, v)
    q, keys, values, aim = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    return q, keys, values, jnp.asarray(rng.standard_normal((k, g)), jnp.float32), aim


def both(implementation, window, q, keys, values, sink, aim):
    """Outputs and gradients."""

    def value(*arrays):
        out = sequence_attention(*arrays, window=window, implementation=implementation)
        return (out * aim).sum(dtype=jnp.float32), out

    (_, out), gradients = jax.jit(jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True))(
        q, keys, values, sink
    )
    return out, *gradients


@pytest.mark.parametrize("window", [None, 5, TILE, TILE + 37])
def test_outputs_and_gradients(window, rng):
    given = draw(rng, 2, 2, 3, 3 * TILE, 12, 6)
    ours, theirs = (both(name, window, *given) for name in ("interpreted", "reference"))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.shape == expected.shape and relative_norm(mine, expected) < 1e-5


def test_arrays_that_the_kernels_do_not_take(rng):
    q, keys, values, sink, _ = draw(rng, 1, 1, 2, TILE, 8, 4)
    with pytest.raises(ValueError, match="is not one of"):
        sequence_attention(q, keys, values, sink, implementation="cuda")
    with pytest.raises(ValueError, match=f"a multiple of {TILE}"):
        sequence_attention(q[..., 1:, :], keys[..., 1:, :], values[..., 1:, :], sink)
    with pytest.raises(ValueError, match="the same for all"):
        sequence_attention(q.astype(jnp.bfloat16), keys, values, sink)
    wide = draw(rng, 1, 1, 2, TILE, 136, 4)[:4]
    with pytest.raises(ValueError, match="at most 128"):
        sequence_attention(*wide)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(("h", "v"), [(48, 32), (96, 64)])
def test_on_a_gpu(window, h, v, rng):
    """In bfloat16, about as far from float32 as rounding takes it; the same bits every time."""
    given = draw(rng, 2, 2, 4, 1024, h, v, jnp.bfloat16)
    ours, again, theirs = (both(name, window, *given) for name in ("triton", "triton", "reference"))
    for mine, repeated, expected in zip(ours, again, theirs, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(repeated))
        assert relative_norm(mine, expected) < 2e-2
