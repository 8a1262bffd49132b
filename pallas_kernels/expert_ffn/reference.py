"""What the expert FFN means, in plain jnp and float32; also its implementation on CPUs."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mxfp4 import decode


def active_experts(expert_ids, num_experts):
    """Distinct valid ids, ascending and then padded with inactive ones, and how many they are."""
    chosen = jnp.zeros(num_experts, bool).at[expert_ids.reshape(-1)].set(True, mode="drop")
    return jnp.argsort(~chosen, stable=True).astype(jnp.int32), chosen.sum(dtype=jnp.int32)


def expert_ffn_reference(x, weights, expert_ids, routing):
    """Loops over the active experts in ascending order, each over all tokens; see `expert_ffn`.

    Hidden values, times their routing weight, are rounded to x's type, where the kernel rounds.
    """
    num_experts = weights.gate_up.shape[0]
    # A negative index would count from the end: dead choices go past it, where scatters drop them.
    ids = jnp.where(expert_ids < 0, num_experts, expert_ids)
    rows = jnp.arange(x.shape[0])[:, None]
    share = jnp.zeros((x.shape[0], num_experts), jnp.float32)
    share = share.at[rows, ids].add(routing.astype(jnp.float32), mode="drop")
    order, count = active_experts(ids, num_experts)
    inputs = x.astype(jnp.float32)

    def matrix(stored, scale, expert):
        stored = lax.dynamic_index_in_dim(stored, expert, keepdims=False)
        if scale is None:
            return stored.astype(jnp.float32)
        return decode(stored, lax.dynamic_index_in_dim(scale, expert, keepdims=False))

    def add_expert(i, total):
        expert = order[i]
        gate, up = jnp.einsum(
            "td,pfd->ptf", inputs, matrix(weights.gate_up, weights.gate_up_scale, expert)
        )
        # By itself: XLA's loop for CPUs (jax 0.12) over this and a factor for each row gives a row
        # other bits in another place (tests/model/test_rows.py).
        hidden = lax.optimization_barrier(jax.nn.silu(gate) * up)
        hidden = hidden * lax.dynamic_slice_in_dim(share, expert, 1, axis=1)
        hidden = hidden.astype(x.dtype).astype(jnp.float32)
        down = matrix(weights.down, weights.down_scale, expert)
        return total + jnp.einsum("tf,df->td", hidden, down)

    return lax.fori_loop(0, count, add_expert, jnp.zeros(x.shape, jnp.float32))
