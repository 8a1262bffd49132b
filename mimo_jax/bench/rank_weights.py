"""Random parameters and caches of a rank, made on its device in the formats of released files.

Sizes of values are chosen so that activations stay of order one through any number of layers, and
so that the rows of a block stay independent: tokens differ by embeddings of order one, to which
attention, alike for neighbours, adds little. The drafter's masked rows differ by their positions
alone: its queries are long, and only in the dimensions that turn fastest with the position, so that
each row looks at few others, and neighbours at different ones.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.bench.kernel_jobs import random_words
from mimo_jax.decode.program import Plan, Settings, make_state
from mimo_jax.decode.state import State
from mimo_jax.quant import fp8

QUIET = 0.2
"""Of a target's attention and dense MLP outputs against its stream."""
LONG = 8.0
"""Standard deviation of a drafter's attention scores."""
FAST = 2
"""Pairs of dimensions that a drafter's queries have: those that turn fastest."""
ABSOLUTE = {"embedding": 1.0, "sink": 1.0, "mask_embedding": 0.02}
"""Standard deviations; other matrices' are in proportion to their columns' square root."""
LEAST_SCALE, SCALES = 118, 4
"""Exponents of MXFP4 blocks: 2^-9 to 2^-6, with which experts of all our shapes answer below 1."""


def random_params(plan: Plan, seed: int) -> tuple[nnx.State, nnx.State | None]:
    """Parameters of target and drafter, layer after layer; experts once, in the order of the plan.

    Args:
      plan: on devices that are there.
      seed: of the values.
    """
    model, drafter = plan.modules(plan.params)
    queries = {} if drafter is None else _queries(plan)
    cuts = [layer.ffn.experts.plans if layer.sparse else None for layer in model.layers]
    key, made = jax.random.key(seed), []
    for part, state, where in zip(plan.parts, plan.params, plan.param_shardings, strict=True):
        if state is None:
            made.append(None)
            continue
        places = dict(nnx.to_flat_state(where))
        leaves = []
        for number, (path, leaf) in enumerate(nnx.to_flat_state(state)):
            key_here = jax.random.fold_in(jax.random.fold_in(key, len(made)), number)
            recipe = queries.get(path[-2:]) or _recipe(part, path, leaf, cuts)
            maker = _maker(recipe, leaf.shape, leaf.dtype, places[path].get_value())
            # One after the other: making an array takes more memory than it has.
            leaves.append((path, leaf.replace(jax.block_until_ready(maker(key_here)))))
        made.append(nnx.from_flat_state(leaves))
    return made[0], made[1]


def _queries(plan: Plan) -> dict[tuple[str, str], tuple]:
    """What a DFlash drafter's queries are multiplied with."""
    attention = plan.drafter.attention
    half = attention.rotary_dim // 2
    pairs = range(min(FAST, half))
    size = LONG * math.sqrt(attention.head_dim / (2 * len(pairs)))
    return {("query_norm", "weight"): ("some", (*pairs, *(half + i for i in pairs)), size)}


def _recipe(part: str, path: tuple, leaf: Any, cuts: list) -> tuple:
    """What a parameter is filled with: a kind of values, and their size."""
    name, target = path[-1], part == "target"
    if "experts" in path:
        if leaf.dtype == jnp.uint32 and name != "barrier":
            return "words", cuts[path[1]][name == "down"]
        kind = "scales" if name.endswith("_scale") else "bits"
        return ("constant", 0) if name == "barrier" else (kind,)
    if name == "bias":
        return "constant", 0
    if name == "context_norms" or name == "weight" and "router" not in path:
        return "constant", 1
    columns = leaf.shape[-1] * (fp8.TILE if name.endswith("_scale") else 1)
    quiet = target and name.removesuffix("_scale") in ("output", "down")
    size = ABSOLUTE.get(name, (QUIET if quiet else 1.0) / math.sqrt(columns))
    if name.endswith("_scale"):
        return "constant", size
    return "normal", 1.0 if leaf.dtype == fp8.CODES else size


@functools.cache
def _maker(recipe: tuple, shape: tuple[int, ...], dtype: Any, sharding: Any):
    """A jitted function of a key; all layers' parameters of one kind have the same."""
    kind, *size = recipe

    def make(key):
        if kind == "constant":
            return jnp.full(shape, size[0], dtype)
        if kind == "some":
            return jnp.zeros(shape, dtype).at[jnp.array(size[0])].set(size[1])
        if kind == "words":
            return random_words(key, shape, size[0])
        if kind == "bits":
            return jax.random.bits(key, shape, dtype)
        if kind == "scales":
            least = LEAST_SCALE
            return jax.random.randint(key, shape, least, least + SCALES).astype(dtype)
        return (jax.random.normal(key, shape) * size[0]).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def random_state(plan: Plan, settings: Settings, context: int, seed: int) -> State:
    """The engine's state as if `context` tokens had been read: caches full of noise.

    Args:
      plan: on devices that are there.
      settings: of the program.
      context: tokens; all but the newest are cached.
      seed: of the values.
    """
    state, keys = make_state(plan, settings), iter(jax.random.split(jax.random.key(seed), 4096))

    def noise(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        made = _maker(("normal", 1.0), leaf.shape, leaf.dtype, leaf.sharding)(next(keys))
        leaf.delete()
        return jax.block_until_ready(made)

    caches, contexts = jax.tree.map(noise, (state.caches, state.contexts))
    rows = plan.params[0]["embedding"].shape[0]
    draw = jax.jit(
        lambda key: jax.random.randint(key, state.tokens.shape, 0, rows),
        out_shardings=state.tokens.sharding,
    )
    state = dataclasses.replace(state, tokens=draw(next(keys)), caches=caches, contexts=contexts)
    return at(state, context)


def at(state: State, context: int) -> State:
    """The state with so many tokens, no rounds counted; rows of caches stay as they are."""
    fields = {
        "length": jnp.full_like(state.length, context),
        "cached": jnp.full_like(state.cached, context - 1),
        "done": jnp.zeros_like(state.done),
        "histogram": jnp.zeros_like(state.histogram),
    }
    places = {name: getattr(state, name).sharding for name in fields}
    return dataclasses.replace(state, **jax.device_put(fields, places))
