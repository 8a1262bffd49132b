"""Training the DFlash drafter on the frozen target's features: random anchors, weighted loss.

Sources: DFlash, arXiv 2602.06036, appendix A.1; D-PACE, arXiv 2605.18810, for the weights by
confidence; mixtures of cross-entropy and total variation, DSpark, arXiv 2607.05147.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax.cache import LayerCache
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.model.dflash import DraftBlock, Drafter, seen_rows
from mimo_jax.model.mimo import MiMo, head_logits, tap
from mimo_jax.sharding import Parallel
from mimo_jax.train.pretrain import TrainState, accumulate, cross_entropy, in_chunks, run_sequences

_ANCHORS_AT_ONCE = 32
"""Of a row, whose scores against all of it exist at once in a layer of full attention."""


@dataclasses.dataclass(frozen=True)
class DraftRecipe:
    """How a drafter's step computes.

    Attributes:
      weighting: of a block's slots: "decay", "flat" or "dpace".
      gamma: decay: slot k weighs exp(-(k - 1) / gamma).
      alpha: dpace: share of 1 in every confidence.
      loss: "ce", or "tv" or "kl" mixed with it.
      ce_share: of the cross-entropy in such a mixture.
      anchors: in 1024 tokens of a row.
      far: share of the anchors that lie beyond four windows, in rows that are longer; without a
        window they lie anywhere.
      dtype: of the forward and backward pass.
      accumulate: parts that a batch is taken in.
      chunk: anchors of a row whose logits exist at once; 0 is all.
      capacity: places of the target's experts, times the mean load.
      attention: implementation of `attend_sequence`, for the target.
    """

    weighting: str = "decay"
    gamma: float = 4.0
    alpha: float = 0.5
    loss: str = "ce"
    ce_share: float = 0.1
    anchors: int = 64
    far: float = 0.0
    dtype: jnp.dtype = jnp.dtype(jnp.bfloat16)
    accumulate: int = 1
    chunk: int = 0
    capacity: float = 3.0
    attention: str = "blocks"


def draw_anchors(
    key: Array, trained: Bool[Array, "b t"], anchors: int, block: int, start: int = 1
) -> tuple[Int32[Array, "b a"], Bool[Array, "b 1"]]:
    """Random anchor positions, each with a token before it and a whole block behind it.

    Args:
      key: of the draw.
      trained: which tokens are to be predicted; an anchor's next one is.
      anchors: how many of each row.
      block: rows of a block, the anchor's included.
      start: no anchor lies before it.

    Returns:
      the positions; and whether a row has any: if not, its positions mean nothing.
    """
    t = trained.shape[1]
    places = jnp.arange(t, dtype=jnp.int32)
    after = jnp.roll(trained, -1, axis=1)
    allowed = after & (places >= max(start, 1)) & (places <= t - block)
    # Ranks of the allowed places, and the place of a random rank.
    count = allowed.sum(axis=1, keepdims=True, dtype=jnp.int32)
    ranks = jnp.cumsum(allowed.astype(jnp.int32), axis=1)
    uniform = jax.random.uniform(key, (trained.shape[0], anchors))
    wanted = jnp.minimum((uniform * count.astype(jnp.float32)).astype(jnp.int32), count - 1) + 1
    found = jax.vmap(lambda row, rank: jnp.searchsorted(row, rank))(ranks, wanted)
    return jnp.clip(found, 1, t - block).astype(jnp.int32), count > 0


def place_anchors(
    key: Array, trained: Bool[Array, "b t"], recipe: DraftRecipe, block: int, window: int | None
) -> tuple[Int32[Array, "b a"], Bool[Array, "b a"]]:
    """A step's anchors: `recipe.far` of them beyond four windows, if rows reach so far."""
    t = trained.shape[1]
    total = max(1, recipe.anchors * t // 1024)
    beyond = 4 * window if window else t
    far = round(recipe.far * total) if beyond < t - block else 0
    first, second = jax.random.split(key)
    parts = [draw_anchors(first, trained, total - far, block)] if total > far else []
    if far:
        parts.append(draw_anchors(second, trained, far, block, beyond))
    places = jnp.concatenate([places for places, _ in parts], axis=1)
    counted = [jnp.broadcast_to(any_, places.shape) for places, any_ in parts]
    return places, jnp.concatenate(counted, axis=1)


def draft_hidden(
    drafter: Drafter,
    embedding: Float[Array, "w d"],
    features: Float[Array, "b t _"],
    tokens: Int32[Array, "b t"],
    anchors: Int32[Array, "b a"],
    block: int,
) -> Float[Array, "b a block d"]:
    """The drafter's rows for a block at each anchor, as decoding would compute them."""
    length = features.shape[1]
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), anchors.shape[:1] + (length,))
    anchor = embedding[jnp.take_along_axis(tokens, anchors, axis=1)]
    h = drafter.block(anchor.reshape(-1, anchor.shape[-1]), block)
    h = h.reshape(*anchors.shape, block, -1)
    contexts = drafter.context(features, places, Parallel())
    for layer, (keys, values) in zip(drafter.layers, contexts, strict=True):
        sees = _see_windows if layer.attention.config.window else _see_all
        h = sees(layer, h, anchors, keys, values)
    return drafter.norm(h)


