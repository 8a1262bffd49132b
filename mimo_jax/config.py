"""The shapes of a model, read from a Hugging Face config.json."""

import dataclasses
import math
from typing import Any

from mimo_jax.errors import MimoError
from mimo_jax.fields import build, check_fields, require, shown
from mimo_jax.transformers_config import TYPES, to_xiaomi

FULL, SLIDING = 0, 1
"""Kinds of attention in `hybrid_layer_pattern`."""

NOT_ARCHITECTURE = frozenset(
    "_name_or_path architectures attention_chunk_size attention_dropout audio_config auto_map "
    "bos_token_id dflash_config dtype eos_token_id initializer_range model_type name "
    "pad_token_id processor_config quantization_config "
    "tokenizer_class torch_dtype transformers_version use_cache vision_config "
    "audio_end_token_id audio_start_token_id audio_token_id image_token_id video_end_token_id "
    "video_start_token_id video_token_id vision_end_token_id vision_start_token_id "
    "sliding_window_size".split()
)
"""What a config.json also holds: provenance, serving, training, other modalities."""

_FIXED = {
    # Fields whose other values would be another architecture.
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "n_group": (1, None),
    "n_shared_experts": (None, 0),
    "scoring_func": ("sigmoid",),
    "tie_word_embeddings": (False,),
    "topk_group": (1, None),
    "topk_method": ("noaux_tc",),
    "attention_projection_layout": (None, "split", "fused_qkv"),
}

READ_AS_WELL = {
    "causal": bool,
    "dflash_config": dict,
    "eos_token_id": int | tuple[int, ...],
    "hybrid_block_size": int,
    "is_causal": bool,
    "layer_types": tuple[str, ...],
    "moe_layer_freq": int | tuple[int, ...],
    "quantization_config": dict,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "sliding_window_size": int,
    "swa_num_attention_heads": int,
    "swa_window_size": int,
    "use_sliding_window": bool,
    "use_swa": bool,
}
"""Types of fields that are none of ours, but that ours are made from."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A MiMo target model; the fields have their names in Xiaomi's config.json.

    `window_includes_self` is ours: a sliding layer's query sees `sliding_window` keys, itself among
    them. Xiaomi's own code does this; transformers 5.23 shows one more key (set it to False).
    `num_nextn_predict_layers` counts the MTP layers; most of Xiaomi's files leave it out although
    three are shipped, so that whoever opens one counts them and sets it.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    swa_num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    swa_head_dim: int
    swa_v_head_dim: int
    hybrid_layer_pattern: tuple[int, ...]
    moe_layer_freq: tuple[int, ...]
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    partial_rotary_factor: float
    rope_theta: float
    swa_rope_theta: float
    sliding_window: int
    max_position_embeddings: int
    layernorm_epsilon: float = 1e-5
    attention_value_scale: float | None = None
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    add_swa_attention_sink_bias: bool = True
    add_full_attention_sink_bias: bool = False
    window_includes_self: bool = True
    expert_format: str = "mxfp4"
    eos_token_ids: tuple[int, ...] = ()
    moe_router_dtype: str = "float32"
    num_nextn_predict_layers: int = 0

    def __post_init__(self):
        layers = self.num_hidden_layers
        for name in ("hybrid_layer_pattern", "moe_layer_freq"):
            value = getattr(self, name)
            require(len(value) == layers, name, value, f"{layers} entries, one a layer")
            require(set(value) <= {0, 1}, name, value, "only zeros and ones")
        for kv in ("num_key_value_heads", "swa_num_key_value_heads"):
            value = getattr(self, kv)
            fits = value > 0 and self.num_attention_heads % value == 0
            require(fits, kv, value, f"a divisor of num_attention_heads={self.num_attention_heads}")
        for head in ("head_dim", "swa_head_dim"):
            rotary = int(getattr(self, head) * self.partial_rotary_factor)
            require(
                rotary > 0 and rotary % 2 == 0,
                f"int({head} * partial_rotary_factor)",
                rotary,
                "an even number, at least 2, of rotated dimensions",
            )
        if any(self.moe_layer_freq):
            chosen, experts = self.num_experts_per_tok, self.n_routed_experts
            fits = 0 < chosen <= experts
            require(fits, "num_experts_per_tok", chosen, f"1 to n_routed_experts={experts}")
        for name, allowed in (
            ("expert_format", ("mxfp4", "dense")),
            ("moe_router_dtype", ("float32", "bfloat16")),
        ):
            value = getattr(self, name)
            require(value in allowed, name, value, f"one of {allowed}")
        mtp = self.num_nextn_predict_layers
        require(mtp >= 0, "num_nextn_predict_layers", mtp, "0 or more")

    @property
    def window(self) -> int:
        """Keys that a query of a sliding layer sees, itself included."""
        return self.sliding_window + (not self.window_includes_self)

    def attention(self, layer: int) -> "AttentionConfig":
        """Shapes of one layer's attention."""
        return self.attention_of(self.hybrid_layer_pattern[layer])

    def attention_of(self, kind: int) -> "AttentionConfig":
        """Shapes of `FULL` or `SLIDING` attention; the MTP layers' is sliding."""
        full = kind == FULL
        head = self.head_dim if full else self.swa_head_dim
        return AttentionConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads if full else self.swa_num_key_value_heads,
            head_dim=head,
            v_head_dim=self.v_head_dim if full else self.swa_v_head_dim,
            rotary_dim=int(head * self.partial_rotary_factor),
            rope_theta=self.rope_theta if full else self.swa_rope_theta,
            window=None if full else self.window,
            value_scale=self.attention_value_scale or 1.0,
            sink=self.add_full_attention_sink_bias if full else self.add_swa_attention_sink_bias,
        )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """Reads the fields of a config.json; absent ones get the meaning that Xiaomi's code gives.

        Raises:
          MimoError: for an architecture field that is unknown or has a value that is not supported.
        """
        fields = to_xiaomi(check_fields(cls, fields, READ_AS_WELL | TYPES))
        fields = flatten_rope(check_fields(cls, fields, READ_AS_WELL))
        fields = check_fields(cls, fields, READ_AS_WELL)
        eos = fields.get("eos_token_id")
        quantization = fields.get("quantization_config") or {}
        stored_fp4 = quantization.get("store_dtype") == "mxfp4"
        fields.setdefault("expert_format", "mxfp4" if stored_fp4 else "dense")
        fields.setdefault(
            "eos_token_ids", [] if eos is None else [eos] if isinstance(eos, int) else eos
        )
        _apply_defaults(fields)
        fields.pop("swa_num_attention_heads", None)
        names = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(fields.keys() - names - NOT_ARCHITECTURE):
            if name not in _FIXED:
                raise MimoError(
                    f"config field {name}={shown(fields[name])} is not known to mimo_jax. If it "
                    "changes the model, this version cannot run it; if it does not, delete it from "
                    "config.json."
                )
            require(fields[name] in _FIXED[name], name, fields[name], f"one of {_FIXED[name]}")
        return build(cls, {name: fields[name] for name in names & fields.keys()})

    def to_dict(self) -> dict[str, Any]:
        """The fields as a config.json holds them; `from_dict` reads them back."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One attention layer, of the target or of the drafter. `window` None is full attention."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rotary_dim: int
    rope_theta: float
    window: int | None
    value_scale: float
    sink: bool

    @property
    def scale_unit(self) -> int:
        """Rows of an FP8 fused projection that share scales: of one head and of one tile of 128."""
        return math.gcd(128, self.head_dim, self.v_head_dim)


def flatten_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` overrides the flat fields; a `rope_scaling` of type default means none."""
    rope = fields.pop("rope_parameters", None) or {}
    scaling = fields.pop("rope_scaling", None) or {}
    for source in (rope, scaling):
        kind = source.get("rope_type", source.get("type", "default"))
        require(kind == "default", "rope_type", kind, "'default'")
    fields |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return fields


