"""Random checkpoints and configurations for the oracles, reproducible from a seed anywhere.

Values are chosen so that no part is idle: norm weights away from 1, sinks away from 0, routing
biases that change choices. `rng` is a `numpy.random.RandomState`, whose stream numpy promises never
to change: stored goldens depend on it.
"""

import numpy as np
from oracles.mimo_numpy import attention_shape, target_forward
from oracles.mtp_numpy import sliding_shape

MARGIN = 1e-5
"""Examples that choose an expert by less are redrawn: float32's rounding could turn the choice."""


def example(seed):
    """A target's configuration, its weights, and tokens over several windows, all from the seed."""
    rng = np.random.RandomState(seed)
    config = random_config(rng)
    weights = random_checkpoint(config, rng)
    length = 4 * config["sliding_window"] + rng.randint(1, config["sliding_window"])
    return config, weights, rng.randint(0, config["vocab_size"], length)


def fresh_example(rng, extra=0, change=None):
    """A new example whose choices of experts are no close calls, and the oracle's outputs for it.

    Args:
      rng: numpy Generator, for the seed.
      extra: keys that a sliding layer's query sees beyond the window.
      change: a function of the weights that gives those to use, or None.

    Returns:
      config, weights, tokens, logits [t, w], residuals [layers, t, d].
    """
    while True:
        config, weights, tokens = example(int(rng.integers(2**32)))
        weights = change(weights) if change else weights
        margins = []
        window = config["sliding_window"] + extra
        outputs = target_forward(weights, config, tokens, window, margins=margins)
        if min(margins) > MARGIN:
            return config, weights, tokens, *outputs


