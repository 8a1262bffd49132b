"""Reads JSON objects that may come from strangers, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from mimo_jax.errors import MimoError


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
