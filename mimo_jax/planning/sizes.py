"""Bytes of a model's weights, caches and workspace on one device of a mesh, none of it allocated.

Weights and caches are the abstract parameters and the abstract state that the engine is built from,
divided by the same sharding table. The workspace is an estimate.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from mimo_jax.cache import ROWS, cache_rows
from mimo_jax.config import ModelConfig
from mimo_jax.decode.program import Plan, Settings, state_maker
from mimo_jax.decode.state import State, init_state
from mimo_jax.model.prefill_attention import MOST_DECODED, SMALL
from mimo_jax.planning.groups import group_of
from mimo_jax.sharding import AXIS

FULL, RINGS, CONTEXTS, TOKENS = "full attention", "sliding windows", "drafter's contexts", "tokens"


def abstract_mesh(devices: int) -> AbstractMesh:
    """A mesh of devices that need not be there."""
    return AbstractMesh((devices,), (AXIS,))


def needs(placed: Plan, settings: Settings) -> dict[str, dict[str, int]]:
    """Bytes on one device: of weights, caches and workspace, each by what takes them."""
    return {
        "weights": weights_of(placed),
        "caches": caches_of(placed, settings),
        "workspace": workspace_of(placed, settings),
    }


def total(parts: dict[str, dict[str, int]]) -> int:
    """Bytes of what `needs` gives."""
    return sum(sum(part.values()) for part in parts.values())


def weights_of(placed: Plan) -> dict[str, int]:
    """Bytes of the parameters on one device, by group."""
    sizes: dict[str, int] = {}
    parts = zip(placed.parts, placed.params, placed.param_shardings, strict=True)
    for part, state, where in parts:
        if state is None:
            continue
        placements = dict(nnx.to_flat_state(where))
        for path, variable in nnx.to_flat_state(state):
            group = group_of(f"{part}.{'.'.join(map(str, path))}")
            shape = placements[path].get_value().shard_shape(variable.shape)
            sizes[group] = sizes.get(group, 0) + _nbytes(shape, variable.dtype)
    return sizes


def caches_of(placed: Plan, settings: Settings) -> dict[str, int]:
    """Bytes of an empty state on one device, by kind."""
    state = jax.eval_shape(state_maker(placed, settings))
    return _by_kind(placed.config, state)


def _by_kind(config: ModelConfig, state: State) -> dict[str, int]:
    """Bytes of an abstract state on one device."""
    sizes = {FULL: 0, RINGS: 0}
    for layer, cache in enumerate(state.caches):
        sizes[FULL if config.attention(layer).window is None else RINGS] += _held(cache)
    if jax.tree.leaves(state.contexts):
        sizes[CONTEXTS] = _held(state.contexts)
    return sizes | {TOKENS: _held(dataclasses.replace(state, caches=(), contexts=()))}


def workspace_of(placed: Plan, settings: Settings) -> dict[str, int]:
    """An estimate of the program's temporaries on one device, in bytes by use.

    XLA gives the temporaries of a layer to the next one, so that one layer's count, the largest.
    Looked at are a prefill pass of a whole chunk and a verified block; the larger is returned:

    - "activations": the residual stream and its sums in float32, the tapped features twice;
    - "attention scores": float32 scores and weights over all rows of the largest cache, where they
      are kept: on CPUs, of blocks and of chunks that have few. GPUs other than Hoppers keep those
      of blocks, which is not counted;
    - "decoded weights": of one expert in float32, or of one FP8 projection;
    - "logits": of a block, from all devices, and what sampling makes of them.

    Held to what XLA reports for described H200s (tests/aot).
    """
    config = placed.config
    decoded = {"decoded weights": _decoded(placed, settings)}
    logits = {"logits": 6 * 4 * settings.batch * settings.block * config.vocab_size}
    passes = [
        _pass_workspace(placed, settings, settings.chunk) | decoded,
        _pass_workspace(placed, settings, settings.block) | decoded | logits,
    ]
    return max(passes, key=lambda uses: sum(uses.values()))


def longest_context(placed: Plan, settings: Settings, memory: int) -> int:
    """The largest max_len with which the model fits into that many bytes a device, or 0.

    It is at most the model's own context.
    """
    weights = sum(weights_of(placed).values())

    def needed(max_len: int) -> int:
        tried = dataclasses.replace(settings, max_len=max_len)
        caches, workspace = caches_of(placed, tried), workspace_of(placed, tried)
        return weights + sum(caches.values()) + sum(workspace.values())

    low, high = 0, placed.config.max_position_embeddings
    least, most = needed(low), needed(high)
    if most <= memory:
        return high
    # What is needed grows in a line, or in two: cutting the chord finds the place in a few steps.
    while least <= memory and high - low > 1:
        middle = low + int((memory - least) * (high - low) / (most - least))
        middle = min(max(middle, low + 1), high - 1)
        size = needed(middle)
        low, least, high, most = (
            (middle, size, high, most) if size <= memory else (low, least, middle, size)
        )
    return low


def token_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes that one more token takes in the caches, in one copy of each key/value head."""
    one, two = (_single(config, n * ROWS, dtype)[FULL] for n in (1, 2))
    return (two - one) // ROWS


