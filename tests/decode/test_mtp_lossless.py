"""MTP drafts give, token for token, what plain decoding gives: greedy and sampled, on any mesh."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from decode.test_lossless import DRAWS, MAX_LEN, check_combination
from helpers import Decoder, tiny_model

from mimo_jax.drafter_config import MTPConfig

COMBINATIONS = [
    # devices, layout, batch, layers, chunk, kind of weights, hidden state normed
    (1, "tensor", 3, 3, 5, "float32", False),
    (1, "expert", 1, 1, 40, "float32", True),
    (1, "tensor", 4, 2, 1, "bfloat16", False),
    (1, "tensor", 2, 3, 23, "mxfp4", False),
    (2, "tensor", 1, 3, 17, "float32", True),
    (2, "expert", 4, 4, 6, "float32", False),
    (2, "expert", 2, 3, 33, "bfloat16", False),
    (4, "expert", 2, 3, 7, "float32", False),
    (4, "tensor", 1, 5, 19, "float32", False),
    (4, "tensor", 3, 2, 4, "mxfp4", True),
    (8, "tensor", 2, 3, 12, "float32", False),
    (8, "expert", 3, 3, 29, "float32", True),
    (8, "tensor", 1, 6, 8, "bfloat16", False),
    (8, "expert", 4, 1, 14, "mxfp4", False),
]
QUICK = 5
"""What the default suite has: on two devices, in the layout of whole experts."""


def build(number: int, rng: np.random.Generator) -> Decoder:
    """The program of a combination. Its shapes are always the same, its weights are drawn anew."""
    shards, layout, batch, layers, chunk, kind, normed = COMBINATIONS[number]
    shapes = np.random.default_rng(number)
    changes = {"sliding_window": 2 * layers + int(shapes.integers(4))}
    if kind == "mxfp4":
        width = 32 if layout == "expert" else 32 * shards
        changes |= {"expert_format": "mxfp4", "hidden_size": 64, "moe_intermediate_size": width}
    target = tiny_model(shapes, shards, **changes)
    return Decoder(
        rng,
        target,
        MTPConfig(target, layers, normed),
        shards=shards,
        layout=layout,
        batch=batch,
        max_len=MAX_LEN,
        block=layers + 1,
        chunk=chunk,
        dtype=jnp.bfloat16 if kind == "bfloat16" else jnp.float32,
    )


def test_mtp_equals_plain_decoding(rng):
    check_combination(rng, build(QUICK, rng), DRAWS // 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
def test_mtp_equals_plain_decoding_in_many_draws(number, rng):
    check_combination(rng, build(number, rng), 3 * DRAWS)


def test_combinations_cover_the_grid():
    devices, layouts, batches, layers, _, kinds, normed = zip(*COMBINATIONS, strict=True)
    assert set(itertools.product((1, 2, 4, 8), ("tensor", "expert"))) <= set(
        zip(devices, layouts, strict=True)
    )
    assert set(batches) == {1, 2, 3, 4} and set(layers) == set(range(1, 7))
    assert set(kinds) == {"float32", "bfloat16", "mxfp4"} and set(normed) == {False, True}
