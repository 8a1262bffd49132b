"""Parameter trees as flat dictionaries of arrays by dotted name, and back."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from mimo_jax.errors import MimoError


def flatten(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays on the host by dotted path, such as "layers.0.attention.qkv".

    Takes an nnx.State, or nested dictionaries of states and arrays.
    """
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    if not isinstance(tree, dict):
        return {prefix: np.asarray(jax.device_get(tree))}
    flat: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def unflatten(abstract: nnx.State, arrays: dict[str, Any]) -> nnx.State:
    """Puts arrays into the places of an abstract state.

    Raises:
      MimoError: if a parameter is missing, left over, or of another shape.
    """
    flat = nnx.to_flat_state(abstract)
    names = {".".join(map(str, path)) for path, _ in flat}
    if names != arrays.keys():
        missing, extra = sorted(names - arrays.keys()), sorted(arrays.keys() - names)
        raise MimoError(
            f"parameters do not match the configuration: missing {missing}, extra {extra}."
        )
    leaves = []
    for path, variable in flat:
        name = ".".join(map(str, path))
        if arrays[name].shape != variable.shape:
            raise MimoError(
                f"{name} has shape {arrays[name].shape}; the configuration needs {variable.shape}."
            )
        leaves.append((path, variable.replace(arrays[name])))
    return nnx.from_flat_state(leaves)


def nest(arrays: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from dotted paths."""
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        *folders, last = name.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree
