"""The shapes of drafters: DFlash, read from a config.json, and a target's own MTP layers."""

import dataclasses
from typing import Any, ClassVar

from mimo_jax.config import (
    NOT_ARCHITECTURE,
    READ_AS_WELL,
    SLIDING,
    AttentionConfig,
    ModelConfig,
    flatten_rope,
)
from mimo_jax.errors import MimoError
from mimo_jax.fields import build, check_fields, require, shown

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
        require(self.block_size >= 2, "block_size", self.block_size, "at least 2")
        kv, heads = self.num_key_value_heads, self.num_attention_heads
        fits = kv > 0 and heads % kv == 0
        require(fits, "num_key_value_heads", kv, f"a divisor of num_attention_heads={heads}")
        types, layers = self.layer_types, self.num_hidden_layers
        fits = not types or len(types) == layers and set(types) <= {FULL_LAYER, SLIDING_LAYER}
        allowed = f"{FULL_LAYER!r} or {SLIDING_LAYER!r} for each of {layers} layers"
        require(fits, "layer_types", types, allowed)
        window, block = self.sliding_window, self.block_size
        require(
            window is not None or SLIDING_LAYER not in types, "sliding_window", window, "a number"
        )
        fits = window is None or window >= block
        require(fits, "sliding_window", window, f"at least block_size={block}")
        slides = any(self.attention_of(layer).window for layer in range(layers))
        sinks = self.add_swa_attention_sink_bias
        require(slides or not sinks, "add_swa_attention_sink_bias", sinks, "false: no layer slides")
        causal = self.causal_layers
        require(all(i < layers for i in causal), "causal_layers", causal, f"below {layers}")
        ids = self.target_layer_ids
        require(len(ids) > 0 and min(ids) >= 0, "target_layer_ids", ids, "layers from 0 on")

    @property
    def attention(self) -> AttentionConfig:
        """Shapes of each layer's attention; windows and sinks may differ, and are the first's."""
        return self.attention_of(0)

    @property
    def reach(self) -> int | None:
        """Tokens back that its layers see at most; None: all."""
        windows = [self.attention_of(layer).window for layer in range(self.num_hidden_layers)]
        return None if None in windows else max(windows)

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
        require(same, "drafter hidden_size", self.hidden_size, f"the target's {target.hidden_size}")
        last = target.num_hidden_layers - 1
        ids = self.target_layer_ids
        require(max(ids) <= last, "target_layer_ids", ids, f"layers 0 to {last} of the target")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "DrafterConfig":
        """Reads a drafter's config.json, with `dflash_config` inside it or its fields beside it.

        Xiaomi's and z-lab's files are read. Where a file gives the kinds of its layers and does not
        say whether its block is causal, it is in layers that slide, as the servers that run such
        files have it.

        Raises:
          MimoError: for a field that is missing, unknown or not supported.
        """
        fields = check_fields(cls, fields, READ_AS_WELL)
        fields = check_fields(cls, fields | fields.pop("dflash_config", {}), READ_AS_WELL)
        _refuse_other_drafters(fields)
        fields = check_fields(cls, flatten_rope(fields), READ_AS_WELL)
        if fields.pop("attention_sink_bias", False):
            fields["add_swa_attention_sink_bias"] = True
        _read_layers(fields)
        names = {field.name for field in dataclasses.fields(cls)}
        for name, allowed in _DRAFTER_FIXED.items():
            if name in fields:
                value = fields.pop(name)
                require(allowed is None or value in allowed, name, value, f"one of {allowed}")
        v_head = fields.pop("v_head_dim", fields.get("head_dim"))
        require(v_head == fields.get("head_dim"), "v_head_dim", v_head, "equal to head_dim")
        for name in sorted(fields.keys() - names - NOT_ARCHITECTURE):
            raise MimoError(
                f"drafter config field {name}={shown(fields[name])} is not known to mimo_jax."
            )
        return build(cls, {name: fields[name] for name in names & fields.keys()})

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
        require(layers >= 1, "MTP num_hidden_layers", layers, "at least 1")
        # A layer's ring of `window` rows takes all rows that a round writes.
        most = window // 2
        allowed = f"at most {most}, half the target's window of {window}"
        require(layers <= most, "MTP num_hidden_layers", layers, allowed)

    @property
    def reach(self) -> int:
        """Tokens back that its layers see."""
        return self.target.window

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
            require(mine == wanted, f"the MTP layers' {name}", mine, f"the target's {wanted}")
        mine, wanted = self.attention, target.attention_of(SLIDING)
        require(mine == wanted, "the MTP layers' attention", mine, f"the target's {wanted}")

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
"""Either kind of drafter. What both have: `part`, `block_size`, `num_hidden_layers`, `reach`,
`attention`, `target_layer_ids`, `check_target` and `to_dict`."""


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
        require(fits, name, flag, f"true, or absent: layer_types has {SLIDING_LAYER!r}")
    require(window is not None or SLIDING_LAYER not in types, "sliding_window", window, "a number")
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
