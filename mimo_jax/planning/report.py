"""`mimo_jax.plan`: what a model needs on devices that need not be there, as figures and words."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mimo_jax.checkpoint.layout import BYTES, FP8
from mimo_jax.config import ModelConfig
from mimo_jax.decode.batch import CHUNKS
from mimo_jax.decode.program import Plan, Settings, make_plan
from mimo_jax.drafter_config import AnyDrafterConfig
from mimo_jax.errors import MimoError
from mimo_jax.planning.groups import EMBEDDING, EXPERTS, HEAD, gigabytes, group_of
from mimo_jax.planning.models import Model, Stored, find_model
from mimo_jax.planning.routing import busiest_device, distinct_experts
from mimo_jax.planning.sizes import (
    CONTEXTS,
    TOKENS,
    abstract_mesh,
    caches_of,
    longest_context,
    needs,
    token_bytes,
    total,
    weights_of,
    window_bytes,
)
from mimo_jax.sharding import RULES

H200_BYTES, H200_BANDWIDTH = 141e9, 4.8e12
"""An H200's memory in bytes and its bandwidth in bytes a second, as NVIDIA states them."""


@dataclasses.dataclass(frozen=True)
class Round:
    """What a round of decoding reads from one device's memory, every byte once.

    Attributes:
      rows: tokens that the target runs for each sequence: 1, or a drafted block.
      experts: how many a layer needs, expected if routing is uniform.
      weights: bytes by group. In the "expert" layout they are those of the device that has most of
        the chosen experts, for which the others wait.
      caches: bytes by kind. All rows are read: those that are not filled yet are masked, not cut.
    """

    rows: int
    experts: float
    weights: dict[str, int]
    caches: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(self.weights.values()) + sum(self.caches.values())


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a model needs on each of some devices. Made by `plan`; as a `str` it is a report.

    Attributes:
      name: of the model.
      stored: what its released checkpoint holds, if the layout is known.
      forward_bytes: weights that one token's forward pass reads, in one copy.
      token_bytes: that a token's keys and values of full attention take, in one copy.
      window_bytes: that all sliding windows take, in one copy and without rows for drafts.
      devices: that share the model.
      layout: "tensor" or "expert".
      batch: sequences.
      max_len: tokens that a sequence may have.
      block: rows of a verified block; 1 without a drafter.
      weights: bytes a device, by group. Key/value heads are repeated for more devices than heads.
      caches: bytes a device, by kind.
      workspace: bytes a device, by use; an estimate.
      memory: bytes that a device has.
      context: the longest sequence that the model was made for.
      longest: the longest max_len that fits, at most `context`; 0 if none does.
      bandwidth: bytes a second that a device reads.
      rounds: "plain", and "drafted" if there is a drafter.
      notes: what a user should know, in sentences.
    """

    name: str
    stored: Stored | None
    forward_bytes: int
    token_bytes: int
    window_bytes: int
    devices: int
    layout: str
    batch: int
    max_len: int
    block: int
    weights: dict[str, int]
    caches: dict[str, int]
    workspace: dict[str, int]
    memory: int
    context: int
    longest: int
    bandwidth: float | int
    rounds: dict[str, Round]
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """Bytes a device: weights, caches and workspace."""
        return {"weights": self.weights, "caches": self.caches, "workspace": self.workspace}

    @property
    def needed(self) -> int:
        """Bytes a device, in all."""
        return total(self.parts)

    @property
    def fits(self) -> bool:
        """Whether a device has as many."""
        return self.needed <= self.memory

    def seconds(self, name: str) -> float:
        """The least time that a round takes: what it reads over the bandwidth."""
        return self.rounds[name].nbytes / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        fields = dataclasses.asdict(self) | {"needed": self.needed, "fits": self.fits}
        for name, figures in fields["rounds"].items():
            figures |= {"nbytes": self.rounds[name].nbytes, "seconds": self.seconds(name)}
        return fields

    def __str__(self) -> str:
        lines = [*_model_lines(self), "", *_memory_lines(self), "", *_round_lines(self)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def plan(
    model: str | Path | ModelConfig,
    devices: int = 8,
    max_len: int = 131072,
    *,
    drafter: AnyDrafterConfig | bool | str = True,
    batch: int = 1,
    block: int | None = None,
    layout: str = "tensor",
    experts: str = "auto",
    dtype: Any = jnp.bfloat16,
    memory: float | int = H200_BYTES,
    bandwidth: float | int = H200_BANDWIDTH,
) -> MemoryPlan:
    """Computes what a model needs on each of some devices, which need not be there.

    Weights are as `load` holds them on GPUs with kernels: MXFP4 stays MXFP4, FP8 projections stay
    FP8; FP8 experts become bfloat16, or MXFP4 if that is asked for.

    Args:
      model: a preset's name, a checkpoint's directory (its config.json is enough) or a
        configuration.
      devices: that share the model.
      max_len: tokens that a sequence may have; at most the model's context counts.
      drafter: "dflash", or "mtp" for the model's own layers; True is the first that the model has;
        False none; or a configuration.
      batch: sequences.
      block: rows of a verified block; by default the drafter's.
      layout: "tensor" cuts every expert, "expert" gives each device whole ones.
      experts: "auto", or "mxfp4" for experts that are not stored so.
      dtype: of other weights, of activations and caches.
      memory: bytes that a device has.
      bandwidth: bytes a second that a device reads.

    Raises:
      MimoError: if there is no such model, a number is not allowed, or that many devices cannot
        divide the model.

    Example:
      print(mimo_jax.plan("mimo-v2.6-pro", devices=8, max_len=131072))
    """
    _check(devices=devices, max_len=max_len, batch=batch, block=block, layout=layout)
    _check_machine(experts=experts, memory=memory, bandwidth=bandwidth)
    found = find_model(model, drafter)
    fp8 = found.layout is not None and found.layout.linear == FP8
    packed = True if experts == "mxfp4" else None  # None: as the configuration says.
    make = {"layout": layout, "fp8": fp8, "packed": packed, "dtype": dtype}
    placed = make_plan(found.config, found.drafter, abstract_mesh(devices), **make)
    single = placed if devices == 1 else make_plan(found.config, None, abstract_mesh(1), **make)
    block = block or (1 if found.drafter is None else found.drafter.block_size)
    context = found.config.max_position_embeddings
    settings = Settings(batch, min(max_len, context), block, CHUNKS[-1], dtype)
    return MemoryPlan(
        name=found.name,
        stored=found.stored,
        forward_bytes=_forward_bytes(single, dtype),
        token_bytes=token_bytes(found.config, dtype),
        window_bytes=window_bytes(found.config, dtype),
        devices=devices,
        layout=layout,
        batch=batch,
        max_len=settings.max_len,
        block=block,
        **needs(placed, settings),
        memory=int(memory),
        context=context,
        longest=longest_context(placed, settings, int(memory)),
        bandwidth=bandwidth,
        rounds=_rounds(placed, settings),
        notes=tuple(_notes(found, packed, max_len, context)),
    )


def _notes(found: Model, packed: bool | None, max_len: int, context: int) -> Iterator[str]:
    if max_len > context:
        yield f"max_len={max_len:,} is cut to the model's context of {context:,} tokens."
    if found.layout is not None and found.layout.experts == FP8 and not packed:
        yield (
            "FP8 experts are held in bfloat16, in twice the bytes; experts='mxfp4' holds them in 4 "
            "bits, which changes them."
        )


def round_of(placed: Plan, settings: Settings, rows: int) -> Round:
    """What a round reads from one device's memory.

    All weights are read once, but: of the experts the chosen ones; of the embedding the tokens'
    rows; the drafter for a drafted block alone, which needs the head once more, or once a layer.

    Args:
      placed: the model on its mesh.
      settings: for the caches and the batch.
      rows: tokens that the target runs for each sequence; more than one are a drafted block.
    """
    config, tokens = placed.config, rows * settings.batch
    weights, caches = weights_of(placed), caches_of(placed, settings)
    experts = 0.0
    if EXPERTS in weights:
        counts = config.n_routed_experts, config.num_experts_per_tok, tokens
        experts = distinct_experts(*counts)
        share = experts / config.n_routed_experts
        if placed.layout == "expert":
            share = busiest_device(*counts, placed.shards) * placed.shards / config.n_routed_experts
        weights[EXPERTS] = round(weights[EXPERTS] * share)
    row = weights[EMBEDDING] * placed.shards // config.vocab_size
    weights[EMBEDDING] = row * tokens
    caches.pop(TOKENS)
    if rows == 1 and placed.drafter is not None:
        weights = {name: n for name, n in weights.items() if name != _drafter_group(placed)}
        caches.pop(CONTEXTS)
    elif placed.drafter is not None:
        # DFlash drafts in one pass; each MTP layer needs the token that the one before it drafted.
        passes = placed.drafter.num_hidden_layers if placed.parts[1] == "mtp" else 1
        weights["head, for the drafter"] = passes * weights[HEAD]
    return Round(rows, experts, weights, caches)


def _rounds(placed: Plan, settings: Settings) -> dict[str, Round]:
    rounds = {"plain": round_of(placed, settings, 1)}
    if placed.drafter is not None and settings.block > 1:
        rounds["drafted"] = round_of(placed, settings, settings.block)
    return rounds


def _forward_bytes(single: Plan, dtype: Any) -> int:
    """Weights that a token's forward pass reads, on one device."""
    settings = Settings(batch=1, max_len=1, block=1, chunk=1, dtype=dtype)
    return sum(round_of(single, settings, 1).weights.values())


