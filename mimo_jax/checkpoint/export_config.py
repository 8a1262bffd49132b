"""The small files of an exported checkpoint: configurations, tokenizer, end-of-sequence ids."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from mimo_jax.checkpoint import store
from mimo_jax.checkpoint.layout import DRAFTER_FOLDER, FP8, MXFP4, Layout
from mimo_jax.config import FULL, ModelConfig
from mimo_jax.drafter_config import FULL_LAYER, SLIDING_LAYER, DrafterConfig
from mimo_jax.errors import MimoError
from mimo_jax.transformers_config import KINDS, MLPS

FORMATS = ("v2-flash", "v2.6")
OURS = ("window_includes_self", "expert_format", "eos_token_ids", "num_nextn_predict_layers")
"""Fields of ModelConfig that config.json spells otherwise, or not at all."""

CARRIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def target_fields(checkpoint: store.Checkpoint, layout: str, stored: Layout) -> dict[str, Any]:
    """config.json of the target in a layout.

    Raises:
      MimoError: if the layout's readers would compute something else.
    """
    config = checkpoint.config
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in OURS}
    if not config.window_includes_self:
        # Both kinds of readers count the query itself.
        fields["sliding_window"] = config.window
    fields |= {
        "eos_token_id": list(config.eos_token_ids),
        "dtype": {"BF16": "bfloat16", "F32": "float32"}[stored.other],
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
    }
    if layout == "v2-flash":
        return fields | _for_transformers(config)
    return fields | {
        "architectures": ["MiMoV2ForCausalLM"],
        "model_type": "mimo_v2",
        "attention_projection_layout": "fused_qkv",
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "quantization_config": _quantization(config, stored),
    }


def _quantization(config: ModelConfig, stored: Layout) -> dict[str, Any] | None:
    """As Xiaomi's files have it: quant_method speaks of dense weights, store_dtype of experts."""
    fields: dict[str, Any] = {}
    if stored.linear == FP8:
        fields |= {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "ignored_layers": [
                f"model.layers.{layer}.self_attn.o_proj"
                for layer in range(config.num_hidden_layers)
            ],
        }
    if stored.experts == MXFP4:
        fields |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    return fields or None


def _for_transformers(config: ModelConfig) -> dict[str, Any]:
    """The same model in the words of transformers' MiMoV2FlashConfig, beside Xiaomi's."""
    sliding = any(kind != FULL for kind in config.hybrid_layer_pattern)
    for name, value, allowed in (
        ("swa_head_dim", config.swa_head_dim, config.head_dim),
        ("swa_v_head_dim", config.swa_v_head_dim, config.v_head_dim),
        ("swa_num_key_value_heads", config.swa_num_key_value_heads, 2 * config.num_key_value_heads),
        ("add_swa_attention_sink_bias", config.add_swa_attention_sink_bias, True),
        ("add_full_attention_sink_bias", config.add_full_attention_sink_bias, False),
    ):
        if value != allowed and sliding:
            raise MimoError(
                f"{name}={value}: transformers' MiMoV2Flash can only have {allowed} in this model. "
                "Export with --layout v2.6."
            )
    factor = config.partial_rotary_factor
    thetas = (config.rope_theta, config.swa_rope_theta)
    return {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "rms_norm_eps": config.layernorm_epsilon,
        "layer_types": [KINDS[kind] for kind in config.hybrid_layer_pattern],
        "mlp_layer_types": [MLPS[kind] for kind in config.moe_layer_freq],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
            for kind, theta in zip(KINDS, thetas, strict=True)
        },
    }


def drafter_fields(drafter: DrafterConfig) -> dict[str, Any]:
    """config.json of the drafter, as in a release's `dflash` folder."""
    fields = dataclasses.asdict(drafter)
    windows = [drafter.attention_of(i).window for i in range(drafter.num_hidden_layers)]
    fields["layer_types"] = [FULL_LAYER if w is None else SLIDING_LAYER for w in windows]
    if not fields["causal_layers"]:
        del fields["causal_layers"]
        fields["is_causal"] = False
    inner = ("mask_token_id", "target_layer_ids")
    return {k: v for k, v in fields.items() if k not in inner} | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dflash_config": {name: fields[name] for name in inner},
    }


def write_small_files(
    checkpoint: store.Checkpoint,
    directory: Path,
    fields: dict[str, Any],
    drafter: DrafterConfig | None,
) -> None:
    """Writes configurations, and copies what belongs to the text."""
    _write(directory / "config.json", fields)
    eos = list(checkpoint.config.eos_token_ids)
    if eos:
        _write(directory / "generation_config.json", {"eos_token_id": eos})
    for name in CARRIED:
        if name in checkpoint.manifest.files:
            shutil.copyfile(checkpoint.directory / name, directory / name)
    if not (directory / "tokenizer_config.json").exists():
        _write(
            directory / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": checkpoint.config.max_position_embeddings,
                "clean_up_tokenization_spaces": False,
            },
        )
    if drafter is not None:
        (directory / DRAFTER_FOLDER).mkdir(exist_ok=True)
        _write(directory / DRAFTER_FOLDER / "config.json", drafter_fields(drafter))


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_bytes(store.to_json(fields))