def random_checkpoint(config, rng, dtype=np.float32):
    """A target's weights under checkpoint names (split q, k, v), [out, in], in a fixed order."""
    d, vocabulary = config["hidden_size"], config["vocab_size"]
    w = {
        "model.embed_tokens.weight": rng.standard_normal((vocabulary, d)),
        "lm_head.weight": _linear(rng, vocabulary, d),
        "model.norm.weight": _norm(rng, d),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        w[prefix + "input_layernorm.weight"] = _norm(rng, d)
        w[prefix + "post_attention_layernorm.weight"] = _norm(rng, d)
        shape = attention_shape(config, layer)
        w |= _attention(rng, prefix + "self_attn.", d, shape)
        if not config["moe_layer_freq"][layer]:
            w |= _mlp(rng, prefix + "mlp.", d, config["intermediate_size"])
            continue
        experts = config["n_routed_experts"]
        w[prefix + "mlp.gate.weight"] = 2.0 * _linear(rng, experts, d)
        w[prefix + "mlp.gate.e_score_correction_bias"] = rng.uniform(0.5, 1.5, experts)
        for expert in range(experts):
            w |= _mlp(rng, f"{prefix}mlp.experts.{expert}.", d, config["moe_intermediate_size"])
    return {name: a.astype(dtype) for name, a in w.items()}


def random_drafter(config, rng, dtype=np.float32):
    """A DFlash drafter's weights under checkpoint names, and its `mask_embedding`."""
    d, dim = config["hidden_size"], config["head_dim"]
    shape = {
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": dim,
        "v_head_dim": dim,
        "sink": config["add_swa_attention_sink_bias"],
    }
    w = {
        "fc.weight": _linear(rng, d, len(config["target_layer_ids"]) * d),
        "hidden_norm.weight": _norm(rng, d),
        "norm.weight": _norm(rng, d),
        "mask_embedding": rng.standard_normal(d),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        w[prefix + "input_layernorm.weight"] = _norm(rng, d)
        w[prefix + "post_attention_layernorm.weight"] = _norm(rng, d)
        w |= _attention(rng, prefix + "self_attn.", d, shape)
        w[prefix + "self_attn.q_norm.weight"] = _norm(rng, dim)
        w[prefix + "self_attn.k_norm.weight"] = _norm(rng, dim)
        w |= _mlp(rng, prefix + "mlp.", d, config["intermediate_size"])
    return {name: a.astype(dtype) for name, a in w.items()}


def random_mtp(config, layers, rng, dtype=np.float32):
    """Weights of a target's MTP layers under checkpoint names, without `model.mtp.`."""
    d, w = config["hidden_size"], {}
    for layer in range(layers):
        prefix = f"layers.{layer}."
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            w[f"{prefix}{norm}.weight"] = _norm(rng, d)
        w[prefix + "eh_proj.weight"] = 2.0 * _linear(rng, d, 2 * d)
        w |= _attention(rng, prefix + "self_attn.", d, sliding_shape(config))
        w |= _mlp(rng, prefix + "mlp.", d, config["intermediate_size"])
    return {name: a.astype(dtype) for name, a in w.items()}


def random_config(rng):
    """A small target whose sizes are pairwise distinct, with windows that wrap often.

    Sliding layers have twice the key-value heads and the same head sizes, as transformers has it.
    """
    while True:
        config = _draw_config(rng)
        sizes = [v for v in config.values() if isinstance(v, int) and not isinstance(v, bool)]
        sizes.remove(config["swa_head_dim"])
        sizes.remove(config["swa_v_head_dim"])
        if len(set(sizes)) == len(sizes):
            return config


def _draw_config(rng):
    def pick(*options):
        return options[rng.randint(len(options))]

    kv, heads = pick((1, 4), (1, 6), (2, 8), (2, 12), (3, 12))
    layers = pick(4, 5)
    pattern = [0] + [int(rng.rand() < 0.6) for _ in range(layers - 1)]
    pattern[1 + rng.randint(layers - 1)] = 1
    head_dim, rotary = pick((24, 8), (20, 6), (36, 12), (28, 10), (44, 14))
    v_head_dim = pick(11, 13, 17, 19, 23, 29, 31, 37)
    return {
        "vocab_size": pick(149, 167, 191, 211, 233),
        "hidden_size": pick(64, 96),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "swa_num_key_value_heads": 2 * kv,
        "head_dim": head_dim,
        "swa_head_dim": head_dim,
        "v_head_dim": v_head_dim,
        "swa_v_head_dim": v_head_dim,
        "hybrid_layer_pattern": pattern,
        "moe_layer_freq": [0] + [1] * (layers - 1),
        "intermediate_size": pick(52, 68, 76, 92, 116),
        "moe_intermediate_size": pick(32, 64, 128),
        "n_routed_experts": pick(7, 9, 10, 14, 15),
        "num_experts_per_tok": pick(2, 3, 4, 5),
        "partial_rotary_factor": (rotary + 0.5) / head_dim,
        "rope_theta": pick(5e6, 1e7),
        "swa_rope_theta": pick(1e4, 3e3),
        "attention_value_scale": pick(0.707, 0.612, 0.55),
        "layernorm_epsilon": pick(1e-5, 1e-6),
        "norm_topk_prob": pick(True, True, False),
        "routed_scaling_factor": pick(1.0, 1.5),
        "sliding_window": pick(8, 16, 18, 21, 22),
        "max_position_embeddings": 512,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    }


def random_drafter_config(target, rng):
    """A small drafter for a target's configuration; its sizes are its own."""
    layers = target["num_hidden_layers"]
    taps = sorted(int(i) for i in rng.permutation(layers - 1)[: rng.randint(1, layers)])
    kv, group = ((1, 3), (2, 3), (3, 1), (2, 1))[rng.randint(4)]
    return {
        "vocab_size": target["vocab_size"],
        "hidden_size": target["hidden_size"],
        "num_hidden_layers": int(rng.randint(1, 4)),
        "num_attention_heads": kv * group,
        "num_key_value_heads": kv,
        "head_dim": 18,
        "intermediate_size": int(rng.randint(20, 60)) * 2 + 1,
        "block_size": int(rng.randint(2, 9)),
        "mask_token_id": int(target["vocab_size"] - 1),
        "target_layer_ids": taps,
        "rope_theta": 1e4,
        "sliding_window": int(rng.randint(9, 20)),
        "partial_rotary_factor": 0.45,
        "rms_norm_eps": 1e-6,
        "attention_value_scale": 0.612,
        "add_swa_attention_sink_bias": True,
    }


def _linear(rng, rows, columns):
    return rng.standard_normal((rows, columns)) / np.sqrt(columns)


def _norm(rng, size):
    return rng.uniform(0.5, 1.5, size)


def _attention(rng, prefix, d, shape):
    heads, kv = shape["heads"], shape["kv_heads"]
    w = {
        "q_proj.weight": 2.0 * _linear(rng, heads * shape["head_dim"], d),
        "k_proj.weight": 2.0 * _linear(rng, kv * shape["head_dim"], d),
        "v_proj.weight": _linear(rng, kv * shape["v_head_dim"], d),
        "o_proj.weight": _linear(rng, d, heads * shape["v_head_dim"]),
    }
    if shape["sink"]:
        w["attention_sink_bias"] = rng.uniform(-1.0, 3.0, heads)
    return {prefix + name: a for name, a in w.items()}


def _mlp(rng, prefix, d, width):
    return {
        prefix + "gate_proj.weight": 2.0 * _linear(rng, width, d),
        prefix + "up_proj.weight": 2.0 * _linear(rng, width, d),
        prefix + "down_proj.weight": _linear(rng, d, width),
    }