def _see_windows(
    layer: DraftBlock,
    h: Float[Array, "b a block d"],
    anchors: Int32[Array, "b a"],
    keys: Float[Array, "b t k h"],
    values: Float[Array, "b t k v"],
) -> Float[Array, "b a block d"]:
    """A layer with a window: each anchor is a sequence of its own, with the window before it."""
    window, length = layer.attention.config.window, keys.shape[1]
    places = anchors[..., None] - window + jnp.arange(window, dtype=jnp.int32)
    rows, sequence = jnp.clip(places, 0, length - 1), jnp.arange(anchors.shape[0])[:, None, None]

    def windows(x: Float[Array, "b t k h"]) -> Float[Array, "ba k s h"]:
        # Many windows see a row: backwards their gradients are added up, and that in float32.
        gathered = x.astype(jnp.float32)[sequence, rows].astype(x.dtype)
        return gathered.reshape(-1, window, *x.shape[2:]).transpose(0, 2, 1, 3)

    start, places = anchors.reshape(-1), places.reshape(-1, window)
    positions = start[:, None] + jnp.arange(h.shape[2], dtype=jnp.int32)
    visible = seen_rows(places, start, positions, window)
    context = LayerCache(windows(keys), windows(values))
    flat = h.reshape(-1, *h.shape[2:])
    return layer(flat, positions, context, visible, Parallel()).reshape(h.shape)


def _see_all(
    layer: DraftBlock,
    h: Float[Array, "b a block d"],
    anchors: Int32[Array, "b a"],
    keys: Float[Array, "b t k h"],
    values: Float[Array, "b t k v"],
) -> Float[Array, "b a block d"]:
    """A layer of full attention: anchors of a row share its keys and values, some at a time."""
    context = LayerCache(keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3))
    places = jnp.arange(keys.shape[1], dtype=jnp.int32)

    def some(h, anchors):
        positions = anchors[..., None] + jnp.arange(h.shape[2], dtype=jnp.int32)
        positions = positions.reshape(h.shape[0], -1)
        visible = jnp.repeat(places < anchors[..., None], h.shape[2], axis=1)
        flat = h.reshape(*positions.shape, -1)
        out = layer(flat, positions, context, visible, Parallel(), blocks=h.shape[1])
        return out.reshape(h.shape)

    return in_chunks(some, _ANCHORS_AT_ONCE, h, anchors)


def slot_weights(
    recipe: DraftRecipe, losses: Float[Array, "*rows slots"]
) -> Float[Array, "*rows slots"]:
    """What a block's slots weigh: early ones gate later ones. No gradient goes through it.

    decay: exp(-(k - 1) / gamma) for slot k from 1 on; flat: 1; dpace: for slot j the sum over
    m >= j of the products of the first m confidences, each (1 - alpha) exp(-loss) + alpha: how much
    the expected number of accepted drafts depends on it.

    Args:
      recipe: which, and its parameters.
      losses: cross-entropies.
    """
    slots = losses.shape[-1]
    if recipe.weighting == "dpace":
        sure = (1 - recipe.alpha) * jnp.exp(-lax.stop_gradient(losses)) + recipe.alpha
        reach = jnp.cumprod(sure, axis=-1)
        return jnp.flip(jnp.cumsum(jnp.flip(reach, axis=-1), axis=-1), axis=-1)
    decay = jnp.arange(slots, dtype=jnp.float32) / recipe.gamma
    weights = jnp.exp(-decay) if recipe.weighting == "decay" else jnp.ones(slots)
    return jnp.broadcast_to(weights, losses.shape)


