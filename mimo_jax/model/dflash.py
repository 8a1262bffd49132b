"""The DFlash drafter: a block of tokens in one pass, from the target's own features.

Source: DFlash, arXiv 2602.06036; the variant with sliding windows, sinks and a value scale is
MiMo-V2.5's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax.cache import LayerCache, init_cache, last_rows
from mimo_jax.config import AttentionConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.model.attention import attend
from mimo_jax.model.layers import (
    INIT_SCALE,
    DenseMLP,
    RMSNorm,
    embed,
    few_token_linear,
    linear,
    rope,
    rotary_angles,
    value,
)
from mimo_jax.model.mimo import MiMo, argmax, few_logits
from mimo_jax.sharding import Parallel, constant, normal, param
from pallas_kernels.attention import MOST_TOKENS, draft_attention, write_context


class DraftAttention(nnx.Module):
    """Attention of a block to the context's features and to itself.

    The block is seen in both directions, or, if `causal`, by each row up to itself. `kv` is
    [groups, h + v, d]: a group's key head, then its value head. After `pack` there is `qkv` in
    their place, for decoding.
    """

    def __init__(
        self, config: AttentionConfig, causal: bool, groups: int, epsilon, dtype, rngs: nnx.Rngs
    ):
        self.config, self.causal = config, causal
        d, n, h, v = config.hidden_size, config.num_heads, config.head_dim, config.v_head_dim
        init = normal(INIT_SCALE)
        self.query = param(rngs, (n * h, d), ("heads", None), dtype, init)
        self.kv = param(rngs, (groups, h + v, d), ("kv_heads", None, None), dtype, init)
        self.output = param(rngs, (d, n * v), (None, "heads"), dtype, init)
        self.query_norm = RMSNorm(h, epsilon, dtype, rngs)
        self.key_norm = RMSNorm(h, epsilon, dtype, rngs)
        self.sink = param(rngs, (n,), ("heads",), dtype, constant(0.0)) if config.sink else None
        self.qkv = nnx.data(None)

    def pack(self) -> None:
        """Puts queries beside keys and values: one product."""
        fused = fused_weight(self.query[...], self.kv[...])
        self.qkv = nnx.Param(fused, logical_axes=("kv_heads", None, None))
        self.query = self.kv = None

    def angles(self, positions: Int32[Array, "b t"]):
        """Cosines and sines of positions."""
        return rotary_angles(positions, self.config.rope_theta, self.config.rotary_dim)

    def _rotate(self, x, positions):
        return rope(x, positions, self.config.rope_theta, self.config.rotary_dim)

    def queries(
        self, x: Float[Array, "b t d"], positions: Int32[Array, "b t"], product: Callable = linear
    ):
        """Normed and rotated queries [b, t, n, h]."""
        q = product(x, self.query[...]).reshape(*x.shape[:2], -1, self.config.head_dim)
        return self._rotate(self.query_norm(q), positions)

    def keys_values(
        self, x: Float[Array, "b t d"], positions: Int32[Array, "b t"], product: Callable = linear
    ):
        """Normed and rotated keys [b,t,k,h], scaled values [b,t,k,v]: of context or of a block."""
        return self.split_keys(self._raw_keys(x, product), positions)

    def _raw_keys(self, x, product: Callable):
        """Keys and values side by side as they are projected, [b, t, k, h + v]."""
        weight = self.kv[...]
        fused = product(x, weight.reshape(-1, weight.shape[-1]))
        return fused.reshape(*x.shape[:2], *weight.shape[:2])

    def split_keys(self, fused: Float[Array, "b t k _"], positions: Int32[Array, "b t"]):
        """What `keys_values` returns, of keys and values side by side as they are projected."""
        k, v = jnp.split(fused, [self.config.head_dim], axis=-1)
        v = v * jnp.asarray(self.config.value_scale, v.dtype)
        return self._rotate(self.key_norm(k), positions), v

    def fused(self, x: Float[Array, "b t d"], product: Callable) -> Float[Array, "b t k rows"]:
        """Each group's queries, its key and its value, side by side as they are projected."""
        if self.qkv is not None:
            weight = self.qkv[...]
            y = product(x, weight.reshape(-1, weight.shape[-1]))
            return y.reshape(*x.shape[:2], *weight.shape[:2])
        kv = self._raw_keys(x, product)
        q = product(x, self.query[...]).reshape(*kv.shape[:3], -1)
        return jnp.concatenate([q, kv], axis=-1)

    def split(self, fused: Float[Array, "b t k rows"], positions: Int32[Array, "b t"]):
        """What `queries` and `keys_values` return, of the product."""
        own = self.config.head_dim + self.config.v_head_dim
        q, kv = jnp.split(fused, [fused.shape[-1] - own], axis=-1)
        q = q.reshape(*fused.shape[:2], -1, self.config.head_dim)
        return self._rotate(self.query_norm(q), positions), *self.split_keys(kv, positions)

    def __call__(
        self,
        h,
        norm: RMSNorm,
        positions,
        context: LayerCache,
        visible,
        parallel: Parallel,
        decoding: bool = False,
        blocks: int = 1,
    ):
        """h and what norm(h) [b, t, d] finds in `visible` [b, t, s] context and the whole block.

        The t rows may be several blocks of the same context, which do not see each other. If it is
        `decoding`, against a ring, there are kernels for it in programs for a GPU.
        """
        sink = value(self.sink)

        def beside(q, k, v, keys, values, sink):
            keys = jnp.concatenate([keys, k.transpose(0, 2, 1, 3)], axis=2)
            values = jnp.concatenate([values, v.transpose(0, 2, 1, 3)], axis=2)
            t = q.shape[1]
            own = jnp.broadcast_to(_own(t, blocks, self.causal), (*visible.shape[:2], t))
            return attend(q, keys, values, jnp.concatenate([visible, own], axis=2), sink)

        if decoding:
            fused = self.fused(h, partial(few_token_linear, norm=norm))
            heads = self._decode(fused, positions, context, sink, beside)
        else:
            x = norm(h)
            own = self.queries(x, positions), *self.keys_values(x, positions)
            heads = beside(*own, context.keys, context.values, sink)
        flat = heads.reshape(*heads.shape[:2], -1)
        if not decoding:
            return h + parallel.sum(linear(flat, self.output[...]))
        product = partial(few_token_linear, flat, self.output[...])
        return parallel.add(h, lambda residual: product(residual=residual))

    def _decode(self, fused, positions, context: LayerCache, sink, beside: Callable):
        """Heads of one block against a context, by the kernel where the context is a ring."""
        config, t = self.config, fused.shape[1]

        def elsewhere(fused, query_norm, key_norm, cos, sin, keys, values, start, sink):
            del query_norm, key_norm, cos, sin, start
            return beside(*self.split(fused, positions), keys, values, sink)

        norms = self.query_norm.weight[...], self.key_norm.weight[...]
        arguments = (
            fused,
            *norms,
            *self.angles(positions),
            context.keys,
            context.values,
            positions[:, 0],
        )
        window = config.window
        if window is None or t > min(window, context.size - window + 1):
            return elsewhere(*arguments, sink)
        return draft_attention(
            *arguments,
            window=window,
            value_scale=config.value_scale,
            epsilon=self.query_norm.epsilon,
            sink=sink,
            causal=self.causal,
            elsewhere=elsewhere,
        )


