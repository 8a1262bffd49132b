"""Configurations: Xiaomi's fields as released, absent ones, refusals, and counts of weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.errors import MimoError
from mimo_jax.json_files import read_json
from mimo_jax.model.dflash import Drafter
from mimo_jax.model.mimo import MiMo
from mimo_jax.presets import drafter_preset, preset

FLASH_FULL = [0, 5, 11, 17, 23, 29, 35, 41, 47]
PRO_FULL = [0, 7, 15, 23, 31, 39, 47, 55, 62, 69]


def released(name: str) -> dict:
    """The language model's part of a release's config.json, field by field."""
    pro = name.endswith("pro")
    layers, full = (70, PRO_FULL) if pro else (48, FLASH_FULL)
    first = name == "mimo-v2-flash"
    fields = {
        "architectures": ["MiMoV2FlashForCausalLM" if first else "MiMoV2ForCausalLM"],
        "model_type": "mimo_v2_flash" if first else "mimo_v2",
        "hidden_size": 6144 if pro else 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 128 if pro else 64,
        "swa_num_attention_heads": 128 if pro else 64,
        "num_key_value_heads": 8 if pro else 4,
        "swa_num_key_value_heads": 8,
        "head_dim": 192,
        "swa_head_dim": 192,
        "v_head_dim": 128,
        "swa_v_head_dim": 128,
        "partial_rotary_factor": 0.334,
        "rope_theta": 5000000 if first else 10000000,
        "swa_rope_theta": 10000,
        "attention_value_scale": 0.612 if pro else 0.707,
        "layernorm_epsilon": 1e-6 if name == "mimo-v2.6-flash" else 1e-5,
        "max_position_embeddings": 262144 if first else 1048576,
        "n_routed_experts": 384 if pro else 256,
        "vocab_size": 152576,
        "intermediate_size": 16384,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "n_shared_experts": None,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "sliding_window": 128,
        "sliding_window_size": 128,
        "attention_chunk_size": 128,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "hybrid_block_size": None,
        "moe_layer_freq": [0] + [1] * (layers - 1),
        "hybrid_layer_pattern": [0 if i in full else 1 for i in range(layers)],
        "dtype": "bfloat16",
    }
    if not first:
        fields["attention_projection_layout"] = "fused_qkv"
    if name in ("mimo-v2.5", "mimo-v2.6-flash"):
        fields |= {"eos_token_id": 151645, "pad_token_id": 151643}
        fields |= {"vision_config": {"depth": 28}, "audio_config": {}, "processor_config": {}}
    if name == "mimo-v2.5":
        fields["rope_scaling"] = {"rope_type": "default", "type": "default"}
        fields["quantization_config"] = {"quant_method": "fp8", "store_dtype": "fp8"}
    if "v2.6" in name:
        fields["moe_router_dtype"] = "bfloat16"
        fields["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "store_dtype": "mxfp4",
            "mxfp4_block_size": 32,
        }
    if name == "mimo-v2.6-flash":
        fields["num_nextn_predict_layers"] = 3
        fields["rope_parameters"] = {
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.334,
            "rope_type": "default",
        }
    return fields


NAMES = ["mimo-v2-flash", "mimo-v2.5", "mimo-v2.5-pro", "mimo-v2.6-flash", "mimo-v2.6-pro"]


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_the_released_files(name):
    config, known = ModelConfig.from_dict(released(name)), preset(name)
    for field in known.to_dict():
        # Some releases keep the first in generation_config.json alone, and leave the second out.
        if field not in ("eos_token_ids", "num_nextn_predict_layers"):
            assert getattr(config, field) == getattr(known, field), field
    assert config.attention(0).window is None
    assert config.attention(1).window == 128
    assert config.attention(0).rotary_dim == config.attention(1).rotary_dim == 64


@pytest.mark.parametrize("name", [*NAMES, "mimo-nano"])
def test_round_trip_through_json(name):
    config = preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if name != "mimo-v2-flash":
        drafter = drafter_preset(name)
        assert DrafterConfig.from_dict(json.loads(json.dumps(drafter.to_dict()))) == drafter


def test_token_zero_may_end_an_answer():
    assert ModelConfig.from_dict(released("mimo-v2.5") | {"eos_token_id": 0}).eos_token_ids == (0,)


def without(*names: str) -> dict:
    fields = released("mimo-v2-flash")
    for name in names:
        del fields[name]
    return fields


def test_absent_fields_mean_what_xiaomis_class_says():
    config = ModelConfig.from_dict(without("hybrid_layer_pattern"))
    assert config.hybrid_layer_pattern == (0,) * 48
    assert ModelConfig.from_dict(without("moe_layer_freq")).moe_layer_freq == (0,) * 48
    periodic = ModelConfig.from_dict(without("moe_layer_freq") | {"moe_layer_freq": 3})
    assert periodic.moe_layer_freq == (1, 0, 0) * 16
    assert ModelConfig.from_dict(without("attention_value_scale")).attention(1).value_scale == 1.0
    assert ModelConfig.from_dict(without("norm_topk_prob")).norm_topk_prob is True
    assert ModelConfig.from_dict(without("swa_rope_theta")).swa_rope_theta == 5e6
    heads = without("swa_num_attention_heads", "swa_num_key_value_heads")
    assert ModelConfig.from_dict(heads).swa_num_key_value_heads == 4
    # Not v_head_dim.
    assert ModelConfig.from_dict(without("swa_v_head_dim")).swa_v_head_dim == 192
    heads = ModelConfig.from_dict(
        without("head_dim", "swa_head_dim", "v_head_dim") | {"partial_rotary_factor": 0.5}
    )
    assert heads.head_dim == heads.swa_head_dim == heads.v_head_dim == 64
    assert ModelConfig.from_dict(without("sliding_window")).sliding_window == 128
    assert ModelConfig.from_dict(without("routed_scaling_factor")).routed_scaling_factor == 1.0


def test_a_period_of_full_attention():
    fields = without("hybrid_layer_pattern") | {"hybrid_block_size": 6}
    expected = tuple(0 if (i + 1) % 6 == 0 else 1 for i in range(48))
    assert ModelConfig.from_dict(fields).hybrid_layer_pattern == expected
    # Where both are there, the list says more.
    both = released("mimo-v2-flash") | {"hybrid_block_size": 6}
    assert ModelConfig.from_dict(both) == ModelConfig.from_dict(released("mimo-v2-flash"))


def test_rope_parameters_override_the_flat_fields():
    fields = released("mimo-v2-flash")
    fields["rope_parameters"] = {"rope_theta": 7e6, "partial_rotary_factor": 0.5}
    config = ModelConfig.from_dict(fields)
    assert (config.rope_theta, config.attention(0).rotary_dim) == (7e6, 96)


def test_the_window_is_a_flag():
    config = ModelConfig.from_dict(released("mimo-v2-flash") | {"window_includes_self": False})
    assert config.attention(1).window == 129


def test_end_of_sequence_ids():
    assert ModelConfig.from_dict(released("mimo-v2.5")).eos_token_ids == (151645,)
    several = released("mimo-v2.5") | {"eos_token_id": [3, 5]}
    assert ModelConfig.from_dict(several).eos_token_ids == (3, 5)
    assert ModelConfig.from_dict(released("mimo-v2-flash")).eos_token_ids == ()


REFUSED = [
    ("attention_bias", True),
    ("hidden_act", "gelu"),
    ("n_shared_experts", 1),
    ("n_group", 8),
    ("topk_group", 4),
    ("scoring_func", "softmax"),
    ("topk_method", "greedy"),
    ("tie_word_embeddings", True),
    ("moe_router_dtype", "float8"),
    ("attention_projection_layout", "interleaved"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("swa_num_attention_heads", 32),
    ("num_key_value_heads", 5),
    ("num_experts_per_tok", 257),
    ("num_experts_per_tok", 0),
    ("moe_layer_freq", [0, 1]),
    ("hybrid_layer_pattern", [2] * 48),
    ("partial_rotary_factor", 0.001),
    ("q_lora_rank", 512),
    ("logit_softcap", 30.0),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{n}={v}"[:30] for n, v in REFUSED])
def test_what_is_not_supported_is_refused_by_name(name, value):
    with pytest.raises(MimoError) as error:
        ModelConfig.from_dict(released("mimo-v2-flash") | {name: value})
    message = str(error.value)
    shown = {"rope_scaling": ("rope_type", "yarn")}.get(name, (name, None))
    assert shown[0] in message
    if name not in ("partial_rotary_factor", "moe_layer_freq"):
        assert str(shown[1] or value).strip("[]'")[:8] in message


@given(st.from_regex(r"[a-z]{3,12}_zz", fullmatch=True), st.integers())
def test_any_unknown_field_is_refused_by_name(name, value):
    with pytest.raises(MimoError, match=name):
        ModelConfig.from_dict(released("mimo-v2-flash") | {name: value})
    with pytest.raises(MimoError, match=name):
        DrafterConfig.from_dict(drafter_file("mimo-v2.5") | {name: value})


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "rope_theta", "vocab_size"])
def test_missing_fields_are_named(name):
    with pytest.raises(MimoError, match=name):
        ModelConfig.from_dict(without(name))


def drafter_file(name: str) -> dict:
    """A drafter's config.json as it is released."""
    pro = name.endswith("pro")
    old = "v2.6" not in name
    inner = {
        "mask_token_id": 151675,
        "target_layer_ids": [0, 15, 31, 47, 69] if pro else [0, 11, 23, 35, 47],
        "block_size": 8,
    }
    fields = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": 6144 if pro else 4096,
        "num_attention_heads": 128 if pro else 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 5,
        "head_dim": 128,
        "v_head_dim": 128,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000,
        "vocab_size": 152576,
        "rms_norm_eps": 1e-5 if pro else 1e-6,
        "intermediate_size": 16384,
        "attention_value_scale": 0.612,
        "add_swa_attention_sink_bias": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": 1024,
        "max_position_embeddings": 262144 if old else 1048576,
        "dflash_config": inner,
        "num_anchors": 4096,
        "loss_decay_gamma": 7.0,
    }
    if old:
        fields |= {"backbone_rotary_base": 5000000, "use_swa": True, "swa_window_size": 1024}
    else:
        fields |= {"layer_types": ["sliding_attention"] * 5, "use_sliding_window": True}
        fields["is_causal"] = False
    return fields


