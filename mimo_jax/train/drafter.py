"""Training the DFlash drafter on the frozen target's features: random anchors, decayed loss.

Source: DFlash, arXiv 2602.06036, appendix A.1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32

from mimo_jax.cache import LayerCache
from mimo_jax.config import DrafterConfig
from mimo_jax.model.dflash import Drafter
from mimo_jax.model.mimo import MiMo, head_logits, tap
from mimo_jax.sharding import Parallel
from mimo_jax.train.pretrain import TrainState, run_sequences


def draw_anchors(
    key: Array, batch: int, length: int, anchors: int, block: int
) -> Int32[Array, "b a"]:
    """Random anchor positions, each with a whole block of tokens after it and one before it."""
    return jax.random.randint(key, (batch, anchors), 1, length - block + 1, jnp.int32)


def draft_hidden(
    drafter: Drafter,
    embedding: Float[Array, "w d"],
    features: Float[Array, "b t _"],
    tokens: Int32[Array, "b t"],
    anchors: Int32[Array, "b a"],
    block: int,
) -> Float[Array, "b a block d"]:
    """The drafter's rows for a block at each anchor, as decoding would compute them.

    Each anchor becomes a sequence of its own that sees the window of context before it.
    """
    b, count = anchors.shape
    length, window = tokens.shape[1], drafter.window
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    places = anchors[..., None] - window + jnp.arange(window, dtype=jnp.int32)
    rows = jnp.clip(places, 0, length - 1)
    sequence = jnp.arange(b)[:, None, None]

    def windows(x: Float[Array, "b t k h"]) -> Float[Array, "ba k s h"]:
        gathered = x[sequence, rows].reshape(b * count, window, *x.shape[2:])
        return gathered.transpose(0, 2, 1, 3)

    contexts = tuple(
        LayerCache(windows(k), windows(v))
        for k, v in drafter.context(features, positions, Parallel())
    )
    anchor = embedding[jnp.take_along_axis(tokens, anchors, axis=1)].reshape(b * count, -1)
    hidden = drafter(
        drafter.block(anchor, block),
        anchors.reshape(-1),
        contexts,
        places.reshape(b * count, window),
    )
    return hidden.reshape(b, count, block, -1)


def slot_weights(block: int, decay: float) -> Float[Array, "slots"]:
    """exp(-(k - 1) / decay) for slots k from 1 on, of mean 1: early slots gate later ones."""
    weights = jnp.exp(-jnp.arange(block - 1, dtype=jnp.float32) / decay)
    return weights / weights.mean()


def draft_loss(
    drafter: Drafter, target: MiMo, tokens, anchors, config: DrafterConfig, decay: float
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the drafts against the target's own choices, and measurements.

    A draft is accepted when it is what the target chooses there, so the labels are the target's
    arg-max after the text's tokens, as long as these are the target's choices themselves. `run` is
    the mean number of right drafts in a row from the anchor on, which acceptance exceeds by one;
    `on_path` is how many the text itself allows.
    """
    block = config.block_size
    h, outputs, loads = run_sequences(target, tokens, factor=3.0)
    features = jax.lax.stop_gradient(tap(outputs, config.target_layer_ids))
    hidden = draft_hidden(drafter, target.embedding[...], features, tokens, anchors, block)
    slots = anchors[..., None] + jnp.arange(1, block, dtype=jnp.int32)
    sequence = jnp.arange(tokens.shape[0])[:, None, None]
    before = target.norm(h)[sequence, slots - 1]
    flat = before.shape[0], -1, before.shape[-1]
    chosen = jnp.argmax(head_logits(before.reshape(flat), target.head[...]), axis=-1)
    logits = head_logits(hidden[:, :, 1:].reshape(flat), target.head[...])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, chosen).reshape(slots.shape)
    right = (jnp.argmax(logits, axis=-1) == chosen).reshape(slots.shape)
    on_path = (tokens[sequence, slots] == chosen.reshape(slots.shape)).astype(jnp.float32)
    on_path = jnp.cumprod(on_path, axis=-1)
    # Once the text has left the target's own choices, no drafting would have come here: such slots
    # have labels that depend on tokens which the drafter could not know.
    reached = jnp.concatenate([jnp.ones_like(on_path[..., :1]), on_path[..., :-1]], axis=-1)
    weights = slot_weights(block, decay) * reached
    run = jnp.cumprod(right.astype(jnp.float32) * reached, axis=-1)
    metrics = {
        "on_path": on_path.sum(-1).mean(),
        "run": run.sum(-1).mean(),
        "right_1": right[..., 0].mean(dtype=jnp.float32),
        "right_last": right[..., -1].mean(dtype=jnp.float32),
        "dropped": jnp.stack([load.dropped for load in loads]).mean(),
    }
    return (losses * weights).sum() / weights.sum(), metrics


def make_draft_step(
    target_graph, graph, config: DrafterConfig, optimizer, *, anchors: int, decay: float, seed: int
) -> Callable:
    """The jitted `step(state, target_params, tokens) -> (state, metrics)`; the state is donated.

    The target's parameters are what decoding uses (bfloat16, experts dequantised from MXFP4); its
    features come from its own forward pass.
    """

    def loss_fn(params, target_params, tokens, key):
        target = nnx.merge(target_graph, target_params)
        cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        places = draw_anchors(key, *tokens.shape, anchors, config.block_size)
        return draft_loss(nnx.merge(graph, cast), target, tokens, places, config, decay)

    def step(state: TrainState, target_params, tokens):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, target_params, tokens, key
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def init_draft_state(
    config: DrafterConfig, target_embedding: Array, seed: int, optimizer
) -> tuple[nnx.GraphDef, TrainState]:
    """Random float32 masters; the mask's embedding starts at the mean of the target's."""

    def build():
        return Drafter(config, nnx.Rngs(seed), dtype=jnp.float32)

    graph, _ = nnx.split(nnx.eval_shape(build))

    @jax.jit
    def init(embedding):
        drafter = build()
        drafter.mask_embedding[...] = embedding.astype(jnp.float32).mean(axis=0)
        params = nnx.state(drafter)
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    return graph, init(target_embedding)
