"""The target's own answers to prompts from a corpus, made in large batches, as training rows."""

import dataclasses
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.config import ModelConfig
from mimo_jax.decode.program import Settings, make_plan, make_program, make_state
from mimo_jax.decode.sampling import Request
from mimo_jax.sharding import make_mesh

LENGTH = 512
"""Tokens of a row, prompt included."""


def generate_rows(
    shapes: ModelConfig,
    params: nnx.State,
    tokens: np.ndarray,
    count: int,
    seed: int,
    log: Callable,
    batch: int = 512,
) -> np.ndarray:
    """Continues random windows of the corpus, a third greedily and the rest at temperatures to 1.

    Args:
      shapes: of the target.
      params: dense parameters of one device.
      tokens: the corpus.
      count: rows wanted; rounded up to whole batches.
      seed: of windows and noise.
      log: gets (rows done, measurements).
      batch: rows generated at once, at most.

    Returns:
      uint16 rows [n, LENGTH], each 64 to 256 tokens of prompt and then the target's answer. No
      token ends a row early: what follows an end of text is trained on too, as in the corpus.
    """
    batch = min(batch, count)
    plan = make_plan(shapes, None, make_mesh(1), packed=False, dtype=params["embedding"].dtype)
    settings = Settings(batch=batch, max_len=LENGTH, block=1, chunk=64, dtype=jnp.bfloat16)
    program = make_program(plan, settings)
    random = np.random.default_rng(seed)
    done, start = [], time.perf_counter()
    for number in range(-(-count // batch)):
        starts = random.integers(0, len(tokens) - LENGTH, batch)
        lengths = random.integers(64, 257, batch).astype(np.int32)
        rows = np.zeros((batch, LENGTH + settings.block), np.int32)
        for row, first, length in zip(rows, starts, lengths, strict=True):
            row[:length] = tokens[first : first + length]
        temperature = random.uniform(0.3, 1.0, batch) * (random.random(batch) > 1 / 3)
        request = Request(
            limit=jnp.full(batch, LENGTH, jnp.int32),
            pause=jnp.full(batch, LENGTH, jnp.int32),
            eos=jnp.full(1, -1, jnp.int32),
            temperature=jnp.asarray(temperature, jnp.float32),
            top_p=jnp.full(batch, 0.95, jnp.float32),
            top_k=jnp.zeros(batch, jnp.int32),
            seed=jnp.uint32(seed),
            sequence=jnp.arange(batch, dtype=jnp.int32) + number * batch,
            max_draft=jnp.int32(0),
        )
        state = make_state(plan, settings)
        state = dataclasses.replace(state, tokens=jnp.asarray(rows), length=jnp.asarray(lengths))
        state = program((params, None), state, request)
        done.append(np.asarray(state.tokens)[:, :LENGTH].astype(np.uint16))
        log(
            len(done) * batch,
            {"generated_rows": len(done) * batch, "seconds": time.perf_counter() - start},
        )
    return np.concatenate(done)
