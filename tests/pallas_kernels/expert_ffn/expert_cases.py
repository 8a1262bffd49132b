"""Random experts, routings and a slow oracle for the expert kernel's tests."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.expert_ffn import ExpertWeights
from pallas_kernels.mxfp4 import decode


def random_experts(rng, experts, d, f, scales=(118, 124)):
    """MXFP4 weights with all 16 codes and scales 2^(low - 127) to 2^(high - 128)."""

    def matrix(*shape):
        codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), dtype=np.uint8)
        return codes, rng.integers(*scales, (*shape[:-1], shape[-1] // 32), dtype=np.uint8)

    gate_up, gate_up_scale = matrix(experts, 2, f, d)
    down, down_scale = matrix(experts, d, f)
    return ExpertWeights(*map(jnp.asarray, (gate_up, down, gate_up_scale, down_scale)))


def random_routing(rng, t, k, experts):
    """Distinct ids a token and positive weights that sum to 1."""
    ids = np.argsort(rng.random((t, experts)), axis=1)[:, :k].astype(np.int32)
    shares = rng.random((t, k)).astype(np.float32) + 0.1
    return ids, shares / shares.sum(1, keepdims=True)


def oracle(x, weights, ids, routing):
    """Token by token, choice by choice, in float64."""
    experts = weights.gate_up.shape[0]
    gate_up = np.asarray(decode(weights.gate_up, weights.gate_up_scale), np.float64)
    down = np.asarray(decode(weights.down, weights.down_scale), np.float64)
    out = np.zeros(x.shape)
    for token, row in enumerate(np.asarray(x, np.float64)):
        for expert, share in zip(ids[token], routing[token], strict=True):
            if 0 <= expert < experts:
                gate, up = gate_up[expert] @ row
                out[token] += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def distance(out, ref):
    """Relative norm; NaN anywhere is infinite."""
    value = np.linalg.norm(np.asarray(out, np.float64) - ref) / np.linalg.norm(ref)
    return np.inf if np.isnan(value) else value
