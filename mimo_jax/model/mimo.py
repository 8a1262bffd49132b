"""The target: embedding, blocks, final norm and head over one block of tokens against a cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax import cache as kv
from mimo_jax.config import ModelConfig
from mimo_jax.model.attention import Attention
from mimo_jax.model.layers import (
    INIT_SCALE,
    DenseMLP,
    RMSNorm,
    embed,
    few_token_linear,
    linear,
    value,
)
from mimo_jax.model.moe import MoE
from mimo_jax.model.prefill_attention import MOST_DECODED, attend_chunk
from mimo_jax.model.sequence import attend_sequence
from mimo_jax.sharding import Parallel, normal, param


class Block(nnx.Module):
    """One pre-norm layer: attention, then a dense MLP or a mixture of experts."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        shards: int,
        packed: bool,
        fp8: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        d, epsilon = config.hidden_size, config.layernorm_epsilon
        attention = config.attention(layer)
        self.input_norm = RMSNorm(d, epsilon, dtype, rngs)
        groups = max(shards, attention.num_kv_heads)
        self.attention = Attention(attention, groups, dtype, rngs, fp8)
        self.post_norm = RMSNorm(d, epsilon, dtype, rngs)
        self.sparse = bool(config.moe_layer_freq[layer])
        if self.sparse:
            self.ffn = MoE(config, packed, dtype, rngs)
        else:
            self.ffn = DenseMLP(d, config.intermediate_size, dtype, rngs, fp8)

    def __call__(
        self,
        h,
        positions,
        live,
        cache: kv.LayerCache,
        parallel: Parallel,
        following: nnx.Param | None = None,
    ):
        """A block of tokens against the cache; returns the residual stream and the cache.

        `following` are the weights that are read next.
        """
        if h.shape[1] > MOST_DECODED:
            return self._chunk(h, positions, live, cache, parallel)
        attention, ffn = self.attention, self.ffn
        ahead = ffn.router.weight if self.sparse else ffn.gate_up
        flags = value(ffn.experts.barrier) if self.sparse else None
        around = self.input_norm, positions, live, cache

        def attend(residual):
            nonlocal cache
            stream = residual is not None
            cache, y = attention.decode(h, *around, ahead, flags, stream)
            return y

        attended = parallel.add(h, attend)
        if self.sparse:
            return ffn.decode(attended, self.post_norm, live, parallel, following), cache
        return ffn.decode(attended, self.post_norm, parallel, following), cache

    def _chunk(self, h, positions, live, cache: kv.LayerCache, parallel: Parallel):
        """The same for a chunk of a prompt."""
        attention = self.attention
        q, k, v = attention.project(self.input_norm(h), positions)
        window, sink = attention.config.window, value(attention.sink)
        cache, heads = attend_chunk(q, k, v, cache, positions[:, 0], live, window, sink)
        h = h + attention.combine(heads, parallel)
        x = self.post_norm(h)
        return h + (self.ffn(x, live, parallel) if self.sparse else self.ffn(x, parallel)), cache

    def sequence(self, h, feed_forward: Callable, implementation: str = "blocks"):
        """Whole sequences without a cache.

        Args:
          h: the residual stream.
          feed_forward: `feed_forward(ffn, x)` is the caller's way to run that.
          implementation: of `attend_sequence`.
        """
        attention = self.attention
        positions = jnp.broadcast_to(jnp.arange(h.shape[1], dtype=jnp.int32), h.shape[:2])
        q, k, v = attention.project(self.input_norm(h), positions)
        window, sink = attention.config.window, value(attention.sink)
        heads = attend_sequence(q, k, v, window, sink, implementation=implementation)
        h = h + attention.combine(heads, Parallel())
        return h + feed_forward(self.ffn, self.post_norm(h))