class DraftBlock(nnx.Module):
    """One pre-norm layer of the drafter."""

    def __init__(self, config: DrafterConfig, layer: int, groups: int, dtype, rngs: nnx.Rngs):
        d, epsilon = config.hidden_size, config.rms_norm_eps
        attention, causal = config.attention_of(layer), layer in config.causal_layers
        self.input_norm = RMSNorm(d, epsilon, dtype, rngs)
        self.attention = DraftAttention(attention, causal, groups, epsilon, dtype, rngs)
        self.post_norm = RMSNorm(d, epsilon, dtype, rngs)
        self.mlp = DenseMLP(d, config.intermediate_size, dtype, rngs)

    def __call__(
        self,
        h,
        positions,
        context: LayerCache,
        visible,
        parallel: Parallel,
        decoding: bool = False,
        blocks: int = 1,
    ):
        """The residual stream after attention and MLP."""
        rows = positions, context, visible
        h = self.attention(h, self.input_norm, *rows, parallel, decoding, blocks)
        if decoding:
            return self.mlp.decode(h, self.post_norm, parallel)
        return h + self.mlp(self.post_norm(h), parallel)


class Drafter(nnx.Module):
    """A DFlash drafter. It has no embedding and no head: it uses the target's.

    After `pack`, for decoding, all layers' keys and values of the context are one product.

    Args:
      config: the shapes.
      rngs: streams of random keys for the initial values.
      shards: devices that key/value heads must be spread over.
      dtype: of all weights.
    """

    def __init__(
        self, config: DrafterConfig, rngs: nnx.Rngs, *, shards: int = 1, dtype=jnp.bfloat16
    ):
        d, taps = config.hidden_size, len(config.target_layer_ids)
        groups = max(shards, config.num_key_value_heads)
        init = normal(INIT_SCALE)
        self.features = param(rngs, (d, taps * d), ("feature", None), dtype, init)
        self.context_norm = RMSNorm(d, config.rms_norm_eps, dtype, rngs)
        self.layers = nnx.List(
            DraftBlock(config, layer, groups, dtype, rngs)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(d, config.rms_norm_eps, dtype, rngs)
        self.mask_embedding = param(rngs, (d,), (None,), dtype, init)
        self.context_kv = self.context_norms = nnx.data(None)

    def pack(self) -> None:
        """Weights of one product for the context, and of one in each layer for a block."""
        stack = jnp.stack([layer.attention.kv[...] for layer in self.layers])
        norms = jnp.stack([layer.attention.key_norm.weight[...] for layer in self.layers])
        self.context_kv = nnx.Param(stack, logical_axes=(None, "kv_heads", None, None))
        self.context_norms = nnx.Param(norms, logical_axes=(None, None))
        for layer in self.layers:
            layer.attention.pack()

    @staticmethod
    def init_contexts(
        config: DrafterConfig, *, batch: int, max_len: int, block: int, shards: int, dtype
    ) -> tuple[LayerCache, ...]:
        """Empty contexts, one for each layer; see `mimo_jax.model.drafters`."""
        groups = max(shards, config.num_key_value_heads)
        return tuple(
            init_cache(config.attention_of(layer), groups, batch, max_len, block, dtype)
            for layer in range(config.num_hidden_layers)
        )

    def context(
        self,
        features: Float[Array, "b t _"],
        positions: Int32[Array, "b t"],
        parallel: Parallel,
        product: Callable = linear,
    ) -> list[tuple[Array, Array]]:
        """Each layer's keys [b,t,k,h] and values [b,t,k,v] of the target's tapped features."""
        normed = self._normed_features(features, parallel, product)
        return [layer.attention.keys_values(normed, positions, product) for layer in self.layers]

    def _normed_features(self, features, parallel: Parallel, product: Callable):
        projected = parallel.gather(product(features, self.features[...]), -1)
        return self.context_norm(projected)

    def _fused_context(self, features, parallel: Parallel):
        """Keys and values of all layers, as projected by one product: [b, t, layers, k, h + v]."""
        normed = self._normed_features(features, parallel, few_token_linear)
        weight = self.context_kv[...]
        fused = few_token_linear(normed, weight)
        return fused.reshape(*normed.shape[:2], *weight.shape[:3])

    @jax.named_scope("drafter")
    def ingest(
        self,
        features: Float[Array, "b t _"],
        start: Int32[Array, "b"],
        live: Bool[Array, "b t"],
        caches: tuple[LayerCache, ...],
        parallel: Parallel,
    ) -> tuple[LayerCache, ...]:
        """Adds features of positions start, start + 1, ... to each layer's context."""
        positions = start[:, None] + jnp.arange(features.shape[1], dtype=jnp.int32)

        def written(caches, context):
            return tuple(
                cache.write(k, v, start, last_rows(live, cache.size))
                for cache, (k, v) in zip(caches, context, strict=True)
            )

        if self.context_kv is None:
            return written(caches, self.context(features, positions, parallel, few_token_linear))

        def elsewhere(fused, norms, cos, sin, keys, values, start, count):
            del norms, cos, sin, start, count
            found = written(map(LayerCache, keys, values), self._split_context(fused, positions))
            return tuple(cache.keys for cache in found), tuple(cache.values for cache in found)

        arguments = (
            self._fused_context(features, parallel),
            self.context_norms[...],
            *self.layers[0].attention.angles(positions),
            tuple(cache.keys for cache in caches),
            tuple(cache.values for cache in caches),
            start,
            live.sum(axis=-1, dtype=jnp.int32),
        )
        # A kernel writes a block's few rows, to caches of one size: rings, or of all positions.
        most = min(MOST_TOKENS, caches[0].size)
        if len({cache.size for cache in caches}) > 1 or features.shape[1] > most:
            return tuple(map(LayerCache, *elsewhere(*arguments)))
        attention = self.layers[0].attention
        options = dict(value_scale=attention.config.value_scale, epsilon=attention.key_norm.epsilon)
        return tuple(map(LayerCache, *write_context(*arguments, **options, elsewhere=elsewhere)))

    def _split_context(self, fused, positions):
        """Each layer's keys and values of `_fused_context`."""
        return [
            layer.attention.split_keys(fused[:, :, i], positions)
            for i, layer in enumerate(self.layers)
        ]

    def ingest_prompt(
        self,
        model: MiMo,
        tokens: Int32[Array, "b l"],
        features: Float[Array, "b t _"],
        start: Int32[Array, "b"],
        live: Bool[Array, "b t"],
        caches: tuple[LayerCache, ...],
        parallel: Parallel,
    ) -> tuple[LayerCache, ...]:
        """Adds a chunk of a prompt: its features are all that the layers see of it."""
        return self.ingest(features, start, live, caches, parallel)

    @jax.named_scope("drafter")
    def draft(
        self,
        model: MiMo,
        tokens: Int32[Array, "b l"],
        start: Int32[Array, "b"],
        contexts: tuple[LayerCache, ...],
        wanted: Int32[Array, ""],
        block: int,
        parallel: Parallel,
    ) -> tuple[Int32[Array, "b drafts"], tuple[LayerCache, ...]]:
        """The block - 1 tokens after each anchor, in one pass; see `mimo_jax.model.drafters`."""
        anchor = jnp.take_along_axis(tokens, start[:, None], axis=1)

        def draft():
            embedded = embed(model.embedding[...], anchor, parallel)[:, 0]
            places = {contexts[0].size: contexts[0].positions(start)}
            for other in contexts:
                if other.size not in places:  # Layers of one kind have the same rows.
                    places[other.size] = other.positions(start)
            rows = tuple(places[context.size] for context in contexts)
            inputs = self.block(embedded, block), start, contexts, rows, parallel
            hidden = self(*inputs, decoding=True)
            return argmax(few_logits(hidden[:, 1:], model.head[...]), parallel)

        def nothing():
            return jnp.zeros((anchor.shape[0], block - 1), jnp.int32)

        return lax.cond(wanted > 0, draft, nothing), contexts

    def block(self, anchor: Float[Array, "b d"], size: int) -> Float[Array, "b t d"]:
        """The block's input: the anchor's embedding, then the mask's."""
        mask = self.mask_embedding[...].astype(anchor.dtype)
        masks = jnp.broadcast_to(mask, (anchor.shape[0], size - 1, mask.shape[0]))
        return jnp.concatenate([anchor[:, None], masks], axis=1)

    def __call__(
        self,
        block: Float[Array, "b t d"],
        start: Int32[Array, "b"],
        contexts: tuple[LayerCache, ...],
        places: Int32[Array, "b s"] | tuple[Int32[Array, "b _"], ...],
        parallel: Parallel = Parallel(),
        decoding: bool = False,
    ) -> Float[Array, "b t d"]:
        """Drafts a block: row j, after the target's head, predicts the token at start + j.

        Args:
          block: embeddings from `block`.
          start: the anchor's position. Its own feature does not exist yet: only context rows at
            positions strictly before it are seen, and within the layer's window, if it has one.
          contexts: each layer's context.
          places: the position of each context row, for all layers or for each; negative: none.
          parallel: this device's place on the mesh.
          decoding: contexts with a window are rings as `ingest` leaves them, and kernels may be
            used, which have no gradient.

        Returns:
          the hidden rows after the final norm.
        """
        positions = start[:, None] + jnp.arange(block.shape[1], dtype=jnp.int32)
        rows = places if isinstance(places, tuple) else (places,) * len(self.layers)
        masks: dict[Any, Array] = {}
        h = block
        for layer, context, at in zip(self.layers, contexts, rows, strict=True):
            kind = id(at), layer.attention.config.window
            if kind not in masks:
                masks[kind] = seen_rows(at, start, positions, kind[1])
            h = layer(h, positions, context, masks[kind], parallel, decoding)
        return self.norm(h)


def fused_weight(
    query: Float[Array, "nh d"], kv: Float[Array, "groups _ d"]
) -> Float[Array, "groups rows d"]:
    """Each group's queries, its key and its value, as rows of one matrix."""
    return jnp.concatenate([query.reshape(kv.shape[0], -1, kv.shape[-1]), kv], axis=1)


def seen_rows(
    places: Int32[Array, "b s"],
    start: Int32[Array, "b"],
    positions: Int32[Array, "b t"],
    window: int | None,
) -> Bool[Array, "b t s"]:
    """Which rows of the context, at `places`, each row of a block from `start` on sees."""
    written = places[:, None, :] >= 0
    if window is None:
        seen = jnp.broadcast_to(written, (*positions.shape, places.shape[1]))
    else:
        seen = (places[:, None, :] > positions[:, :, None] - window) & written
    return seen & (places < start[:, None])[:, None, :]


def _own(t: int, blocks: int, causal: bool) -> Bool[Array, "t t"]:
    """Which of t rows each of them sees: its own block's, or those of them up to itself."""
    if blocks == 1:  # No constant: XLA pads the mask then, instead of joining two.
        own = jnp.ones((t, t), bool)
    else:
        own = jnp.asarray(np.kron(np.eye(blocks), np.ones((t // blocks, t // blocks))) > 0)
    return jnp.tril(own) if causal else own
