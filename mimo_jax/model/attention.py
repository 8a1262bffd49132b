"""Grouped-query attention with sinks, a value scale, keys wider than values; full or windowed."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax import cache as kv
from mimo_jax.config import AttentionConfig
from mimo_jax.model.layers import (
    INIT_SCALE,
    RMSNorm,
    few_token_linear,
    rope,
    rotary_angles,
    stored_linear,
    tile_scales,
    value,
)
from mimo_jax.model.moe import ATTENTION_WORD
from mimo_jax.quant import fp8
from mimo_jax.sharding import Parallel, normal, param
from pallas_kernels.attention import block_attention
from pallas_kernels.attention_layer import attention_layer, flag_words
from pallas_kernels.softmax import LOG2E, MASKED


class Attention(nnx.Module):
    """The target's attention, its query, key and value projections fused by key/value group.

    `qkv` is [groups, rows, d]: a group's query heads, then its key head, then its value head.
    There are as many groups as key/value heads, or as devices when these are more; then groups
    repeat a key/value head (see `regroup`).

    If `quantized`, it is FP8, and `qkv_scale` [groups, rows/unit, ceil(d/128)] has a scale for each
    `config.scale_unit` rows of 128 columns: released checkpoints lay tiles of 128 rows across the
    borders of heads. `output` is FP8, with `output_scale`, only after `quantize_output`.
    """

    def __init__(
        self, config: AttentionConfig, groups: int, dtype, rngs: nnx.Rngs, quantized: bool = False
    ):
        self.config = config
        d, n = config.hidden_size, config.num_heads
        rows = n // groups * config.head_dim + config.head_dim + config.v_head_dim
        init = normal(INIT_SCALE)
        axes, shape = ("kv_heads", None, None), (groups, rows // config.scale_unit, fp8.tiles(d))
        self.qkv = param(rngs, (groups, rows, d), axes, fp8.CODES if quantized else dtype, init)
        self.qkv_scale = tile_scales(rngs, shape, axes, quantized)
        self.output = param(rngs, (d, n * config.v_head_dim), (None, "heads"), dtype, init)
        self.output_scale: nnx.Param | None = nnx.data(None)
        self.sink = param(rngs, (n,), ("heads",), dtype, normal(1.0)) if config.sink else None

    def quantize_output(self) -> None:
        """Makes the output projection FP8, on one device's share of it."""
        codes, scales = fp8.quantize_on_device(self.output[...])
        self.output = nnx.Param(codes, logical_axes=(None, "heads"))
        self.output_scale = nnx.Param(scales, logical_axes=(None, "heads"))

    @property
    def flag_words(self) -> int:
        """Words that one launch for the whole of it takes, if it can be one: `attention_layer`."""
        if self.config.window is None:
            return 0
        return flag_words(math.prod(self.qkv.shape[:-1]), self.output.shape[-1])

    @jax.named_scope("attention_project")
    def project(self, x: Float[Array, "b t d"], positions: Int32[Array, "b t"]):
        """Rotated queries [b,t,n,h] and keys [b,t,k,h], and scaled values [b,t,k,v]."""
        return self.split(self.fused(x), positions)

    def fused(self, x: Float[Array, "b t d"]) -> Float[Array, "b t k rows"]:
        """Each group's queries, its key and its value, side by side as they are projected."""
        groups, rows, d = self.qkv.shape
        weight, scale = self.qkv[...].reshape(-1, d), value(self.qkv_scale)
        scale = None if scale is None else scale.reshape(-1, scale.shape[-1])
        y = stored_linear(x, weight, scale, self.config.scale_unit)
        return y.reshape(*x.shape[:2], groups, rows)

    @jax.named_scope("attention_project")
    def fused_few(self, h: Float[Array, "b t d"], norm: RMSNorm) -> Float[Array, "b t k rows"]:
        """The same of norm(h), for the few rows of a decoded block."""
        groups, rows, _ = self.qkv.shape
        options = dict(unit=self.config.scale_unit, norm=norm, ahead=self.output)
        y = few_token_linear(h, self.qkv[...], value(self.qkv_scale), **options)
        return y.reshape(*h.shape[:2], groups, rows)

    def split(self, fused: Float[Array, "b t k rows"], positions: Int32[Array, "b t"]):
        """What `project` returns, of the product."""
        config = self.config
        split = fused.shape[-1] - config.head_dim - config.v_head_dim
        q, k, v = jnp.split(fused, [split, split + config.head_dim], axis=-1)
        q = q.reshape(*fused.shape[:2], -1, config.head_dim)
        v = v * jnp.asarray(config.value_scale, v.dtype)
        q, k = (rope(y, positions, config.rope_theta, config.rotary_dim) for y in (q, k))
        return q, k, v

    @jax.named_scope("attend_cached")
    def attend_cached(
        self,
        fused: Float[Array, "b t k rows"],
        positions: Int32[Array, "b t"],
        live: Bool[Array, "b t"],
        cache: kv.LayerCache,
    ) -> tuple[kv.LayerCache, Float[Array, "b t n v"]]:
        """Adds a block's live rows to the cache; its queries attend to them and to those before.

        In programs for a GPU that is a kernel, from the product on, where the block fits one.
        """
        config, start, sink = self.config, positions[:, 0], value(self.sink)

        def elsewhere(fused, cos, sin, keys, values, start, count, sink):
            q, k, v = self.split(fused, positions)
            cache = kv.LayerCache(keys, values)
            cache, keys, values, places = kv.extend(cache, k, v, start, live, config.window)
            heads = attend(q, keys, values, causal(positions, places, config.window), sink)
            return heads, cache.keys, cache.values

        count = live.sum(axis=-1, dtype=jnp.int32)
        angles = rotary_angles(positions, config.rope_theta, config.rotary_dim)
        arguments = fused, *angles, cache.keys, cache.values, start, count
        if fused.shape[1] > cache.size - (config.window or 1) + 1:
            heads, *written = elsewhere(*arguments, sink)
        else:
            heads, *written = block_attention(
                *arguments,
                window=config.window,
                sink=sink,
                value_scale=config.value_scale,
                elsewhere=elsewhere,
            )
        return kv.LayerCache(*written), heads

    def decode(
        self,
        h: Float[Array, "b t d"],
        norm: RMSNorm,
        positions: Int32[Array, "b t"],
        live: Bool[Array, "b t"],
        cache: kv.LayerCache,
        ahead: nnx.Param | None,
        flags: Array | None,
        stream: bool,
    ) -> tuple[kv.LayerCache, Float[Array, "b t d"]]:
        """A decoded block's attention to the cache and itself: this device's part of the sum.

        Args:
          h: the residual stream.
          norm: of it, before the projection.
          positions: of the rows.
          live: rows that are cached.
          cache: to which they are added.
          ahead: as in `few_token_linear`, of the output projection.
          flags: as of `attention_layer`; without them a layer is several launches.
          stream: whether h is added.
        """
        added = h if stream else None

        def separate(h, norm_weight, qkv, qkv_scale, cos, sin, keys, values, *rest):
            del norm_weight, qkv, qkv_scale, cos, sin, rest
            fused = self.fused_few(h, norm)
            found, heads = self.attend_cached(fused, positions, live, kv.LayerCache(keys, values))
            return self.combine_few(heads, ahead, added), found.keys, found.values

        config, scales = self.config, (value(self.qkv_scale), value(self.output_scale))
        fits = config.window is not None and h.shape[1] <= cache.size - config.window + 1
        if flags is None or not fits:
            y, *written = separate(h, None, None, None, None, None, cache.keys, cache.values)
            return kv.LayerCache(*written), y
        qkv, count = self.qkv[...], live.sum(axis=-1, dtype=jnp.int32)
        arguments = h, norm.weight[...], qkv.reshape(-1, qkv.shape[-1])
        scale = None if scales[0] is None else scales[0].reshape(-1, scales[0].shape[-1])
        angles = rotary_angles(positions, config.rope_theta, config.rotary_dim)
        held = cache.keys, cache.values, positions[:, 0], count, value(self.sink)
        with jax.named_scope("attention_layer"):
            y, *written = attention_layer(
                *arguments,
                scale,
                *angles,
                *held,
                self.output[...],
                scales[1],
                flags=flags,
                word=ATTENTION_WORD,
                window=config.window,
                value_scale=config.value_scale,
                epsilon=norm.epsilon,
                stream=stream,
                ahead=value(ahead),
                elsewhere=separate,
            )
        return kv.LayerCache(*written), y

    @jax.named_scope("attention_output")
    def combine(self, heads: Float[Array, "b t n v"], parallel: Parallel) -> Float[Array, "b t d"]:
        """Projects the heads back to the residual stream, summed over all devices."""
        flat = heads.reshape(*heads.shape[:2], -1)
        return parallel.sum(stored_linear(flat, self.output[...], value(self.output_scale)))

    @jax.named_scope("attention_output")
    def combine_few(
        self,
        heads: Float[Array, "b t n v"],
        ahead: nnx.Param | None,
        residual: Float[Array, "b t d"] | None,
    ) -> Float[Array, "b t d"]:
        """This device's part, for few rows of a decoded block, and what else is to be added.

        `ahead` is as in `few_token_linear`.
        """
        flat = heads.reshape(*heads.shape[:2], -1)
        weight, scale = self.output[...], value(self.output_scale)
        return few_token_linear(flat, weight, scale, residual=residual, ahead=ahead)


