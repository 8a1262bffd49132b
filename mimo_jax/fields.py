"""Types and ranges of configuration fields, checked before anything computes with them."""

import dataclasses
import math
import reprlib
from typing import Any

from mimo_jax.errors import MimoError

MAX_SIZE = 2**31 - 1
"""The largest integer that a field may have: positions and ids are int32."""

MAX_LAYERS = 4096
"""The most layers, and the longest list, that a configuration may have."""

MAY_BE_ZERO = frozenset(
    "eos_token_id mask_token_id num_nextn_predict_layers n_routed_experts num_experts_per_tok "
    "moe_intermediate_size hybrid_block_size".split()
)
MAY_BE_NEGATIVE = frozenset({"attention_value_scale", "routed_scaling_factor"})
SHARES = frozenset({"partial_rotary_factor"})

_WRITER = reprlib.Repr()
_WRITER.maxstring = _WRITER.maxother = _WRITER.maxlong = 200
_WRITER.maxlist = _WRITER.maxtuple = 100
_WRITER.maxlevel = 4


def shown(value: Any) -> str:
    """A value from a file as an error may print it: not endless, however deeply it is nested."""
    return _WRITER.repr(value)


def require(fits: bool, name: str, value: Any, allowed: str) -> None:
    """Raises a MimoError that names a field, its value and what is allowed, unless it fits."""
    if not fits:
        raise MimoError(f"{name}={shown(value)} is not allowed: it must be {allowed}.")


def check_fields(cls: type, fields: dict[str, Any], more: dict[str, Any] | None = None) -> dict:
    """Holds values to the types of a dataclass's fields, and to ranges that any model keeps.

    Args:
      cls: the dataclass.
      fields: values by name, such as a config.json has them; other names are let through.
      more: types of further names: int, float, bool, str, dict, tuple[int, ...], tuple[str, ...] or
        a union of such.

    Returns:
      the fields, without those of these names that are null, which means absent.

    Raises:
      MimoError: naming the field, its value and what is allowed.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(cls)} | (more or {})
    kept = {name: v for name, v in fields.items() if v is not None or name not in kinds}
    for name in kinds.keys() & kept.keys():
        reasons = [_fault(name, kept[name], kind) for kind in _alternatives(kinds[name])]
        if all(reasons):
            raise MimoError(
                f"{name}={shown(kept[name])} is not allowed: it must be {' or '.join(reasons)}."
            )
    return kept


def build(cls, values: dict[str, Any]):
    """Constructs a dataclass of a file's values, lists as tuples.

    Raises:
      MimoError: naming the required fields that are missing, or as `check_fields`.
    """
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


def _alternatives(kind: Any) -> list[Any]:
    """A type, or those of a union, None apart."""
    if getattr(kind, "__origin__", None) is tuple:
        return [kind]
    return [k for k in getattr(kind, "__args__", (kind,)) if k is not type(None)]


def _fault(name: str, value: Any, kind: Any) -> str:
    """What the value would have to be, or nothing if it is so."""
    if kind is int:
        least = 0 if name in MAY_BE_ZERO else 1
        most = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        fits = type(value) is int and least <= value <= most
        return "" if fits else f"an integer from {least} to {most}"
    if kind is float:
        return _float_fault(name, value)
    if kind in (bool, str, dict):
        words = {bool: "true or false", str: "a string", dict: "an object"}
        return "" if type(value) is kind else words[kind]
    fits = isinstance(value, list | tuple) and len(value) <= MAX_LAYERS
    if kind.__args__[0] is str:
        return "" if fits and all(type(v) is str for v in value) else "a list of strings"
    fits = fits and all(type(v) is int and 0 <= v <= MAX_SIZE for v in value)
    return "" if fits else f"a list of at most {MAX_LAYERS} integers from 0 to {MAX_SIZE}"


def _float_fault(name: str, value: Any) -> str:
    finite = type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)
    if name in MAY_BE_NEGATIVE:
        return "" if finite else "a finite number"
    if name in SHARES:
        return "" if finite and 0 < value <= 1 else "a number above 0, at most 1"
    return "" if finite and value > 0 else "a finite number above 0"
