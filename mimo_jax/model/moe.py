"""The mixture of experts: a float32 sigmoid router and experts in MXFP4 or dense."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax.config import ModelConfig
from mimo_jax.model.layers import INIT_SCALE, RMSNorm, value
from mimo_jax.sharding import Parallel, constant, normal, param
from pallas_kernels.expert_ffn import (
    BARRIER_WORDS,
    ExpertWeights,
    KernelWeights,
    expert_ffn,
    pack_experts,
)
from pallas_kernels.mxfp4 import BLOCK
from pallas_kernels.router import MOST_TOKENS, route

ROUTER_WORD, ATTENTION_WORD = 16, BARRIER_WORDS
"""In the words that the expert kernel keeps, one that it does not use, in which the router's kernel
counts, zero after each launch; and those after its own, for `attention_layer`.
"""


class Router(nnx.Module):
    """Chooses experts by sigmoid score plus a correction bias, and weighs them by score alone.

    The weight has the configuration's `moe_router_dtype`; logits are float32.

    The bias only balances the load ("noaux_tc", DeepSeek-V3, arXiv 2412.19437, section 2.1.2). It
    stays float32: in bfloat16 it would change one choice in six.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        experts, d = config.n_routed_experts, config.hidden_size
        # Held as stored: upcasting bfloat16 in the product is exact.
        dtype = jnp.dtype(config.moe_router_dtype)
        self.weight = param(rngs, (experts, d), (None, None), dtype, normal(INIT_SCALE))
        self.bias = param(rngs, (experts,), (None,), jnp.float32, constant(0.0))
        self.choices = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.scale = config.routed_scaling_factor

    def scores(self, x: Float[Array, "t d"]) -> Float[Array, "t e"]:
        """Sigmoid scores in float32, whatever the activations' dtype."""
        logits = jnp.einsum(
            "td,ed->te",
            x.astype(jnp.float32),
            self.weight[...].astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        return jax.nn.sigmoid(logits)

    def choose(
        self, scores: Float[Array, "t e"]
    ) -> tuple[Int32[Array, "t c"], Float[Array, "t c"]]:
        """Ids and weights of each token's experts; ties go to the lowest id."""
        _, ids = lax.top_k(
            lax.stop_gradient(scores) + self.bias[...].astype(jnp.float32), self.choices
        )
        weights = jnp.take_along_axis(scores, ids, axis=-1)
        if self.normalise:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return ids, weights * self.scale

    @jax.named_scope("router")
    def __call__(self, x: Float[Array, "t d"]) -> tuple[Int32[Array, "t c"], Float[Array, "t c"]]:
        """Ids and weights of each token's experts."""
        return self.choose(self.scores(x))


class Experts(nnx.Module):
    """All experts of a layer: MXFP4 codes with their scales, or dense matrices.

    After `pack` they are in the kernel's order: 32-bit words, cut as `plans` says.
    """

    def __init__(self, config: ModelConfig, packed: bool, dtype, rngs: nnx.Rngs):
        e, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        up_axes = ("experts", None, "expert_mlp", None)
        down_axes = ("experts", None, "expert_mlp")
        if packed:
            codes, one = (
                (lambda key, shape, _: jax.random.bits(key, shape, jnp.uint8)),
                constant(120),
            )
            self.gate_up = param(rngs, (e, 2, f, d // 2), up_axes, jnp.uint8, codes)
            self.gate_up_scale = param(rngs, (e, 2, f, d // BLOCK), up_axes, jnp.uint8, one)
            self.down = param(rngs, (e, d, f // 2), down_axes, jnp.uint8, codes)
            self.down_scale = param(rngs, (e, d, f // BLOCK), down_axes, jnp.uint8, one)
        else:
            init = normal(INIT_SCALE)
            self.gate_up = param(rngs, (e, 2, f, d), up_axes, dtype, init)
            self.down = param(rngs, (e, d, f), down_axes, dtype, init)
            self.gate_up_scale = self.down_scale = None
        self.barrier, self.plans = nnx.data(None), None

    def pack(self, more_words: int = 0) -> None:
        """Puts MXFP4 experts into the kernel's order, on one device's share of them.

        Args:
          more_words: after those that the kernel keeps, for others.
        """
        packed = pack_experts(self.weights, more_words=more_words)
        # On a mesh, a device's stages follow those of the device before it.
        axes = ("experts", "expert_mlp", None, None)
        self.gate_up = nnx.Param(packed.gate_up, logical_axes=axes)
        self.down = nnx.Param(packed.down, logical_axes=axes)
        self.barrier = nnx.Param(packed.barrier, logical_axes=(None,))
        self.gate_up_scale = self.down_scale = None
        self.plans = (packed.gate_up_plan, packed.down_plan)

    @property
    def weights(self) -> ExpertWeights | KernelWeights:
        """The arrays as `expert_ffn` takes them."""
        if self.plans is not None:
            arrays = (self.gate_up, self.down, self.barrier)
            return KernelWeights(*(a[...] for a in arrays), *self.plans)
        scales = (self.gate_up_scale, self.down_scale)
        return ExpertWeights(self.gate_up[...], self.down[...], *map(value, scales))


class MoE(nnx.Module):
    """Routes each token to its experts and sums their outputs."""

    def __init__(self, config: ModelConfig, packed: bool, dtype, rngs: nnx.Rngs):
        self.router = Router(config, rngs)
        self.experts = Experts(config, packed, dtype, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], live: Bool[Array, "b t"], parallel: Parallel
    ) -> Float[Array, "b t d"]:
        """Returns the sum over all devices; dead rows choose no expert and get zeros."""
        rows = x.reshape(-1, x.shape[-1])
        ids, routing = self.router(rows)
        ids = jnp.where(live.reshape(-1, 1), ids, -1)
        return parallel.sum(self._mix(rows, ids, routing, parallel)).reshape(x.shape)

    def decode(
        self,
        h: Float[Array, "b t d"],
        norm: RMSNorm,
        live: Bool[Array, "b t"],
        parallel: Parallel,
        ahead: nnx.Param | None = None,
    ) -> Float[Array, "b t d"]:
        """h, and added to it what the experts make of its norm, as `__call__` says.

        In programs for a GPU all up to the experts is a kernel, where a block fits it.

        Args:
          h: the residual stream.
          norm: before the experts.
          live: as in `__call__`.
          parallel: this device's place on the mesh.
          ahead: weights that are read next.
        """
        rows = h.reshape(-1, h.shape[-1])
        x, ids, routing = self.route(rows, norm, live.reshape(-1))

        def mix(residual):
            # Added in h's own shape: for a stream of five layers that changed it twice in each,
            # jaxlib 0.11.2 tiled a fusion for more than 100 s (float32 on a CPU).
            inside = residual is not None and h.dtype == jnp.bfloat16
            flat = residual.reshape(rows.shape) if inside else None
            y = self._mix(x, ids, routing, parallel, flat, ahead).reshape(h.shape)
            return y if residual is None or inside else residual + y

        return parallel.add(h, mix)

    def route(self, h, norm, live):
        """Normed rows, ids (-1 for dead rows) and weights."""
        router, experts = self.router, self.experts

        def elsewhere(h, live):
            x = norm(h)
            ids, routing = router(x)
            return x, jnp.where(live[:, None], ids, -1), routing

        packed = experts.plans is not None
        if not packed or h.dtype != jnp.bfloat16 or h.shape[0] > MOST_TOKENS:
            return elsewhere(h, live)
        with jax.named_scope("router"):
            return route(
                *(h, norm.weight[...], router.weight[...], router.bias[...]),
                choices=router.choices,
                epsilon=norm.epsilon,
                normalise=router.normalise,
                scale=router.scale,
                live=live,
                counter=experts.barrier[...],
                word=ROUTER_WORD,
                elsewhere=elsewhere,
            )

    def _mix(self, rows, ids, routing, parallel: Parallel, residual=None, ahead=None):
        """The sum of this device's experts, [t, d], and a bfloat16 residual."""
        weights = self.experts.weights
        if parallel.experts:
            # Ids of other devices' experts fall outside [0, e) here, as those of dead rows do.
            ids = ids - parallel.index * weights.gate_up.shape[0]
        with jax.named_scope("experts"):
            return expert_ffn(
                *(rows, weights, ids, routing),
                residual=residual,
                ahead=value(ahead),
                out_dtype=rows.dtype,
            )
