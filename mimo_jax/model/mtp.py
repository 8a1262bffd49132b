"""Multi-token prediction: small layers that draft one token each, from the target's hidden state.

Source: MiMo-V2-Flash, arXiv 2601.02780. Layer k (from 0) drafts the token at j + k + 2 from its row
j, which takes the token at j + k + 1 and the target's hidden state at j: for k > 0 the token is a
draft of the layer before, while the hidden state is never another layer's. So a row's key and value
need nothing but its own token and hidden state, and of all rows only the last one that the target
has verified, t, must be run to its end.

With an anchor at t + 1, rows of layer k beyond t - k hold drafts. A round therefore writes rows
t - (block - 1) - k to t anew: those of the last block, which was accepted only in part, and those
that held drafts before. Prompts are taken in that much later than they are read, by a fixed lag, so
that their rows never hold drafts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax.cache import LayerCache, init_cache, last_rows
from mimo_jax.drafter_config import MTPConfig
from mimo_jax.errors import MimoError
from mimo_jax.model.attention import Attention, attend, causal
from mimo_jax.model.layers import INIT_SCALE, DenseMLP, RMSNorm, embed, linear, value
from mimo_jax.model.mimo import MiMo, argmax, head_logits
from mimo_jax.sharding import Leaf, Parallel, normal, param


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MTPContext:
    """What the layers keep of a sequence."""

    hidden: Leaf  # [b, r, d]
    """The target's last hidden states before the final norm: that of position p is row p % r."""
    layers: tuple[LayerCache, ...]
    """A ring for each layer; a round queries the newest row alone, so that it holds a window."""


