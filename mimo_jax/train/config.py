"""What a training run is told: small frozen dataclasses, read from TOML, every field checked.

    config = load_config("recipe.toml", ["optimizer.lr=3e-4", "run.out=runs/mine"])

One schema serves `mimo train target`, `qat` and `drafter`; each reads the sections that it needs.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from mimo_jax.errors import MimoError


def option(default: Any, help: str, *, low=None, high=None, choices: tuple = ()) -> Any:
    """A field with its default, its line of help and what its values may be."""
    limits = {"help": help, "low": low, "high": high, "choices": choices}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=limits)
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """[model]: the target; what is trained, or what a drafter is trained for."""

    preset: str = option("", "a name of mimo_jax.preset, for random weights")
    start: str = option("", "a checkpoint's or a run's folder whose weights are gone on from")
    shape: dict[str, Any] = option({}, "fields of ModelConfig beside or instead of the preset's")


@dataclasses.dataclass(frozen=True)
class DataSection:
    """[data]: text, JSONL and token files; how they become rows."""

    files: tuple[str, ...] = option((), "text, .jsonl, .txt.xz or .npy files; * is allowed")
    heldout: tuple[str, ...] = option((), "likewise; measured, never trained on")
    tokenizer: str = option("", "a tokenizer.json; else the start's, else one is trained")
    vocabulary: int = option(1024, "tokens of a tokenizer that is trained here", low=260)
    length: int = option(256, "tokens of a row", low=8)
    seed: int = option(0, "of the order of rows", low=0)


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    """[optimizer]."""

    name: str = option(
        "muon", "muon (matrices; AdamW for the rest) or adamw", choices=("muon", "adamw")
    )
    lr: float = option(3e-3, "the largest learning rate", low=0.0)
    weight_decay: float = option(0.1, "decoupled, times the learning rate", low=0.0)
    beta1: float = option(0.9, "AdamW's first", low=0.0, high=1.0)
    beta2: float = option(0.95, "AdamW's second", low=0.0, high=1.0)
    clip: float = option(1.0, "largest norm of a step's gradient", low=0.0)


@dataclasses.dataclass(frozen=True)
class ScheduleSection:
    """[schedule]: of the learning rate, over run.steps."""

    kind: str = option(
        "plateau", "plateau (then linearly to zero), cosine or constant",
        choices=("plateau", "cosine", "constant"),
    )  # fmt: skip
    warmup: float = option(0.03, "share of the steps, linearly from zero", low=0.0, high=1.0)
    decay: float = option(0.35, "plateau: share of the steps at the end", low=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class ExpertsSection:
    """[experts]: of the target's training."""

    balance: float = option(1e-3, "what a router's bias moves a step", low=0.0)
    capacity: float = option(1.5, "places of an expert, times the mean load", low=0.0)