def _drafter_group(placed: Plan) -> str:
    return group_of(f"{placed.parts[1]}.any")


def _check(**values: Any) -> None:
    for name, value in values.items():
        if name == "layout":
            if value not in RULES:
                raise MimoError(
                    f"layout={value!r} is not allowed: it must be one of {list(RULES)}."
                )
        elif value is not None or name != "block":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MimoError(
                    f"{name}={value!r} is not allowed: it must be a whole number, 1 or more."
                )


def _check_machine(experts: str, **values: Any) -> None:
    if experts not in ("auto", "mxfp4"):
        raise MimoError(f"experts={experts!r} is not allowed: it must be 'auto' or 'mxfp4'.")
    for name, value in values.items():
        if isinstance(value, bool | str) or not 0 < value < math.inf:
            raise MimoError(f"{name}={value!r} is not allowed: it must be a number above 0.")


def _model_lines(plan: MemoryPlan) -> list[str]:
    lines = [plan.name]
    stored = plan.stored
    if stored is not None:
        kinds = ", ".join(
            f"{dtype} {gigabytes(count * BYTES[dtype])}"
            for dtype, count in sorted(stored.elements.items())
        )
        lines.append(
            f"  stored      {stored.tensors:,} tensors, {gigabytes(stored.nbytes)}: {kinds}"
        )
        if stored.encoder_tensors:
            lines.append(
                f"              {stored.encoder_tensors} of them, "
                f"{gigabytes(2 * stored.encoder_elements)}, are of other modalities: skipped"
            )
        if stored.drafter_tensors:
            lines.append(
                f"              and the drafter's {stored.drafter_tensors} tensors, "
                f"{gigabytes(stored.drafter_bytes)}"
            )
    return [
        *lines,
        f"  a token     reads {gigabytes(plan.forward_bytes)} of weights and takes "
        f"{plan.token_bytes:,} B of cache; all windows {gigabytes(plan.window_bytes)}",
    ]