class MTPLayer(nnx.Module):
    """One layer, on rows of a token's embedding and a hidden state."""

    def __init__(self, config: MTPConfig, shards: int, fp8: bool, dtype, rngs: nnx.Rngs):
        d, epsilon = config.target.hidden_size, config.target.layernorm_epsilon
        attention = config.attention
        self.token_norm = RMSNorm(d, epsilon, dtype, rngs)
        self.hidden_norm = RMSNorm(d, epsilon, dtype, rngs)
        # Its first d columns take the token, the others the hidden state.
        init = normal(INIT_SCALE)
        self.projection = param(rngs, (d, 2 * d), ("feature", None), dtype, init)
        self.input_norm = RMSNorm(d, epsilon, dtype, rngs)
        groups = max(shards, attention.num_kv_heads)
        self.attention = Attention(attention, groups, dtype, rngs, fp8)
        self.post_norm = RMSNorm(d, epsilon, dtype, rngs)
        self.ffn = DenseMLP(d, config.target.intermediate_size, dtype, rngs, fp8)
        self.norm = RMSNorm(d, epsilon, dtype, rngs)

    def extend(
        self,
        embedded: Float[Array, "b t d"],
        hidden: Float[Array, "b t d"],
        start: Int32[Array, "b"],
        keep: Bool[Array, "b t"],
        cache: LayerCache,
        parallel: Parallel,
    ) -> tuple[Array, Array, LayerCache]:
        """Writes the keys and values of rows at positions start, start + 1, ...

        Args:
          embedded: of row j in layer k, the embedding of the token at j + k + 1.
          hidden: the target's hidden states.
          start: of the first row; may be negative.
          keep: rows to write; the others are dropped.
          cache: of this layer.
          parallel: this device's place on the mesh.

        Returns:
          the rows' residual stream [b, t, d] and queries [b, t, n, h], for `finish`; the cache.
        """
        positions = start[:, None] + jnp.arange(embedded.shape[1], dtype=jnp.int32)
        both = jnp.concatenate([self.token_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        u = parallel.gather(linear(both, self.projection[...]), -1)
        q, k, v = self.attention.project(self.input_norm(u), positions)
        return u, q, cache.write(k, v, start, keep)

    def finish(
        self,
        u: Float[Array, "b 1 d"],
        q: Float[Array, "b 1 n h"],
        position: Int32[Array, "b"],
        cache: LayerCache,
        parallel: Parallel,
    ) -> Float[Array, "b 1 d"]:
        """Runs the newest row to the final norm; after the target's head it is a draft's logits."""
        attention = self.attention
        visible = causal(position[:, None], cache.positions(position + 1), attention.config.window)
        sink = value(attention.sink)
        heads = attend(q, cache.keys, cache.values, visible, sink)
        u = u + attention.combine(heads, parallel)
        return self.norm(u + self.ffn(self.post_norm(u), parallel))


class MTP(nnx.Module):
    """A target's MTP layers as a drafter. They use the target's embedding and head.

    Args:
      config: the shapes.
      rngs: streams of random keys for the initial values.
      shards: devices that key/value heads must be spread over.
      fp8: whether attention's input projections and the MLPs are FP8.
      dtype: of the other weights.
    """

    def __init__(
        self,
        config: MTPConfig,
        rngs: nnx.Rngs,
        *,
        shards: int = 1,
        fp8: bool = False,
        dtype=jnp.bfloat16,
    ):
        self.layers = nnx.List(
            MTPLayer(config, shards, fp8, dtype, rngs) for _ in range(config.num_hidden_layers)
        )
        self.block_size = config.block_size
        self.hidden_normed = config.hidden_normed

    @staticmethod
    def init_contexts(
        config: MTPConfig, *, batch: int, max_len: int, block: int, shards: int, dtype
    ) -> MTPContext:
        """Empty contexts; see `mimo_jax.model.drafters`.

        Raises:
          MimoError: if the block has more drafts than there are layers.
        """
        if block > config.block_size:
            raise MimoError(
                f"block={block} is not allowed: {config.num_hidden_layers} MTP layers draft for a "
                f"block of at most {config.block_size}."
            )
        # A block may overwrite no row that is still needed when only its first one is kept.
        rows = config.block_size - 1 + _lag(config.block_size, config.num_hidden_layers - 1)
        attention = config.attention
        groups = max(shards, attention.num_kv_heads)
        return MTPContext(
            hidden=jnp.zeros((batch, rows, config.target.hidden_size), dtype),
            layers=tuple(
                init_cache(attention, groups, batch, max_len, 1, dtype)
                for _ in range(config.num_hidden_layers)
            ),
        )

    def ingest_prompt(
        self,
        model: MiMo,
        tokens: Int32[Array, "b l"],
        features: Float[Array, "b t d"],
        start: Int32[Array, "b"],
        live: Bool[Array, "b t"],
        contexts: MTPContext,
        parallel: Parallel,
    ) -> MTPContext:
        """Takes in a chunk of a prompt; see `mimo_jax.model.drafters`.

        As many rows are written as are live, but those from a round's width before `start` on: what
        the chunk leaves out, the next round writes, or the next chunk. So chunks may follow each
        other, or rounds, at any place, and every token that a row needs is there.
        """
        chunk = features.shape[1]
        hidden = jnp.concatenate(
            [self._recent(model, start, contexts), self._hidden(model, features)], axis=1
        )
        embedded = self._embedded(model, tokens, start, chunk, parallel)
        caches = []
        for k, (layer, cache) in enumerate(zip(self.layers, contexts.layers, strict=True)):
            lag = _lag(self.block_size, k)
            keep = last_rows(live, cache.size) & _present(start - lag, chunk)
            skipped = _lag(self.block_size, len(self.layers) - 1) - lag
            rows = hidden[:, skipped : skipped + chunk]
            caches.append(layer.extend(embedded, rows, start - lag, keep, cache, parallel)[-1])
        contexts = dataclasses.replace(contexts, layers=tuple(caches))
        return self.ingest(features, start, live, contexts, parallel)

    def ingest(
        self,
        features: Float[Array, "b t d"],
        start: Int32[Array, "b"],
        live: Bool[Array, "b t"],
        contexts: MTPContext,
        parallel: Parallel,
    ) -> MTPContext:
        """Keeps the hidden states of positions start, start + 1, ... for the next round."""
        ring = contexts.hidden
        size = ring.shape[1]
        rows = jnp.arange(features.shape[1], dtype=jnp.int32)
        # Each dropped row has a place of its own past the end: the indices stay unique.
        place = jnp.where(last_rows(live, size), (start[:, None] + rows) % size, size + rows)
        where = (jnp.arange(ring.shape[0])[:, None], place)
        ring = ring.at[where].set(features.astype(ring.dtype), mode="drop", unique_indices=True)
        return dataclasses.replace(contexts, hidden=ring)

    def draft(
        self,
        model: MiMo,
        tokens: Int32[Array, "b l"],
        start: Int32[Array, "b"],
        contexts: MTPContext,
        wanted: Int32[Array, ""],
        block: int,
        parallel: Parallel,
    ) -> tuple[Int32[Array, "b drafts"], MTPContext]:
        """One token from each layer, in turn; see `mimo_jax.model.drafters`.

        Rows are written whatever is wanted, so that drafting may begin at any round. An anchor at 0
        has no row before it: the layers then see the tokens alone.
        """
        hidden = self._recent(model, start, contexts)
        embedded = self._embedded(model, tokens, start, self.block_size, parallel)
        drafts, caches = [], list(contexts.layers)
        for k, layer in enumerate(list(self.layers)[: block - 1]):
            lag = _lag(self.block_size, k)
            if k:
                row = embed(model.embedding[...], drafts[-1], parallel)
                embedded = jnp.concatenate([embedded, row], axis=1)
            keep = _present(start - lag, lag)
            u, q, caches[k] = layer.extend(
                embedded, hidden[:, -lag:], start - lag, keep, caches[k], parallel
            )

            def choose(layer=layer, newest=(u[:, -1:], q[:, -1:]), cache=caches[k]):
                row = layer.finish(*newest, start - 1, cache, parallel)
                return argmax(head_logits(row, model.head[...]), parallel)

            drafts.append(lax.cond(wanted > k, choose, lambda: jnp.zeros_like(start)[:, None]))
        return jnp.concatenate(drafts, axis=1), MTPContext(contexts.hidden, tuple(caches))

    def _embedded(self, model: MiMo, tokens, start, count: int, parallel: Parallel) -> Array:
        """Embeddings of the tokens that rows from `start - lag` on take, in any layer."""
        places = start[:, None] + 1 - self.block_size + jnp.arange(count, dtype=jnp.int32)
        # Places before the first token belong to rows that are dropped.
        return embed(
            model.embedding[...],
            jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=1),
            parallel,
        )

    def _recent(self, model: MiMo, start, contexts: MTPContext) -> Array:
        """Hidden states of the rows before `start` that the last layer's round takes."""
        count = _lag(self.block_size, len(self.layers) - 1)
        places = start[:, None] - count + jnp.arange(count, dtype=jnp.int32)
        ring = contexts.hidden
        rows = jnp.take_along_axis(ring, (places % ring.shape[1])[..., None], axis=1)
        # An earlier sequence may have left something before the first position.
        rows = jnp.where(places[..., None] >= 0, rows, jnp.zeros((), rows.dtype))
        return self._hidden(model, rows)

    def _hidden(self, model: MiMo, rows: Array) -> Array:
        return model.norm(rows) if self.hidden_normed else rows


def _lag(block: int, layer: int) -> int:
    """Rows of a layer that a round writes: the last block's, and those that held drafts."""
    return block + layer


def _present(start: Int32[Array, "b"], count: int) -> Bool[Array, "b t"]:
    """Which of the positions start, start + 1, ... exist."""
    return start[:, None] + jnp.arange(count, dtype=jnp.int32) >= 0
