"""Parameter trees as flat dictionaries of arrays by dotted name, and back."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

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


def by_name(
    parts: Sequence[str], states: Sequence[nnx.State | None], shardings: Sequence[Any]
) -> dict[str, tuple[nnx.Variable, NamedSharding]]:
    """The parameters of several states by full name, "target.norm.weight", and where they belong.

    Args:
      parts: what the names of each state's parameters begin with.
      states: abstract ones; None for those that are not there.
      shardings: NamedShardings in the same trees, or variables of them.
    """
    return {
        f"{part}.{'.'.join(map(str, path))}": (variable, _sharding(placed))
        for part, state, where in zip(parts, states, shardings, strict=True)
        if state is not None
        for (path, variable), (_, placed) in zip(
            nnx.to_flat_state(state), nnx.to_flat_state(where), strict=True
        )
    }


def of_names(
    parts: Sequence[str], states: Sequence[nnx.State | None], values: dict[str, nnx.Variable]
) -> tuple[nnx.State | None, ...]:
    """The states again, with other variables; by the names of `by_name`."""
    return tuple(
        None
        if state is None
        else nnx.from_flat_state(
            [
                (path, values[f"{part}.{'.'.join(map(str, path))}"])
                for path, _ in nnx.to_flat_state(state)
            ]
        )
        for part, state in zip(parts, states, strict=True)
    )


def _sharding(placed: Any) -> NamedSharding:
    return placed.get_value() if isinstance(placed, nnx.Variable) else placed


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
