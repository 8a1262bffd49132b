"""The oracle's checkpoint dicts as our modules: the map of names and layouts that tests use."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.checkpoint.flat import unflatten
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig, MTPConfig
from mimo_jax.model.dflash import Drafter
from mimo_jax.model.mimo import MiMo
from mimo_jax.model.mtp import MTP
from mimo_jax.quant import mxfp4
from pallas_kernels.mxfp4 import BLOCK

NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
MTP_NORMS = {
    "token_norm": "enorm",
    "hidden_norm": "hnorm",
    "input_norm": "input_layernorm",
    "post_norm": "pre_mlp_layernorm",
    "norm": "final_layernorm",
}


def target(config: dict, weights: dict, *, extra: int = 0, packed: bool = False) -> MiMo:
    """A float32 MiMo; `packed` quantises its experts, so that their values must be MXFP4's."""
    built = ModelConfig.from_dict(config | {"window_includes_self": not extra})
    arrays = {
        "embedding": weights["model.embed_tokens.weight"],
        "head": weights["lm_head.weight"],
        "norm.weight": weights["model.norm.weight"],
    }
    for layer in range(built.num_hidden_layers):
        kv_heads = built.attention(layer).num_kv_heads
        source = under(weights, f"model.layers.{layer}.")
        moe = built.moe_layer_freq[layer]
        parts = {f"{ours}.weight": source[f"{theirs}.weight"] for ours, theirs in NORMS.items()}
        parts |= _prefix("attention.", _attention(under(source, "self_attn."), kv_heads))
        ffn = under(source, "mlp.")
        parts |= _prefix("ffn.", _moe(ffn, packed) if moe else _mlp(ffn))
        arrays |= _prefix(f"layers.{layer}.", parts)
    return _build(lambda: MiMo(built, nnx.Rngs(0), packed=packed, dtype=np.float32), arrays)


def drafter(config: dict, weights: dict) -> Drafter:
    """A float32 drafter."""
    built = DrafterConfig.from_dict(config)
    arrays = {
        "features": weights["fc.weight"],
        "context_norm.weight": weights["hidden_norm.weight"],
        "norm.weight": weights["norm.weight"],
        "mask_embedding": weights["mask_embedding"],
    }
    kv_heads = built.num_key_value_heads
    for layer in range(built.num_hidden_layers):
        source = under(weights, f"layers.{layer}.")
        attention = under(source, "self_attn.")
        parts = {f"{ours}.weight": source[f"{theirs}.weight"] for ours, theirs in NORMS.items()}
        parts |= {
            "attention.query": attention["q_proj.weight"],
            "attention.kv": _grouped(attention, "kv", kv_heads),
            "attention.output": attention["o_proj.weight"],
            "attention.query_norm.weight": attention["q_norm.weight"],
            "attention.key_norm.weight": attention["k_norm.weight"],
            "attention.sink": attention["attention_sink_bias"],
        }
        arrays |= _prefix(f"layers.{layer}.", parts | _prefix("mlp.", _mlp(under(source, "mlp."))))
    return _build(lambda: Drafter(built, nnx.Rngs(0), dtype=np.float32), arrays)


def mtp(config: dict, weights: dict, *, layers: int, hidden_normed: bool) -> MTP:
    """A float32 MTP of the oracle's `model.mtp.layers.*`."""
    built = MTPConfig(ModelConfig.from_dict(config), layers, hidden_normed)
    arrays = {}
    for layer in range(layers):
        source = under(weights, f"layers.{layer}.")
        parts = {f"{ours}.weight": source[f"{theirs}.weight"] for ours, theirs in MTP_NORMS.items()}
        parts["projection"] = source["eh_proj.weight"]
        attention = _attention(under(source, "self_attn."), built.attention.num_kv_heads)
        parts |= _prefix("attention.", attention) | _prefix("ffn.", _mlp(under(source, "mlp.")))
        arrays |= _prefix(f"layers.{layer}.", parts)
    return _build(lambda: MTP(built, nnx.Rngs(0), dtype=np.float32), arrays)


def round_experts(weights: dict) -> dict:
    """The same checkpoint with each expert's weights rounded to MXFP4 values."""
    out = dict(weights)
    for name, value in weights.items():
        if ".experts." in name:
            assert value.shape[-1] % BLOCK == 0, (name, value.shape)
            out[name] = np.asarray(mxfp4.fake_quantize(jnp.asarray(value)))
    return out


def under(weights: dict, prefix: str) -> dict:
    """The entries whose names begin with prefix, without it."""
    return {n[len(prefix) :]: a for n, a in weights.items() if n.startswith(prefix)}


def _build(make, arrays):
    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, unflatten(state, {n: jnp.asarray(a) for n, a in arrays.items()}))


def _prefix(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


def _grouped(source, letters, groups):
    parts = (source[f"{letter}_proj.weight"] for letter in letters)
    return np.concatenate([p.reshape(groups, -1, p.shape[-1]) for p in parts], axis=1)


def _attention(source, kv_heads):
    out = {"qkv": _grouped(source, "qkv", kv_heads), "output": source["o_proj.weight"]}
    if "attention_sink_bias" in source:
        out["sink"] = source["attention_sink_bias"]
    return out


def _mlp(source):
    gate_up = np.stack([source["gate_proj.weight"], source["up_proj.weight"]])
    return {"gate_up": gate_up, "down": source["down_proj.weight"]}


def _moe(source, packed):
    experts = range(source["gate.weight"].shape[0])
    each = [_mlp(under(source, f"experts.{e}.")) for e in experts]
    out = {
        "router.weight": source["gate.weight"],
        "router.bias": source["gate.e_score_correction_bias"],
    }
    for name in ("gate_up", "down"):
        stacked = np.stack([expert[name] for expert in each])
        if packed:
            codes, scales = (np.asarray(a) for a in mxfp4.quantize(jnp.asarray(stacked)))
            out |= {f"experts.{name}": codes, f"experts.{name}_scale": scales}
        else:
            out[f"experts.{name}"] = stacked
    return out
