"""The shapes of a model and of its drafter, read from a Hugging Face config.json."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

from mimo_jax.errors import MimoError
from mimo_jax.fields import check_fields, shown
from mimo_jax.transformers_config import TYPES, to_xiaomi

FULL, SLIDING = 0, 1
"""Kinds of attention in `hybrid_layer_pattern`."""

_NOT_ARCHITECTURE = frozenset(
    # What a config.json also holds: provenance, serving, training, other modalities.
    "_name_or_path architectures attention_chunk_size attention_dropout audio_config auto_map "
    "bos_token_id dflash_config dtype eos_token_id initializer_range model_type name "
    "pad_token_id processor_config quantization_config "
    "tokenizer_class torch_dtype transformers_version use_cache vision_config "
    "audio_end_token_id audio_start_token_id audio_token_id image_token_id video_end_token_id "
    "video_start_token_id video_token_id vision_end_token_id vision_start_token_id "
    "sliding_window_size".split()
)
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
            _require(len(value) == layers, name, value, f"{layers} entries, one a layer")
            _require(set(value) <= {0, 1}, name, value, "only zeros and ones")
        for kv in ("num_key_value_heads", "swa_num_key_value_heads"):
            value = getattr(self, kv)
            fits = value > 0 and self.num_attention_heads % value == 0
            _require(
                fits, kv, value, f"a divisor of num_attention_heads={self.num_attention_heads}"
            )
        for head in ("head_dim", "swa_head_dim"):
            rotary = int(getattr(self, head) * self.partial_rotary_factor)
            _require(
                rotary > 0 and rotary % 2 == 0,
                f"int({head} * partial_rotary_factor)",
                rotary,
                "an even number, at least 2, of rotated dimensions",
            )
        if any(self.moe_layer_freq):
            chosen, experts = self.num_experts_per_tok, self.n_routed_experts
            fits = 0 < chosen <= experts
            _require(fits, "num_experts_per_tok", chosen, f"1 to n_routed_experts={experts}")
        for name, allowed in (
            ("expert_format", ("mxfp4", "dense")),
            ("moe_router_dtype", ("float32", "bfloat16")),
        ):
            value = getattr(self, name)
            _require(value in allowed, name, value, f"one of {allowed}")
        mtp = self.num_nextn_predict_layers
        _require(mtp >= 0, "num_nextn_predict_layers", mtp, "0 or more")

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
        fields = to_xiaomi(check_fields(cls, fields, _READ_AS_WELL | TYPES))
        fields = _flatten_rope(check_fields(cls, fields, _READ_AS_WELL))
        fields = check_fields(cls, fields, _READ_AS_WELL)
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
        for name in sorted(fields.keys() - names - _NOT_ARCHITECTURE):
            if name not in _FIXED:
                raise MimoError(
                    f"config field {name}={shown(fields[name])} is not known to mimo_jax. If it "
                    "changes the model, this version cannot run it; if it does not, delete it from "
                    "config.json."
                )
            _require(fields[name] in _FIXED[name], name, fields[name], f"one of {_FIXED[name]}")
        return _build(cls, {name: fields[name] for name in names & fields.keys()})

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


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """A DFlash drafter; most fields have their names in the drafter's config.json.

    `target_layer_ids` are 0-based layers of the target, whose outputs are the drafter's features.
    `layer_types` has "full_attention" or "sliding_attention" for each layer where they are mixed;
    empty, they slide if there is a `sliding_window`, and are full if there is none.
    `causal_layers` is ours: layers in which a row of the block sees only the rows before it, and
    itself; in all others the block is seen in both directions.
    """

    part: ClassVar[str] = "drafter"
    """What its parameters' names begin with."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    rope_theta: float
    sliding_window: int | None = None
    partial_rotary_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    attention_value_scale: float | None = None
    add_swa_attention_sink_bias: bool = False
    layer_types: tuple[str, ...] = ()
    causal_layers: tuple[int, ...] = ()

    def __post_init__(self):
        _require(self.block_size >= 2, "block_size", self.block_size, "at least 2")
        kv, heads = self.num_key_value_heads, self.num_attention_heads
        fits = kv > 0 and heads % kv == 0
        _require(fits, "num_key_value_heads", kv, f"a divisor of num_attention_heads={heads}")
        types, layers = self.layer_types, self.num_hidden_layers
        fits = not types or len(types) == layers and set(types) <= {FULL_LAYER, SLIDING_LAYER}
        allowed = f"{FULL_LAYER!r} or {SLIDING_LAYER!r} for each of {layers} layers"
        _require(fits, "layer_types", types, allowed)
        window, block = self.sliding_window, self.block_size
        _require(
            window is not None or SLIDING_LAYER not in types, "sliding_window", window, "a number"
        )
        fits = window is None or window >= block
        _require(fits, "sliding_window", window, f"at least block_size={block}")
        slides = any(self.attention_of(layer).window for layer in range(layers))
        sinks = self.add_swa_attention_sink_bias
        _require(
            slides or not sinks, "add_swa_attention_sink_bias", sinks, "false: no layer slides"
        )
        causal = self.causal_layers
        _require(all(i < layers for i in causal), "causal_layers", causal, f"below {layers}")
        ids = self.target_layer_ids
        _require(len(ids) > 0 and min(ids) >= 0, "target_layer_ids", ids, "layers from 0 on")

    @property
    def attention(self) -> AttentionConfig:
        """Shapes of each layer's attention; windows and sinks may differ, and are the first's."""
        return self.attention_of(0)

    def attention_of(self, layer: int) -> AttentionConfig:
        """Shapes of one layer's attention."""
        full = self.layer_types and self.layer_types[layer] == FULL_LAYER
        window = None if full else self.sliding_window
        return AttentionConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            rotary_dim=int(self.head_dim * self.partial_rotary_factor),
            rope_theta=self.rope_theta,
            window=window,
            value_scale=self.attention_value_scale or 1.0,
            sink=self.add_swa_attention_sink_bias and window is not None,
        )

    def check_target(self, target: ModelConfig) -> None:
        """Raises a MimoError unless the drafter can serve this target."""
        same = self.hidden_size == target.hidden_size
        _require(
            same, "drafter hidden_size", self.hidden_size, f"the target's {target.hidden_size}"
        )
        last = target.num_hidden_layers - 1
        ids = self.target_layer_ids
        _require(max(ids) <= last, "target_layer_ids", ids, f"layers 0 to {last} of the target")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "DrafterConfig":
        """Reads a drafter's config.json, with `dflash_config` inside it or its fields beside it.

        Xiaomi's and z-lab's files are read. Where a file gives the kinds of its layers and does not
        say whether its block is causal, it is in layers that slide, as the servers that run such
        files have it.

        Raises:
          MimoError: for a field that is missing, unknown or not supported.
        """
        fields = check_fields(cls, fields, _READ_AS_WELL)
        fields = check_fields(cls, fields | fields.pop("dflash_config", {}), _READ_AS_WELL)
        _refuse_other_drafters(fields)
        fields = check_fields(cls, _flatten_rope(fields), _READ_AS_WELL)
        if fields.pop("attention_sink_bias", False):
            fields["add_swa_attention_sink_bias"] = True
        _read_layers(fields)
        names = {field.name for field in dataclasses.fields(cls)}
        for name, allowed in _DRAFTER_FIXED.items():
            if name in fields:
                value = fields.pop(name)
                _require(allowed is None or value in allowed, name, value, f"one of {allowed}")
        v_head = fields.pop("v_head_dim", fields.get("head_dim"))
        _require(v_head == fields.get("head_dim"), "v_head_dim", v_head, "equal to head_dim")
        for name in sorted(fields.keys() - names - _NOT_ARCHITECTURE):
            raise MimoError(
                f"drafter config field {name}={shown(fields[name])} is not known to mimo_jax."
            )
        return _build(cls, {name: fields[name] for name in names & fields.keys()})

    def to_dict(self) -> dict[str, Any]:
        """The fields as a config.json holds them; `from_dict` reads them back."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class MTPConfig:
    """A target's multi-token-prediction layers, which draft one token each.

    Widths, epsilon and the sliding layers' attention are the target's own.

    Attributes:
      target: the model that they were trained with.
      num_hidden_layers: how many; Xiaomi's releases have 3.
      hidden_normed: whether they take the target's hidden state after its final norm. Which one
        they were trained with is not published: servers pass the normed state, but a float32
        implementation that compared the two found the one before the norm to agree with the target
        more often, at every depth and on every text, so that this is the default. Drafts depend on
        it, answers do not.
    """

    part: ClassVar[str] = "mtp"
    """What its parameters' names begin with."""

    target: ModelConfig
    num_hidden_layers: int = 3
    hidden_normed: bool = False

    def __post_init__(self):
        layers, window = self.num_hidden_layers, self.target.window
        _require(layers >= 1, "MTP num_hidden_layers", layers, "at least 1")
        # A layer's ring of `window` rows takes all rows that a round writes.
        most = window // 2
        allowed = f"at most {most}, half the target's window of {window}"
        _require(layers <= most, "MTP num_hidden_layers", layers, allowed)

    @property
    def block_size(self) -> int:
        """Rows of a verified block: the anchor, and a draft of each layer."""
        return self.num_hidden_layers + 1

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """The layer of the target whose output they take."""
        return (self.target.num_hidden_layers - 1,)

    @property
    def attention(self) -> AttentionConfig:
        """Shapes of each layer's attention."""
        return self.target.attention_of(SLIDING)

    def check_target(self, target: ModelConfig) -> None:
        """Raises a MimoError unless the layers can serve this target."""
        shapes = (
            "hidden_size",
            "num_hidden_layers",
            "intermediate_size",
            "layernorm_epsilon",
        )
        for name in shapes:
            mine, wanted = getattr(self.target, name), getattr(target, name)
            _require(mine == wanted, f"the MTP layers' {name}", mine, f"the target's {wanted}")
        mine, wanted = self.attention, target.attention_of(SLIDING)
        _require(mine == wanted, "the MTP layers' attention", mine, f"the target's {wanted}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any], target: ModelConfig) -> "MTPConfig":
        """Reads what `to_dict` gave, for that target.

        Raises:
          MimoError: for a field that is missing, unknown or not supported.
        """
        names = {field.name for field in dataclasses.fields(cls)} - {"target"}
        checked = check_fields(cls, fields)
        if checked.keys() != names:
            raise MimoError(
                f"An MTP configuration has the fields {', '.join(sorted(names))}; this one has "
                f"{', '.join(sorted(checked)) or 'none'}."
            )
        return cls(target, **checked)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not the target's, for JSON; `from_dict` reads them back."""
        return {"num_hidden_layers": self.num_hidden_layers, "hidden_normed": self.hidden_normed}


AnyDrafterConfig = DrafterConfig | MTPConfig
"""Either kind of drafter. What both have: `part`, `block_size`, `num_hidden_layers`, `attention`,
`target_layer_ids`, `check_target` and `to_dict`."""


FULL_LAYER, SLIDING_LAYER = "full_attention", "sliding_attention"
"""Kinds of attention in a drafter's `layer_types`."""

_OTHER_DRAFTERS = {
    # Fields of drafters that are none of ours, and the values that change nothing.
    "DFlash2's convolutions": ("conv_kernel_size", "conv_group_size"),
    "DFlash2's candidate selector": ("selector_rank", "selector_top_k"),
    "DSpark's heads": ("markov_rank", "markov_head_rank", "confidence_head", "runtime_block_size"),
    "the format of speculators": (
        "transformer_layer_config",
        "speculators_model_type",
        "speculators_config",
        "aux_hidden_state_layer_ids",
    ),
    "a vocabulary of its own (t2d and d2t)": ("draft_vocab_size",),
    "drafts from the anchor's row": ("sample_from_anchor",),
    "interleaved RoPE": ("rope_is_neox_style", "rope_interleaved"),
    "scaled embeddings or logits": (
        "input_embedding_scale",
        "output_multiplier",
        "final_logit_softcapping",
    ),
}
_NEUTRAL = {"sample_from_anchor": False, "rope_is_neox_style": True, "rope_interleaved": False}
_OTHER_ARCHITECTURES = ("DFlash2", "DSpark", "Eagle", "Medusa", "Domino")

_DRAFTER_FIXED = {
    # None: read by nothing in the forward pass; for training and serving.
    "attention_bias": (False,),
    "backbone_rotary_base": None,
    "hidden_act": ("silu",),
    "loss_decay_gamma": None,
    "max_position_embeddings": None,
    "max_window_layers": None,
    "num_anchors": None,
    "num_target_layers": None,
    "rope_scaling": (None,),
    "tie_word_embeddings": None,
}


_READ_AS_WELL = {
    # Fields that are none of ours, but that ours are made from.
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


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object from a file, with an error that names the file."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MimoError(f"{path} does not exist: give the directory of a checkpoint.") from None
    return parse_json(data, str(path))


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in bytes that may come from strangers.

    Args:
      data: UTF-8 text.
      what: the file's name, for errors.

    Raises:
      MimoError: if it is not JSON, not an object, or has a key twice (whose values may differ).
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant
        )
    except RecursionError:
        raise MimoError(f"{what} is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:  # Also of bytes that are no UTF-8, and of endless integers.
        raise MimoError(f"{what} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise MimoError(f"{what} holds a {type(value).__name__}; it must hold one JSON object.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must be different, and strings that can be printed."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {ascii(twice)[:200]} is there twice")
    for key in value:
        if not key.isascii():
            key.encode()  # Raises for halves of surrogate pairs.
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _require(fits: bool, name: str, value: Any, allowed: str) -> None:
    if not fits:
        raise MimoError(f"{name}={shown(value)} is not allowed: it must be {allowed}.")


def _flatten_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` overrides the flat fields; a `rope_scaling` of type default means none."""
    rope = fields.pop("rope_parameters", None) or {}
    scaling = fields.pop("rope_scaling", None) or {}
    for source in (rope, scaling):
        kind = source.get("rope_type", source.get("type", "default"))
        _require(kind == "default", "rope_type", kind, "'default'")
    fields |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return fields


def _refuse_other_drafters(fields: dict[str, Any]) -> None:
    """Raises a MimoError that names what a drafter has and this package does not."""
    names = fields.get("architectures") or ()
    for name in names if isinstance(names, list | tuple) else ():
        if any(word in str(name) for word in _OTHER_ARCHITECTURES):
            raise MimoError(
                f"architectures={shown(names)}: this kind of drafter is not supported. DFlash "
                "drafters, DFlashDraftModel, are."
            )
    for what, known in _OTHER_DRAFTERS.items():
        for name in known:
            neutral = fields.get("vocab_size") if name == "draft_vocab_size" else _NEUTRAL.get(name)
            if fields.pop(name, None) not in (None, neutral):
                raise MimoError(
                    f"The drafter has {what} ({name} in its config.json), which is not supported: "
                    "take a DFlash drafter without."
                )
    for source in (fields.get("rope_scaling"), fields.get("rope_parameters")):
        kind = (source or {}).get("rope_type", (source or {}).get("type", "default"))
        if kind != "default":
            raise MimoError(
                f"The drafter has scaled RoPE (rope_type={shown(kind)}), YaRN or another, which is "
                "not supported: take a drafter without."
            )


def _read_layers(fields: dict[str, Any]) -> None:
    """Turns what files say of a drafter's layers into `layer_types` and `causal_layers` of ours."""
    window = fields.pop("swa_window_size", None)
    window = fields.pop("sliding_window", window)
    types = list(fields.pop("layer_types", ()))
    flags = {name: fields.pop(name, None) for name in ("use_sliding_window", "use_swa")}
    for name, flag in flags.items():
        fits = flag is not False or SLIDING_LAYER not in types
        _require(fits, name, flag, f"true, or absent: layer_types has {SLIDING_LAYER!r}")
    _require(window is not None or SLIDING_LAYER not in types, "sliding_window", window, "a number")
    causal, again = fields.pop("causal", None), fields.pop("is_causal", None)
    causal = causal if again is None else again
    if causal is None:
        sliding = [layer for layer, kind in enumerate(types) if kind == SLIDING_LAYER]
    else:
        sliding = list(range(fields.get("num_hidden_layers", 0))) if causal else []
    fields.setdefault("causal_layers", sliding)
    full = set(types) == {FULL_LAYER} or not types and False in flags.values()
    fields["sliding_window"] = None if full else window
    alike = set(types) in ({FULL_LAYER}, {SLIDING_LAYER})
    fields["layer_types"] = [] if alike else types


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
    _require(
        swa_heads == heads, "swa_num_attention_heads", swa_heads, f"num_attention_heads={heads}"
    )


def _build(cls, values: dict[str, Any]):
    """Constructs a config, lists as tuples, and names the required fields that are missing."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    fields = dataclasses.fields(cls)
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    for field in fields:
        # JSON writers drop the point of a whole number: rope_theta is 5000000 in Xiaomi's files.
        if field.type in (float, float | None) and type(values.get(field.name)) is int:
            values[field.name] = float(values[field.name])
    values = check_fields(cls, values)
    missing = sorted(required - values.keys())
    if missing:
        raise MimoError(f"config.json lacks {', '.join(missing)}, which {cls.__name__} needs.")
    return cls(**values)