def _memory_lines(plan: MemoryPlan) -> list[str]:
    lines = [
        f"each of {plan.devices} device(s), {plan.layout} layout, batch {plan.batch}, "
        f"max_len {plan.max_len:,}, block {plan.block}"
    ]
    for part, sizes in plan.parts.items():
        lines.append(f"  {part:<24}{gigabytes(sum(sizes.values())):>10}")
        lines += [f"    {name:<22}{gigabytes(size):>10}" for name, size in sizes.items()]
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT"
    longest = f"{plan.longest:,} tokens" if plan.longest else "none"
    longest += ", the model's own limit" if plan.longest == plan.context else ""
    return [
        *lines,
        f"  {'in all':<24}{gigabytes(plan.needed):>10} of {gigabytes(plan.memory)}: {verdict}",
        f"  longest context that fits: {longest}",
    ]


def _round_lines(plan: MemoryPlan) -> list[str]:
    lines = [f"a round reads from each device, at {plan.bandwidth / 1e9:,.0f} GB/s"]
    for name, figures in plan.rounds.items():
        seconds = plan.seconds(name)
        per = plan.batch / seconds
        each = "" if name == "plain" else " x acceptance length"
        experts = f", {figures.experts:.1f} experts a layer" if figures.experts else ""
        lines.append(
            f"  {name:<10}{gigabytes(figures.nbytes):>10}{1e3 * seconds:>9.3f} ms   "
            f"at most {per:,.0f} tokens/s{each} ({figures.rows} row(s) a sequence{experts})"
        )
    return lines
