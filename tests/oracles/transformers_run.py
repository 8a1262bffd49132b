"""Runs transformers' MiMoV2Flash (torch, float32, CPU) on a checkpoint dict, under our names.

transformers 5.23 shows a sliding layer's query one key more than the configured window, names sinks
differently and stacks experts; its sliding layers have twice the key-value heads of the full ones.
"""

import numpy as np

KINDS = ("full_attention", "sliding_attention")


def build_config(config):
    """transformers' configuration object for a dict with config.json's names."""
    from transformers import MiMoV2FlashConfig

    same = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim v_head_dim moe_intermediate_size num_experts_per_tok
        n_routed_experts routed_scaling_factor norm_topk_prob attention_value_scale
        max_position_embeddings""".split()
    factor = config["partial_rotary_factor"]
    thetas = (config["rope_theta"], config["swa_rope_theta"])
    built = MiMoV2FlashConfig(
        **{name: config[name] for name in same},
        rms_norm_eps=config["layernorm_epsilon"],
        layer_types=[KINDS[kind] for kind in config["hybrid_layer_pattern"]],
        mlp_layer_types=[("dense", "sparse")[kind] for kind in config["moe_layer_freq"]],
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
            for kind, theta in zip(KINDS, thetas, strict=True)
        },
        sliding_window_size=config["sliding_window"],
    )
    assert built.sliding_window == config["sliding_window"] + 1
    built._attn_implementation = "eager"
    built._experts_implementation = "eager"
    return built


def rename(weights, config):
    """The checkpoint's dict under transformers' names, experts stacked."""
    out = {}
    for name, value in weights.items():
        if ".experts." not in name:
            out[name.replace("attention_sink_bias", "sinks")] = value
    for layer, moe in enumerate(config["moe_layer_freq"]):
        if not moe:
            continue
        prefix = f"model.layers.{layer}.mlp.experts."

        def stack(part, prefix=prefix):
            count = config["n_routed_experts"]
            return np.stack([weights[f"{prefix}{e}.{part}_proj.weight"] for e in range(count)])

        out[prefix + "gate_up_proj"] = np.concatenate([stack("gate"), stack("up")], axis=1)
        out[prefix + "down_proj"] = stack("down")
    return out


def run(weights, config, tokens):
    """Logits [t, vocabulary] and the residual stream after each layer [layers, t, d], float32."""
    import torch
    from transformers import MiMoV2FlashForCausalLM

    torch.set_num_threads(1)
    model = MiMoV2FlashForCausalLM(build_config(config)).float().eval()
    state = {name: torch.from_numpy(a) for name, a in rename(weights, config).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    residuals = []

    def keep(module, arguments, output):
        residuals.append((output[0] if isinstance(output, tuple) else output)[0].numpy())

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    with torch.no_grad():
        logits = model(torch.tensor(np.asarray(tokens))[None], use_cache=False).logits
    return logits[0].numpy(), np.stack(residuals)
