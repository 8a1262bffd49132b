"""What the attention layer's API checks, what it means, and when it is the kernel."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_layer_cases import SHAPES, Shape, distance, make, options

from pallas_kernels.attention import block_attention
from pallas_kernels.attention_layer import attention_layer
from pallas_kernels.choice import whole_layers
from pallas_kernels.linear import linear

SHAPE = Shape(256, 6, 2, 48, 32, 8, 24)
FLAGS = dict(flags=SHAPE.flags)


def test_the_reference_is_the_three_parts_one_after_another(rng):
    b, t = 2, 3
    a = make(rng, SHAPE, b, t, 37, 2)
    rows = a["h"].reshape(b * t, SHAPE.d)
    plain = dict(implementation="reference")
    product = linear(rows, a["qkv"], norm=a["norm"], epsilon=1e-5, **plain)
    names = ("cos", "sin", "keys", "values", "start", "live")
    heads, keys, values = block_attention(
        product.reshape(b, t, SHAPE.k, -1),
        *(a[name] for name in names),
        sink=a["sink"],
        window=SHAPE.window,
        value_scale=0.707,
        **plain,
    )
    y = linear(heads.reshape(b * t, -1).astype(jnp.bfloat16), a["output"], **plain)
    found = attention_layer(**a, **options(SHAPE, **FLAGS, **plain))
    assert distance(found[0].reshape(b * t, -1), y) < 1e-2
    for one, other in zip(found[1:], (keys, values), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    added, *_ = attention_layer(**a, **options(SHAPE, stream=True, **FLAGS, **plain))
    assert distance(added.reshape(b * t, -1), (rows + y).astype(jnp.float32)) < 1e-2
    assert distance(added, found[0]) > 0.1


def test_auto_takes_what_the_caller_has_instead(rng):
    a = make(rng, SHAPE, 1, 3, 37, 3)

    def elsewhere(h, *rest):
        return jnp.ones_like(h), rest[5], rest[6]

    for context in (whole_layers, contextlib.nullcontext):
        with context():
            y, *_ = attention_layer(**a, **options(SHAPE, **FLAGS, elsewhere=elsewhere))
        assert (y == 1).all()


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need jax >= 0.11.2")
@pytest.mark.parametrize("wanted", [False, True])
def test_the_kernel_is_taken_where_it_is_wanted(wanted, rng):
    shape = SHAPES["flash"]
    a = make(rng, shape, 1, 8, 200, 8)

    def run(arguments):
        return attention_layer(**arguments, **options(shape, flags=shape.flags))

    with whole_layers() if wanted else contextlib.nullcontext():
        text = jax.jit(run).trace(a).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) == wanted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(implementation="fast"), "implementation='fast' is not one of"),
        (dict(flags=None, implementation="mosaic_gpu"), "flags=None: use"),
        (dict(window=400), "a ring for window 400"),
        (dict(rows=9, implementation="mosaic_gpu"), "at most 8 rows, and flags; here are 9 rows"),
        (dict(word=4, implementation="mosaic_gpu"), "from word=4 on, a multiple of 4; here are"),
        (dict(word=2, implementation="mosaic_gpu"), "from word=2 on, a multiple of 4; here are"),
    ],
)
def test_arguments_that_do_not_fit(change, words, rng):
    change = dict(change)
    a = make(rng, SHAPE, 1, change.pop("rows", 3), 37, 3)
    with pytest.raises(ValueError, match=words):
        attention_layer(**a, **options(SHAPE, **FLAGS) | change)