class MiMo(nnx.Module):
    """A MiMo language model.

    Args:
      config: the shapes.
      rngs: streams of random keys for the initial values.
      shards: devices that key/value heads must be spread over.
      packed: whether the experts are MXFP4; by default as the config says.
      fp8: whether attention's input projections and dense MLPs are FP8.
      dtype: of all weights but these and the router.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        shards: int = 1,
        packed: bool | None = None,
        fp8: bool = False,
        dtype=jnp.bfloat16,
    ):
        packed = config.expert_format == "mxfp4" if packed is None else packed
        w, d = config.vocab_size, config.hidden_size
        self.embedding = param(rngs, (w, d), ("vocab", None), dtype, normal(INIT_SCALE))
        self.layers = nnx.List(
            Block(config, layer, shards, packed, fp8, dtype, rngs)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(d, config.layernorm_epsilon, dtype, rngs)
        self.head = param(rngs, (w, d), ("vocab", None), dtype, normal(INIT_SCALE))

    def __call__(
        self,
        tokens: Int32[Array, "b t"],
        start: Int32[Array, "b"],
        live: Bool[Array, "b t"],
        caches: tuple[kv.LayerCache, ...],
        taps: tuple[int, ...],
        parallel: Parallel = Parallel(),
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t _"], tuple[kv.LayerCache, ...]]:
        """Runs a block of tokens.

        Args:
          tokens: the block.
          start: position of each sequence's first token; the others follow it.
          live: rows that count, first in their block. A dead row is not cached, reaches no expert,
            and its outputs mean nothing.
          caches: one for each layer.
          taps: layers whose outputs are wanted.
          parallel: this device's place on the mesh.

        Returns:
          the residual stream before the final norm; the tapped layers' outputs, side by side; the
          caches.
        """
        positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        h = embed(self.embedding[...], tokens, parallel)
        outputs, written = [], []
        following = [layer.attention.qkv for layer in self.layers[1:]] + [None]
        layers = zip(self.layers, caches, following, strict=True)
        for index, (layer, cache, ahead) in enumerate(layers):
            with jax.named_scope(f"layer_{index}"):
                h, cache = layer(h, positions, live, cache, parallel, ahead)
            outputs.append(h)
            written.append(cache)
        return h, tap(outputs, taps), tuple(written)

    def logits(self, h: Float[Array, "b t d"]) -> Float[Array, "b t w"]:
        """Final norm and head: float32 logits of this device's part of the vocabulary."""
        return few_logits(h, self.head[...], self.norm)


@jax.named_scope("head")
def few_logits(
    x: Float[Array, "b t d"], head: Float[Array, "w d"], norm: RMSNorm | None = None
) -> Float[Array, "b t w"]:
    """norm(x) @ head^T in float32, for the few rows of a decoded block."""
    return few_token_linear(x, head, norm=norm, dtype=jnp.float32)


@jax.named_scope("head")
def head_logits(x: Float[Array, "b t d"], head: Float[Array, "w d"]) -> Float[Array, "b t w"]:
    """x @ head^T in float32: target and drafter share the head."""
    return linear(x, head, jnp.float32)


@jax.named_scope("head")
def argmax(logits: Float[Array, "b t w"], parallel: Parallel) -> Int32[Array, "b t"]:
    """Arg-max over a vocabulary divided over the devices; ties go to the lowest id."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    value = jnp.take_along_axis(logits, best[..., None], axis=-1)
    values = parallel.gather(value, -1)
    ids = parallel.gather((best + parallel.index * logits.shape[-1])[..., None], -1)
    winner = jnp.argmax(values, axis=-1, keepdims=True)
    return jnp.take_along_axis(ids, winner, axis=-1)[..., 0]


def tap(outputs: list[Array], taps: tuple[int, ...]) -> Array:
    """The outputs of the tapped layers side by side, [b, t, taps * d]."""
    if not taps:
        return outputs[0][..., :0]
    return jnp.concatenate([outputs[layer] for layer in taps], axis=-1)
