"""How an answer is to be chosen: the caller's options, checked, and as the program takes them."""

import dataclasses
import math
import operator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimo_jax.decode.sampling import Request
from mimo_jax.errors import MimoError

MOST_ENDS = 8
"""Tokens that can end an answer; programs are compiled for so many, and fewer need no others."""

COLDEST = 1e-4
"""The least temperature but 0: logits divided by less could leave float32."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of one answer; `check` makes one out of what a caller wrote.

    Attributes:
      max_tokens: tokens to emit at most.
      temperature: 0 is greedy.
      top_p: up to 1, the mass of the likeliest tokens to choose from.
      top_k: how many of them; 0 is all.
      seed: of the noise: the same one gives the same answer.
      max_draft: drafted tokens to verify a round; 0 is plain decoding.
      ignore_eos: go on after an end-of-sequence token.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_draft: int = 0
    ignore_eos: bool = False

    @classmethod
    def check(cls, block: int, vocab: int, values: dict[str, Any]) -> "Options":
        """Reads a caller's keyword arguments.

        Args:
          block: rows of a verified block; 1 without a drafter.
          vocab: size of the vocabulary.
          values: the fields above, and `speculative`, False for plain decoding; None of them is
            its default.

        Raises:
          MimoError: for an unknown name, or a value that is not allowed; it says which are.
        """
        names = [field.name for field in dataclasses.fields(cls)] + ["speculative"]
        for name in values:
            if name not in names:
                raise MimoError(f"option {name!r} is not known; there are {', '.join(names)}.")
        values = {name: value for name, value in values.items() if value is not None}
        speculative = _flag("speculative", values.pop("speculative", True))
        longest = block - 1 if speculative else 0
        why = f"0 to {longest}" if speculative else "0, as speculative=False says"
        return cls(
            max_tokens=_whole(
                "max_tokens", values.get("max_tokens", 256), 1, 2**31 - 1, "1 to 2147483647"
            ),
            temperature=_real(
                "temperature", values.get("temperature", 0.0), COLDEST, math.inf, 0.0
            ),
            top_p=_real("top_p", values.get("top_p", 1.0), COLDEST, 1.0),
            top_k=_whole("top_k", values.get("top_k", 0), 0, vocab, f"0 (all) to {vocab}"),
            seed=_whole("seed", values.get("seed", 0), 0, 2**32 - 1),
            max_draft=_whole("max_draft", values.get("max_draft", longest), 0, longest, why),
            ignore_eos=_flag("ignore_eos", values.get("ignore_eos", False)),
        )

    def request(
        self, limits: np.ndarray, pauses: np.ndarray, eos_ids: tuple[int, ...], mesh: Mesh
    ) -> Request:
        """The program's traced arguments, on all devices of the mesh.

        Args:
          limits: length at which each sequence stops, int32 [b].
          pauses: length at which the caller wants to see each, int32 [b].
          eos_ids: tokens that end a sequence.
          mesh: of the program.
        """
        batch = len(limits)
        eos = np.full(max(len(eos_ids), MOST_ENDS), -1, np.int32)
        if not self.ignore_eos:
            eos[: len(eos_ids)] = eos_ids
        values = {
            "limit": limits.astype(np.int32),
            "pause": pauses.astype(np.int32),
            "eos": eos,
            "temperature": np.full(batch, self.temperature, np.float32),
            "top_p": np.full(batch, self.top_p, np.float32),
            "top_k": np.full(batch, self.top_k, np.int32),
            "seed": np.uint32(self.seed),
            "sequence": np.arange(batch, dtype=np.int32),
            "max_draft": np.int32(self.max_draft),
        }
        return Request(**jax.device_put(values, NamedSharding(mesh, PartitionSpec())))


def _whole(name: str, value: Any, low: int, high: int, allowed: str | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        allowed = allowed or f"{low} to {high}"
        raise MimoError(f"{name}={value!r} is not allowed: it must be a whole number, {allowed}.")
    return number


def _real(name: str, value: Any, low: float, high: float, also: float | None = None) -> float:
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and low <= number <= high or number == also):
        other = "" if also is None else f"{also:g}, or "
        upper = f" to {high:g}" if math.isfinite(high) else " or more"
        raise MimoError(f"{name}={value!r} is not allowed: it must be {other}{low:g}{upper}.")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise MimoError(f"{name}={value!r} is not allowed: it must be True or False.")
    return value
