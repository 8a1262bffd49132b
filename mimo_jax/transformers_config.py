"""MiMo-V2-Flash's configuration as transformers spells it, put into Xiaomi's words."""

from typing import Any

from mimo_jax.errors import MimoError
from mimo_jax.fields import shown

KINDS = ("full_attention", "sliding_attention")
"""Kinds of attention by their numbers in Xiaomi's `hybrid_layer_pattern`."""

MLPS = ("dense", "sparse")
"""Kinds of feed-forward layers by their numbers in Xiaomi's `moe_layer_freq`."""

TYPES = {
    "layer_types": tuple[str, ...],
    "mlp_layer_types": tuple[str, ...],
    "rms_norm_eps": float,
    "rope_parameters": dict,
}
ONLY = frozenset({"mlp_layer_types", "output_router_logits", "rms_norm_eps"})
"""Fields that nobody else has."""


def to_xiaomi(fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields under Xiaomi's names; those of another spelling come back as they are.

    transformers' sliding layers have twice as many key/value heads as full ones, the same head
    sizes, and sinks; its `sliding_window` counts the query itself. Where a file has both spellings
    (as `mimo export` writes it) they must agree.

    Args:
      fields: of a config.json, of the types in `TYPES`.

    Raises:
      MimoError: for a kind of layer that is not known, or two spellings that differ.
    """
    if "layer_types" not in fields or "mlp_layer_types" not in fields:
        return fields
    kept = {k: v for k, v in fields.items() if k not in ONLY | {"layer_types", "rope_parameters"}}
    translated = {
        "hybrid_layer_pattern": _numbers("layer_types", fields["layer_types"], KINDS),
        "moe_layer_freq": _numbers("mlp_layer_types", fields["mlp_layer_types"], MLPS),
        "swa_num_key_value_heads": 2 * fields.get("num_key_value_heads", 0),
        "swa_head_dim": fields.get("head_dim"),
        "swa_v_head_dim": fields.get("v_head_dim"),
        "layernorm_epsilon": fields.get("rms_norm_eps"),
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    }
    translated |= _rope(fields.get("rope_parameters") or {})
    # A file of Xiaomi's that transformers wrote again: one key more, for the same model.
    if isinstance(size := kept.pop("sliding_window_size", None), int):
        kept["sliding_window"] = size
    for name, value in translated.items():
        if value is not None and kept.setdefault(name, value) != value:
            raise MimoError(
                f"{name}={shown(kept[name])}, but transformers' fields beside it say "
                f"{shown(value)}: delete those of one spelling from config.json."
            )
    return kept


def _numbers(name: str, words: Any, allowed: tuple[str, ...]) -> list[int]:
    strange = [word for word in words if word not in allowed]
    if strange:
        raise MimoError(f"{name} has {shown(strange[0])}; allowed are {', '.join(allowed)}.")
    return [allowed.index(word) for word in words]


def _rope(kinds: dict[str, Any]) -> dict[str, Any]:
    """Bases of both kinds of layers, and the rotated share, which must be one."""
    rope: dict[str, Any] = {}
    for kind, name in zip(KINDS, ("rope_theta", "swa_rope_theta"), strict=True):
        given = kinds.get(kind)
        if not isinstance(given, dict) or given.get("rope_type", "default") != "default":
            raise MimoError(
                f"rope_parameters has {shown(given)} for {kind}: it must be an object with "
                "rope_theta and partial_rotary_factor, of rope_type 'default'."
            )
        rope[name] = given.get("rope_theta")
        share = given.get("partial_rotary_factor")
        if rope.setdefault("partial_rotary_factor", share) != share:
            raise MimoError(
                f"partial_rotary_factor={shown(share)} for {kind}, but "
                f"{shown(rope['partial_rotary_factor'])} for the others: they must be the same."
            )
    return rope