@jax.named_scope("attend")
def attend(
    q: Float[Array, "b t n h"],
    keys: Float[Array, "b k s h"],
    values: Float[Array, "b k s v"],
    visible,
    sink: Float[Array, "n"] | None,
) -> Float[Array, "b t n v"]:
    """Softmax attention; a sink is one more logit a head, which takes mass and adds no value.

    Sums run over s in the cache's order, and a masked key weighs exactly 0: a query's bits depend
    neither on its slot in the block nor on what masked rows hold.

    Args:
      q: queries; head i attends with key/value head i // (n / k).
      keys: rotated keys.
      values: values.
      visible: bool [b, t, s].
      sink: unscaled logits.
    """
    b, t, n, h = q.shape
    groups = keys.shape[1]
    grouped = q.reshape(b, t, groups, n // groups, h)
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * jnp.float32(h**-0.5 * LOG2E), MASKED)
    top = scores.max(axis=-1, keepdims=True)
    if sink is not None:
        logits = sink.astype(jnp.float32).reshape(1, groups, n // groups, 1, 1) * LOG2E
        top = jnp.maximum(top, logits)
    # Whole, so that weights are rounded as in the kernels, which see a part of the keys each.
    top = jnp.round(top)
    weights = jnp.where(visible[:, None, None], jnp.exp2(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp2(logits - top)
    mixed = jnp.einsum(
        "bkgts,bksv->bkgtv",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    mixed = (mixed / jnp.maximum(total, 1e-30)).astype(q.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)


def causal(
    positions: Int32[Array, "b t"], key_positions: Int32[Array, "b s"], window: int | None
) -> Array:
    """Which keys each query sees, [b, t, s]: not its future, none beyond the window or before 0."""
    q, k = positions[:, :, None], key_positions[:, None, :]
    visible = (k >= 0) & (k <= q)
    return visible if window is None else visible & (k > q - window)


def regroup(qkv: Float[Array, "k rows d"], groups: int, head_dim: int, v_head_dim: int):
    """Repeats key/value heads so that there are `groups` of them, a multiple of what is stored.

    Query heads keep their order; each new group holds its share of them and a copy of their key and
    value head.
    """
    stored, rows, d = qkv.shape
    repeats = groups // stored
    split = rows - head_dim - v_head_dim
    q = qkv[:, :split].reshape(groups, split // repeats, d)
    shared = jnp.repeat(qkv[:, split:], repeats, axis=0)
    return jnp.concatenate([q, shared], axis=1)
