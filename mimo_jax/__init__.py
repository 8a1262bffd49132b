"""A MiMo-shaped Mixture-of-Experts in JAX: MXFP4 experts, DFlash drafting, one compiled loop."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_jax.config import ModelConfig
    from mimo_jax.decode.chat import ChatDelta, ChatOutput, ChatSession
    from mimo_jax.decode.output import Output, Piece, Stats
    from mimo_jax.drafter_config import DrafterConfig
    from mimo_jax.engine import Engine, Session
    from mimo_jax.errors import MimoError
    from mimo_jax.loading import load
    from mimo_jax.planning.report import MemoryPlan, plan
    from mimo_jax.presets import drafter_preset, preset
    from mimo_jax.sharding import make_mesh
    from mimo_jax.text.answer import ToolCall

__all__ = [
    "ChatDelta",
    "ChatOutput",
    "ChatSession",
    "DrafterConfig",
    "Engine",
    "MemoryPlan",
    "MimoError",
    "ModelConfig",
    "Output",
    "Piece",
    "Session",
    "Stats",
    "ToolCall",
    "drafter_preset",
    "load",
    "make_mesh",
    "plan",
    "preset",
]

_HOMES = {
    "ChatDelta": "decode.chat",
    "ChatOutput": "decode.chat",
    "ChatSession": "decode.chat",
    "DrafterConfig": "drafter_config",
    "Engine": "engine",
    "MemoryPlan": "planning.report",
    "MimoError": "errors",
    "ModelConfig": "config",
    "Output": "decode.output",
    "Piece": "decode.output",
    "Session": "engine",
    "Stats": "decode.output",
    "ToolCall": "text.answer",
    "drafter_preset": "presets",
    "load": "loading",
    "make_mesh": "sharding",
    "plan": "planning.report",
    "preset": "presets",
}
"""Where each public name lives. They are imported when first used: `mimo --help` needs no JAX."""

try:
    __version__ = importlib.metadata.version("mimo-jax")
except importlib.metadata.PackageNotFoundError:  # Run from a source tree that is not installed.
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mimo_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mimo_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted([*globals(), *_HOMES])