def _apply_defaults(fields: dict[str, Any]) -> None:
    """Fills absent fields in as Xiaomi's configuration class does."""
    layers = fields.get("num_hidden_layers", 0)
    heads = fields.get("num_attention_heads", 1)
    window = fields.get("sliding_window_size", 128)
    freq = fields.get("moe_layer_freq")
    if isinstance(freq, int):
        fields["moe_layer_freq"] = [int(i % freq == 0) for i in range(layers)]
    fields.setdefault("head_dim", fields.get("hidden_size", 0) // heads)
    # Every period-th layer is full; without a period all are.
    period = fields.pop("hybrid_block_size", None) or 1
    defaults = {
        "hybrid_layer_pattern": [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)],
        "moe_layer_freq": [0] * layers,
        "v_head_dim": fields["head_dim"],
        "swa_head_dim": fields["head_dim"],
        "swa_num_key_value_heads": fields.get("num_key_value_heads"),
        "swa_rope_theta": fields.get("rope_theta"),
        "partial_rotary_factor": 1.0,
        "sliding_window": window,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "moe_router_dtype": "float32",
        "num_nextn_predict_layers": 0,
    }
    for name, value in defaults.items():
        if fields.get(name) is None:
            fields[name] = value
    if fields.get("swa_v_head_dim") is None:
        fields["swa_v_head_dim"] = fields["swa_head_dim"]
    swa_heads = fields.get("swa_num_attention_heads") or heads
    require(
        swa_heads == heads, "swa_num_attention_heads", swa_heads, f"num_attention_heads={heads}"
    )