def compare(
    hidden: Float[Array, "b r d"],
    before: Float[Array, "b r d"],
    head: Float[Array, "w d"],
    recipe: DraftRecipe,
) -> dict[str, Array]:
    """Each draft against the target's own distribution there, over the whole vocabulary.

    Args:
      hidden: the drafter's rows.
      before: the target's, after its final norm, of the tokens before theirs.
      head: of both.
      recipe: which loss.

    Returns:
      [b, r]: "chosen", the target's arg-max; "right", whether the draft's is the same; "ce", the
      draft's cross-entropy against it; "loss", what is minimised.
    """

    def one(hidden, before):
        wanted = lax.stop_gradient(head_logits(before, head))
        logits = head_logits(hidden, head)
        chosen = jnp.argmax(wanted, axis=-1).astype(jnp.int32)
        ce = cross_entropy(logits, chosen)
        result = {"chosen": chosen, "right": jnp.argmax(logits, axis=-1) == chosen, "ce": ce}
        if recipe.loss == "ce":
            return result | {"loss": ce}
        p = jax.nn.softmax(wanted)
        if recipe.loss == "tv":
            other = 0.5 * jnp.abs(p - jax.nn.softmax(logits)).sum(axis=-1)
        else:
            other = (p * (jax.nn.log_softmax(wanted) - jax.nn.log_softmax(logits))).sum(axis=-1)
        return result | {"loss": recipe.ce_share * ce + (1 - recipe.ce_share) * other}

    return in_chunks(one, recipe.chunk, hidden, before)