def window_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes of all sliding windows, in one copy and without the rows that drafts need."""
    return _single(config, 1, dtype)[RINGS]


def _single(config: ModelConfig, max_len: int, dtype: Any) -> dict[str, int]:
    """Bytes of an empty state of one sequence on one device, with no drafts."""
    sizes = {"batch": 1, "max_len": max_len, "block": 1, "shards": 1, "dtype": dtype}
    return _by_kind(config, jax.eval_shape(partial(init_state, config, None, **sizes)))


def _pass_workspace(placed: Plan, settings: Settings, rows: int) -> dict[str, int]:
    """Temporaries of a pass over that many rows of each sequence, but for weights and logits."""
    config, tokens = placed.config, settings.batch * rows
    features = 2 * len(placed.taps) * jnp.dtype(settings.dtype).itemsize
    scores, on_cpu = 0, _on_cpu(placed)
    for attention in {config.attention(i) for i in range(config.num_hidden_layers)}:
        cached = cache_rows(attention, settings.max_len, settings.block)
        cached += 0 if attention.window is None else rows
        count = tokens * attention.num_heads // placed.shards * cached
        # As `attend_chunk` and `Attention.attend_cached` decide.
        kept = on_cpu and (rows <= MOST_DECODED or count <= SMALL)
        scores = max(scores, 2 * 4 * count * kept)
    return {
        "activations": tokens * config.hidden_size * (4 * 4 + features),
        "attention scores": scores,
    }


def _on_cpu(placed: Plan) -> bool:
    """Whether the mesh is of CPUs; an abstract one stands for GPUs."""
    mesh = placed.mesh
    return not isinstance(mesh, AbstractMesh) and mesh.devices.flat[0].platform == "cpu"


def _decoded(placed: Plan, settings: Settings) -> int:
    """Bytes of the largest weights that are decoded at a time."""
    sizes: dict[Any, int] = {}
    where = dict(nnx.to_flat_state(placed.param_shardings[0]))
    for path, variable in nnx.to_flat_state(placed.params[0]):
        shape = where[path].get_value().shard_shape(variable.shape)
        if "experts" in path and not path[-1].endswith("_scale"):
            codes = 2 if variable.dtype == jnp.uint8 else 1
            sizes[path[:-1]] = sizes.get(path[:-1], 0) + 4 * codes * math.prod(shape[1:])
        elif variable.dtype == jnp.float8_e4m3fn:
            sizes[path] = _nbytes(shape, settings.dtype)
    return max(sizes.values(), default=0)


def _held(tree: Any) -> int:
    """Bytes of abstract arrays on one device; those without a sharding lie whole on it."""
    leaves = jax.tree.leaves(tree)
    return sum(
        _nbytes(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape, leaf.dtype)
        for leaf in leaves
    )


def _nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize
