"""Training: a target, a target that lives with MXFP4, a drafter; from Python or by `mimo train`.

from mimo_jax.train import load_config, train

train("target", load_config("checkpoints/toy.toml", ["data.files=book.txt", "run.out=runs/toy"]))
"""

import importlib
from typing import Any

_HOMES = {"TrainConfig": "config", "load_config": "config", "train": "tasks", "Result": "run"}
"""Where the public names live; imported when first used, as settings need no JAX."""

__all__ = ["Result", "TrainConfig", "load_config", "train"]  # noqa: F822


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mimo_jax.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mimo_jax.train.{_HOMES[name]}"), name)