def draft_loss(
    drafter: Drafter,
    target: MiMo,
    batch: dict[str, Array],
    places: tuple[Array, Array],
    config: DrafterConfig,
    recipe: DraftRecipe,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The drafts' loss against the target's own choices, and measurements, as sums.

    A draft is accepted when it is what the target chooses there, so the labels are the target's
    arg-max after the text's tokens, as long as these are the target's choices themselves.

    Args:
      drafter: in the compute dtype.
      target: in the compute dtype; frozen.
      batch: tokens [b, t], and which of them are trained on.
      places: of `place_anchors`.
      config: of the drafter.
      recipe: how to compute.

    Returns:
      {"loss": weighted sum, "weight": of it}; and sums over "anchors": `run`, right drafts in a row
      from the anchor on (acceptance exceeds it by one); `on_path`, how many of them the text itself
      allows; `right_k`, by slot, of drafts that were reached, with their count.
    """
    block, tokens = config.block_size, batch["tokens"]
    anchors, counted = places
    h, outputs, _ = run_sequences(target, tokens, recipe.capacity, attention=recipe.attention)
    features = lax.stop_gradient(tap(outputs, config.target_layer_ids))
    hidden = draft_hidden(drafter, target.embedding[...], features, tokens, anchors, block)
    slots = anchors[..., None] + jnp.arange(1, block, dtype=jnp.int32)
    sequence = jnp.arange(tokens.shape[0])[:, None, None]
    before = lax.stop_gradient(target.norm(h))[sequence, slots - 1]
    flat = before.shape[0], -1, before.shape[-1]
    found = compare(hidden[:, :, 1:].reshape(flat), before.reshape(flat), target.head[...], recipe)
    found = {name: value.reshape(slots.shape) for name, value in found.items()}
    on_path = jnp.cumprod((tokens[sequence, slots] == found["chosen"]).astype(jnp.float32), axis=-1)
    # Once the text has left the target's own choices, no drafting would have come here: such slots
    # have labels that depend on tokens which the drafter could not know.
    reached = jnp.concatenate([jnp.ones_like(on_path[..., :1]), on_path[..., :-1]], axis=-1)
    counts = counted[..., None].astype(jnp.float32)
    reached = reached * counts
    trained = batch["trained"][sequence, slots].astype(jnp.float32)
    weights = slot_weights(recipe, found["ce"]) * reached * trained
    right = found["right"].astype(jnp.float32) * reached
    sums = {"loss": (found["loss"] * weights).sum(), "weight": weights.sum()}
    measured = {
        "anchors": counted.sum(dtype=jnp.float32),
        "run": jnp.cumprod(right, axis=-1).sum(),
        "on_path": (on_path * counts).sum(),
        "right_k": right.sum(axis=(0, 1)),
        "reached_k": reached.sum(axis=(0, 1)),
    }
    return sums, measured


def make_draft_step(
    target_graph,
    graph,
    config: DrafterConfig,
    optimizer,
    recipe: DraftRecipe,
    seed: int,
    **jit,
) -> Callable:
    """The jitted `step(state, target_params, batch) -> (state, metrics)`; the state is donated.

    The target's parameters are what decoding uses (experts dequantised from MXFP4); its features
    come from its own forward pass. Anchors are drawn by (seed, step).
    """

    def loss_fn(params, tokens, trained, anchors, counted, target_params):
        target = nnx.merge(target_graph, target_params)
        cast = jax.tree.map(lambda x: x.astype(recipe.dtype), params)
        batch = {"tokens": tokens, "trained": trained}
        sums, measured = draft_loss(
            nnx.merge(graph, cast), target, batch, (anchors, counted), config, recipe
        )
        return sums["loss"], (sums["weight"], measured)

    def step(state: TrainState, target_params, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        places = place_anchors(
            key, batch["trained"], recipe, config.block_size, config.sliding_window
        )
        (loss, (weight, measured)), gradient = accumulate(
            jax.value_and_grad(loss_fn, has_aux=True),
            recipe.accumulate,
            state.params,
            (batch["tokens"], batch["trained"], *places),
            target_params,
        )
        # Sums of all parts, then the mean: parts with fewer reached slots do not count for more.
        weight = jnp.maximum(weight, 1e-6)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss / weight,
            "grad_norm": optax.tree.norm(gradient),
            **summarise(measured),
        }
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, **jit)


def summarise(measured: dict[str, Array]) -> dict[str, Array]:
    """Measurements of `draft_loss` as means.

    `acceptance` is what the drafter would have on the data with the target's choices, if decoding
    began at the anchors: 1 and the right drafts in a row. `on_path` is the most that the data
    allow.
    """
    anchors = jnp.maximum(measured["anchors"], 1.0)
    right = measured["right_k"] / jnp.maximum(measured["reached_k"], 1.0)
    return {
        "acceptance": 1 + measured["run"] / anchors,
        "on_path": 1 + measured["on_path"] / anchors,
        "right_1": right[0],
        "right_last": right[-1],
    }


def abstract_drafter(config: DrafterConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The drafter's graph and abstract float32 parameters."""
    return nnx.split(nnx.eval_shape(lambda: Drafter(config, nnx.Rngs(0), dtype=jnp.float32)))


def init_drafter(config: DrafterConfig, embedding: Float[Array, "w d"], seed: int) -> nnx.State:
    """Random float32 masters; the mask's embedding starts at the mean of the target's."""
    drafter = Drafter(config, nnx.Rngs(seed), dtype=jnp.float32)
    drafter.mask_embedding[...] = embedding.astype(jnp.float32).mean(axis=0)
    return nnx.state(drafter)


def make_draft_evaluate(
    target_graph, graph, config: DrafterConfig, recipe: DraftRecipe
) -> Callable:
    """The jitted `evaluate(params, target_params, batch) -> measurements of draft_loss`.

    Anchors are the same ones every time.
    """

    @jax.jit
    def evaluate(params, target_params, batch):
        target = nnx.merge(target_graph, target_params)
        cast = jax.tree.map(lambda x: x.astype(recipe.dtype), params)
        plain = dataclasses.replace(recipe, far=0.0)
        places = place_anchors(
            jax.random.key(0), batch["trained"], plain, config.block_size, config.sliding_window
        )
        _, measured = draft_loss(nnx.merge(graph, cast), target, batch, places, config, recipe)
        return measured

    return evaluate