@pytest.mark.parametrize("name", NAMES[1:])
def test_drafter_presets_are_the_released_files(name):
    assert DrafterConfig.from_dict(drafter_file(name)) == drafter_preset(name)
    drafter_preset(name).check_target(preset(name))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", ["linear_attention"] * 5),
        ("v_head_dim", 64),
        ("block_size", 1),
        ("sliding_window", 7),
        ("num_key_value_heads", 3),
        ("target_layer_ids", []),
        # A sink without a layer that slides.
        ("use_swa", False),
        ("layer_types", ["full_attention"] * 5),
    ],
)
def test_drafters_that_are_not_supported_are_refused_by_name(name, value):
    fields = drafter_file("mimo-v2.5")
    fields["dflash_config"] = {k: v for k, v in fields["dflash_config"].items() if k != name}
    sinks = value is False or set(value if isinstance(value, list) else ()) == {"full_attention"}
    with pytest.raises(MimoError, match="add_swa_attention_sink_bias" if sinks else name):
        DrafterConfig.from_dict(fields | {name: value})


def test_a_drafter_must_fit_its_target():
    with pytest.raises(MimoError, match="target_layer_ids"):
        drafter_preset("mimo-v2.5-pro").check_target(
            ModelConfig(**(preset("mimo-v2.5").to_dict() | {"hidden_size": 6144}))
        )
    with pytest.raises(MimoError, match="hidden_size=4096"):
        drafter_preset("mimo-v2.5").check_target(preset("mimo-v2.5-pro"))


