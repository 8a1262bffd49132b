"""Configurations by name: Xiaomi's releases and our mimo-nano."""

import dataclasses

from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import FULL_LAYER, SLIDING_LAYER, DrafterConfig
from mimo_jax.errors import MimoError

_FLASH_FULL = (0, 5, 11, 17, 23, 29, 35, 41, 47)
_PRO_FULL = (0, 7, 15, 23, 31, 39, 47, 55, 62, 69)


def _pattern(layers: int, full: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(0 if layer in full else 1 for layer in range(layers))


_V2_FLASH = ModelConfig(
    vocab_size=152576,
    hidden_size=4096,
    num_hidden_layers=48,
    num_attention_heads=64,
    num_key_value_heads=4,
    swa_num_key_value_heads=8,
    head_dim=192,
    v_head_dim=128,
    swa_head_dim=192,
    swa_v_head_dim=128,
    hybrid_layer_pattern=_pattern(48, _FLASH_FULL),
    moe_layer_freq=(0,) + (1,) * 47,
    intermediate_size=16384,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
    partial_rotary_factor=0.334,
    rope_theta=5e6,
    swa_rope_theta=1e4,
    sliding_window=128,
    max_position_embeddings=262144,
    attention_value_scale=0.707,
    expert_format="dense",
    eos_token_ids=(151645, 151643),
    num_nextn_predict_layers=3,
)
_V25 = dataclasses.replace(_V2_FLASH, rope_theta=1e7, max_position_embeddings=1048576)
_V25_PRO = dataclasses.replace(
    _V25,
    hidden_size=6144,
    num_hidden_layers=70,
    num_attention_heads=128,
    num_key_value_heads=8,
    hybrid_layer_pattern=_pattern(70, _PRO_FULL),
    moe_layer_freq=(0,) + (1,) * 69,
    n_routed_experts=384,
    attention_value_scale=0.612,
)
_NANO = ModelConfig(
    vocab_size=3072,
    hidden_size=256,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=2,
    swa_num_key_value_heads=4,
    head_dim=48,
    v_head_dim=32,
    swa_head_dim=48,
    swa_v_head_dim=32,
    hybrid_layer_pattern=(0, 1, 0, 1, 1),
    moe_layer_freq=(0, 1, 1, 1, 1),
    intermediate_size=768,
    moe_intermediate_size=256,
    n_routed_experts=32,
    num_experts_per_tok=4,
    partial_rotary_factor=0.334,
    rope_theta=1e5,
    swa_rope_theta=1e4,
    sliding_window=128,
    max_position_embeddings=2048,
    attention_value_scale=0.707,
)
_MODELS = {
    "mimo-nano": _NANO,
    "mimo-v2-flash": _V2_FLASH,
    "mimo-v2.5": _V25,
    "mimo-v2.5-pro": _V25_PRO,
    "mimo-v2.6-flash": dataclasses.replace(
        _V25, layernorm_epsilon=1e-6, expert_format="mxfp4", moe_router_dtype="bfloat16"
    ),
    "mimo-v2.6-pro": dataclasses.replace(
        _V25_PRO, expert_format="mxfp4", moe_router_dtype="bfloat16"
    ),
}

_FLASH_DRAFTER = DrafterConfig(
    vocab_size=152576,
    hidden_size=4096,
    num_hidden_layers=5,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=16384,
    block_size=8,
    mask_token_id=151675,
    target_layer_ids=(0, 11, 23, 35, 47),
    rope_theta=1e4,
    sliding_window=1024,
    partial_rotary_factor=0.5,
    attention_value_scale=0.612,
    add_swa_attention_sink_bias=True,
)
_PRO_DRAFTER = dataclasses.replace(
    _FLASH_DRAFTER,
    hidden_size=6144,
    num_attention_heads=128,
    target_layer_ids=(0, 15, 31, 47, 69),
    rms_norm_eps=1e-5,
)
_DRAFTERS = {
    "mimo-nano": dataclasses.replace(
        _FLASH_DRAFTER,
        vocab_size=3072,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=448,
        mask_token_id=3,
        target_layer_ids=(0, 1, 2, 3, 4),
        sliding_window=256,
        layer_types=2 * (SLIDING_LAYER, SLIDING_LAYER, FULL_LAYER),
    ),
    "mimo-v2.5": _FLASH_DRAFTER,
    "mimo-v2.6-flash": _FLASH_DRAFTER,
    "mimo-v2.5-pro": _PRO_DRAFTER,
    "mimo-v2.6-pro": _PRO_DRAFTER,
}

ENCODERS = {
    "mimo-v2.6-flash": (459, 989_721_600),
    "mimo-v2.6-pro": (459, 1_033_761_792),
}
"""Tensors of vision and audio encoders in a release, and their elements, all BF16. The numbers of
tensors are published (364 vision, 75 audio, 20 speech embeddings); the elements are what remains of
the published BF16 elements after the language model's and the MTP layers' own, so that they are
measured, not derived from a layout of the encoders, which this package does not read."""


def preset_names(*, drafter: bool = False) -> tuple[str, ...]:
    """The names that `preset` knows, or those that `drafter_preset` knows."""
    return tuple(sorted(_DRAFTERS if drafter else _MODELS))


def preset(name: str) -> ModelConfig:
    """The target configuration of that name.

    Raises:
      MimoError: if there is none; the message lists the names.
    """
    if name not in _MODELS:
        raise MimoError(f"preset {name!r} does not exist; there are {', '.join(sorted(_MODELS))}.")
    return _MODELS[name]


def drafter_preset(name: str) -> DrafterConfig:
    """The DFlash drafter's configuration for the target of that name.

    Raises:
      MimoError: if there is none; the message lists the names.
    """
    if name not in _DRAFTERS:
        raise MimoError(f"no drafter preset {name!r}; there are {', '.join(sorted(_DRAFTERS))}.")
    return _DRAFTERS[name]