@dataclasses.dataclass(frozen=True)
class QatSection:
    """[qat]: MXFP4-aware training."""

    rule: str = option("mse", "of a block's shared exponent", choices=("mse", "floor"))
    begin: float = option(0.0, "share of the steps before the rounding", low=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class DrafterSection:
    """[drafter]."""

    preset: str = option("", "a name of mimo_jax.drafter_preset; else by the target's shape")
    shape: dict[str, Any] = option({}, "fields of DrafterConfig beside or instead of these")
    weighting: str = option(
        "decay", "of a block's slots: decay, flat or dpace", choices=("decay", "flat", "dpace")
    )
    gamma: float = option(4.0, "decay: slot k weighs exp(-(k - 1) / gamma)", low=1e-3)
    alpha: float = option(0.5, "dpace: what every confidence is mixed with", low=0.0, high=1.0)
    loss: str = option(
        "ce", "ce, or ce mixed with tv (total variation) or kl", choices=("ce", "tv", "kl")
    )
    ce_share: float = option(0.1, "tv, kl: share of the cross-entropy", low=0.0, high=1.0)
    anchors: int = option(64, "random anchors in 1024 tokens", low=1)
    far: float = option(
        0.0, "share of anchors beyond four windows, if there is one", low=0.0, high=1.0
    )
    answers: str = option(
        "data", "train on data, on the target's own answers, or both",
        choices=("data", "own", "both"),
    )  # fmt: skip
    own_rows: int = option(256, "answers of its own to generate", low=1)
    own_length: int = option(256, "tokens of each, prompt included", low=16)
    own_prompt: float = option(0.5, "largest share of a row that a prompt takes", low=0.2, high=0.9)
    own_batch: int = option(128, "answers generated at once", low=1)
    own_from: str = option("", "a run for the same target whose own answers are used again")
    greedy: float = option(0.33, "share of the answers without noise", low=0.0, high=1.0)
    coldest: float = option(0.3, "least temperature of the others", low=1e-4)
    hottest: float = option(1.0, "largest temperature of the others", low=1e-4)


@dataclasses.dataclass(frozen=True)
class RunSection:
    """[run]: how long, how large, where to."""

    out: str = option("", "the run's folder; one that is there already is continued")
    fork: str = option("", "a run whose newest step is gone on from here, optimiser and data too")
    steps: int = option(300, "of the optimiser", low=1)
    stop_at: int = option(0, "pause at this step of the schedule; 0 is its end", low=0)
    batch: int = option(8, "rows of a step, over all devices and accumulations", low=1)
    accumulate: int = option(1, "parts that a step's batch is taken in", low=1)
    seed: int = option(0, "of the first weights and of anchors", low=0)
    devices: int = option(0, "how many to divide the batch and the experts over; 0 is all", low=0)
    dtype: str = option(
        "auto", "of computing; auto: float32 on CPUs, else bfloat16",
        choices=("auto", "float32", "bfloat16"),
    )  # fmt: skip
    attention: str = option(
        "blocks", "blocks (anywhere), or triton (kernels, on one GPU)", choices=("blocks", "triton")
    )
    remat: bool = option(False, "compute layers again in the backward pass: less memory")
    loss_chunk: int = option(0, "positions of a row whose logits exist at once; 0 is all", low=0)
    save_every: int = option(200, "steps that a kill may cost; two checkpoints in it", low=1)
    keep: int = option(2, "checkpoints to keep", low=1)
    eval_every: int = option(100, "steps between measurements of heldout; 0: at the end", low=0)
    eval_rows: int = option(128, "rows of heldout text to measure", low=1)
    log_every: int = option(1, "steps between console lines", low=1)
    spike: float = option(3.0, "stop when a loss exceeds the recent ones' median so many times;"
                          " 0 is never", low=0.0)  # fmt: skip
    peak_tflops: float = option(0.0, "of a device; 0 measures a product of matrices", low=0.0)
    tensorboard: bool = option(False, "write event files too (extra tensorboard)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All sections."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    experts: ExpertsSection = ExpertsSection()
    qat: QatSection = QatSection()
    drafter: DrafterSection = DrafterSection()
    run: RunSection = RunSection()


MAY_CHANGE = frozenset(
    "run.save_every run.keep run.eval_every run.eval_rows run.log_every run.spike run.devices "
    "run.stop_at run.peak_tflops run.tensorboard run.out run.fork run.loss_chunk "
    "drafter.own_batch run.attention".split()
)
"""Fields that a run may be continued with other values of: they do not decide what it learns."""


def load_config(recipe: str | Path | None = None, overrides: Iterable[str] = ()) -> TrainConfig:
    """Reads a recipe and applies overrides.

    Args:
      recipe: a TOML file; None for the defaults.
      overrides: "section.field=value"; the value as TOML has it, or else a string.

    Raises:
      MimoError: for a file that is no TOML, an unknown field (similar names are given), a value of
        another type, or one that is not allowed.
    """
    values: dict[str, Any] = {} if recipe is None else _read_toml(Path(recipe))
    for override in overrides:
        _apply(values, override)
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Builds a configuration of nested dictionaries; absent fields have their defaults.

    Raises:
      MimoError: as `load_config`.
    """
    sections = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    built = {}
    for name, fields in values.items():
        if name not in sections:
            raise _unknown(f"section [{name}]", name, sections)
        if not isinstance(fields, Mapping):
            raise MimoError(
                f"{name}={fields!r} is not allowed: [{name}] is a section; name one of its fields, "
                f"{', '.join(_names(sections[name]))}."
            )
        built[name] = _section(type(sections[name]), name, fields)
    return TrainConfig(**built)


def to_dict(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Nested dictionaries with lists, as JSON and TOML have them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_toml(config: TrainConfig) -> str:
    """All fields as TOML, each with its line of help; `load_config` reads it back."""
    lines = []
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        lines.append(f"[{section.name}]")
        for field in dataclasses.fields(value):
            text = f"{field.name} = {_toml(getattr(value, field.name))}"
            lines.append(f"{text}  # {field.metadata['help']}")
        lines.append("")
    return "\n".join(lines)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """What a run cannot be continued with: "section.field: old, now new", but for `MAY_CHANGE`."""
    olds, news = to_dict(old), to_dict(new)
    return [
        f"{section}.{field}: {value!r}, now {news[section][field]!r}"
        for section, fields in olds.items()
        for field, value in fields.items()
        if value != news[section][field] and f"{section}.{field}" not in MAY_CHANGE
    ]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise MimoError(f"{path} does not exist: give a recipe, a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise MimoError(f"{path} is not a TOML file: {error}.") from None


def _apply(values: dict[str, Any], override: str) -> None:
    """Sets one field from "section.field=value"; deeper names reach into tables such as shape."""
    name, equals, text = override.partition("=")
    *folders, last = name.strip().split(".")
    if not equals or not folders or not last:
        raise MimoError(
            f"--set {override!r} is not allowed: write section.field=value, as optimizer.lr=3e-4."
        )
    place: Any = values
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise MimoError(f"--set {override!r}: {folder} is a value, and has no field {last}.")
    place[last] = _parse(text.strip())


def _parse(text: str) -> Any:
    """A TOML value, or else the text as it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text


def _section(kind: type, section: str, values: Mapping[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise _unknown(f"field {section}.{name}", name, fields)
        checked[name] = _check(f"{section}.{name}", value, fields[name])
    return kind(**checked)


def _check(name: str, value: Any, field: dataclasses.Field) -> Any:
    """The value in the field's type, if that loses nothing, and within its limits."""
    value = _typed(name, value, field.type)
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if choices and value not in choices:
        raise MimoError(f"{name}={value!r} is not allowed: it must be one of {choices}.")
    # "Not at least" also refuses NaN.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limits = f"{low} or more" if high is None else f"{low} to {high}"
        raise MimoError(f"{name}={value!r} is not allowed: it must be {limits}.")
    return value


def _typed(name: str, value: Any, kind: Any) -> Any:
    origin = get_origin(kind)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, Sequence):
            return tuple(_typed(name, item, get_args(kind)[0]) for item in items)
    elif origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    wanted = words.get(kind, "a list of texts" if origin is tuple else "a table")
    raise MimoError(f"{name}={value!r} is not allowed: it must be {wanted}.")


def _names(section: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(section)]


def _unknown(what: str, name: str, known: Iterable[str]) -> MimoError:
    """The error for a name that there is not, with those that it may have been."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3) or known
    return MimoError(f"{what} is not known; did you mean {', '.join(near)}?")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return repr(value)