def test_unknown_presets_name_the_known_ones():
    with pytest.raises(MimoError, match="mimo-v3.*mimo-nano"):
        preset("mimo-v3")
    with pytest.raises(MimoError, match="mimo-v2-flash.*mimo-nano"):
        drafter_preset("mimo-v2-flash")


def test_files_that_are_no_json_objects(tmp_path):
    with pytest.raises(MimoError, match="does not exist"):
        read_json(tmp_path / "config.json")
    for content, words in ((b'{"a": 1,}', "not valid JSON"), (b"[]", "a list"), (b"\xff{", "JSON")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(MimoError, match=words):
            read_json(tmp_path / "config.json")


def leaves(make) -> dict[tuple, jax.ShapeDtypeStruct]:
    """The arrays of a module that is never allocated."""
    state = nnx.state(nnx.eval_shape(make))
    return {path: p.get_value() for path, p in nnx.to_flat_state(state)}


def target_leaves(name: str) -> tuple[dict[tuple, jax.ShapeDtypeStruct], dict[tuple, int]]:
    """Arrays of the three kinds of layers that there are, and how often the model has each."""
    config = preset(name)
    assert config.moe_layer_freq == (0,) + (1,) * (config.num_hidden_layers - 1)
    assert config.hybrid_layer_pattern[0] == 0
    kinds = dataclasses.replace(
        config, num_hidden_layers=3, hybrid_layer_pattern=(0, 1, 0), moe_layer_freq=(0, 1, 1)
    )
    arrays = leaves(lambda: MiMo(kinds, nnx.Rngs(0)))
    sliding = sum(config.hybrid_layer_pattern)
    times = (1, sliding, config.num_hidden_layers - 1 - sliding)
    return arrays, {path: times[path[1]] if path[0] == "layers" else 1 for path in arrays}


def count(arrays: dict[tuple, jax.ShapeDtypeStruct], times: dict[tuple, int], word="") -> int:
    """Elements of all arrays whose path holds the word; of all arrays without one."""
    return sum(
        array.size * times.get(path, 1)
        for path, array in arrays.items()
        if not word or word in path
    )


@pytest.mark.parametrize(
    ("name", "expert_bytes", "one_expert"),
    [
        ("mimo-v2.6-flash", 160_859_947_008, 13_369_344),
        ("mimo-v2.6-pro", 531_351_207_936, 20_054_016),
    ],
)
def test_bytes_of_packed_experts_are_the_published_ones(name, expert_bytes, one_expert):
    config = preset(name)
    arrays, times = target_leaves(name)
    packed = {path: a for path, a in arrays.items() if "experts" in path}
    assert {a.dtype for a in packed.values()} == {jnp.dtype(jnp.uint8)}
    assert count(packed, times) == expert_bytes
    assert one_expert * config.n_routed_experts * sum(config.moe_layer_freq) == expert_bytes
    # The router's bias is all of the model that is float32 in the file, but for FP8 scales.
    bias = {path: a for path, a in arrays.items() if "router" in path and "bias" in path}
    assert {a.dtype for a in bias.values()} == {jnp.dtype(jnp.float32)}
    assert count(bias, times) == config.n_routed_experts * sum(config.moe_layer_freq)


def test_published_count_of_mimo_v25_pro():
    """1,023,244,718,976: with three MTP layers, and a scale for each 128 x 128 tile of FP8."""
    arrays, times = target_leaves("mimo-v2.5-pro")
    d, sliding = 6144, arrays["layers", 1, "attention", "qkv"]
    attention = sliding.size + d * 128 * 128 + 128
    mtp = attention + 2 * d * d + 3 * d * 16384 + 5 * d
    assert arrays["layers", 1, "attention", "qkv"].shape == (8, 3392, d)
    tiles_qkv, tiles_mlp, tiles_expert = 8 * 27 * 48, 3 * 128 * 48, 3 * 16 * 48
    scales = 73 * tiles_qkv + 4 * tiles_mlp + 384 * 69 * tiles_expert
    assert count(arrays, times) + 3 * mtp + scales == 1_023_244_718_976


@pytest.mark.parametrize(
    ("name", "published"),
    [("mimo-v2.6-flash", 1_468_057_152), ("mimo-v2.6-pro", 2_768_316_288)],
)
def test_published_count_of_the_drafter(name, published):
    """The mask's embedding lies in a file of its own and is not counted."""
    config = drafter_preset(name)
    arrays = leaves(lambda: Drafter(config, nnx.Rngs(0)))
    mask = count(arrays, {}, "mask_embedding")
    assert count(arrays, {}) - mask == published
    assert mask == config.hidden_size


def test_shapes_of_one_layer_are_the_files():
    """Rows of the fused projection, as stored: 4 x 3392 full and 4 x 3712 sliding."""
    arrays, _ = target_leaves("mimo-v2.6-flash")
    rows = [np.prod(arrays["layers", i, "attention", "qkv"].shape[:2]) for i in (0, 1)]
    assert rows == [13568, 14848]
    assert arrays["layers", 1, "attention", "sink"].shape == (64,)
    assert ("layers", 0, "attention", "sink") not in arrays


def test_mimo_nano_is_the_big_model_in_small():
    config, drafter = preset("mimo-nano"), drafter_preset("mimo-nano")
    assert set(config.hybrid_layer_pattern) == {0, 1} and config.moe_layer_freq[0] == 0
    assert config.n_routed_experts >= 32
    assert config.num_experts_per_tok * 4 <= config.n_routed_experts
    assert config.max_position_embeddings >= max(2048, 8 * drafter.sliding_window)
    assert drafter.block_size == 8 and config.attention(1).sink
