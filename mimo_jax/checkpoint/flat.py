"""Parameter trees as flat dictionaries of arrays, and as numbered .npz parts of bounded size."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
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


def write_parts(
    folder: Path, name: str, arrays: dict[str, np.ndarray], limit: int = 15 << 20
) -> None:
    """Writes arrays as name-0.npz, name-1.npz, ..., each with at most `limit` bytes of them."""
    parts: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for key, array in arrays.items():
        if size + array.nbytes > limit and parts[-1]:
            parts.append({})
            size = 0
        # npz knows no bfloat16: its bits travel as uint16, marked in the name.
        if array.dtype == ml_dtypes.bfloat16:
            key, array = f"bfloat16:{key}", array.view(np.uint16)
        parts[-1][key] = array
        size += array.nbytes
    for index, part in enumerate(parts):
        np.savez(folder / f"{name}-{index}.npz", **part)


def read_parts(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Reads what `write_parts` wrote.

    Raises:
      MimoError: if there is nothing of that name.
    """
    paths = sorted(folder.glob(f"{name}-*.npz"))
    if not paths:
        raise MimoError(f"{folder} holds no {name}-0.npz: run the stage that writes it first.")
    arrays: dict[str, np.ndarray] = {}
    for path in paths:
        with np.load(path, allow_pickle=False) as part:
            for key in part.files:
                kind, _, bare = key.rpartition(":")
                arrays[bare] = part[key].view(ml_dtypes.bfloat16) if kind else part[key]
    return arrays
