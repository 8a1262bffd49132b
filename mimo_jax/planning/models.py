"""The model that a name or a directory stands for, and what its release stores."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

from mimo_jax.checkpoint import layout as layouts
from mimo_jax.checkpoint import recognition, xiaomi
from mimo_jax.checkpoint.safetensors import INDEX, SUFFIX, StoredTensor, TensorFiles
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import AnyDrafterConfig, DrafterConfig, MTPConfig
from mimo_jax.errors import MimoError
from mimo_jax.json_files import read_json
from mimo_jax.presets import ENCODERS, drafter_preset, preset, preset_names

DRAFTER_FILES = ("drafter.json", f"{layouts.DRAFTER_FOLDER}config.json")
"""Where a drafter's configuration lies: in our checkpoints, and in released ones."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a released checkpoint holds, the drafter's folder left out.

    Attributes:
      tensors: how many, those of encoders included.
      elements: by dtype, in safetensors' names; MXFP4 codes and scales are "U8" bytes.
      encoder_tensors: how many of the tensors belong to other modalities, and are skipped.
      encoder_elements: their elements, all BF16.
      drafter_tensors: of its folder, the mask's embedding not among them.
      drafter_bytes: likewise.
    """

    tensors: int
    elements: dict[str, int]
    encoder_tensors: int = 0
    encoder_elements: int = 0
    drafter_tensors: int = 0
    drafter_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the drafter's."""
        return sum(count * layouts.BYTES[dtype] for dtype, count in self.elements.items())

    @classmethod
    def of(
        cls, declared: dict[str, layouts.Declared], encoders: tuple[int, int] = (0, 0)
    ) -> "Stored":
        """Counts what a layout declares, and encoders' tensors and BF16 elements beside it."""
        kinds: dict[bool, Counter] = {True: Counter(), False: Counter()}
        for name, tensor in declared.items():
            if name != layouts.MASK_EMBEDDING:
                kinds[name.startswith(layouts.DRAFTER_FOLDER)][tensor.dtype, tensor.shape] += 1
        # Most of 160,000 tensors are experts', all alike.
        elements: dict[str, int] = {}
        for (dtype, shape), times in kinds[False].items():
            elements[dtype] = elements.get(dtype, 0) + times * math.prod(shape)
        count, size = encoders
        if size:
            elements["BF16"] = elements.get("BF16", 0) + size
        drafter_bytes = sum(
            times * math.prod(shape) * layouts.BYTES[dtype]
            for (dtype, shape), times in kinds[True].items()
        )
        own, drafter = kinds[False].total(), kinds[True].total()
        return cls(own + count, elements, count, size, drafter, drafter_bytes)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to plan for.

    Attributes:
      name: for people.
      config: of the target.
      drafter: of the drafter, DFlash or MTP, or None.
      layout: in which its weights are stored, if that is known.
      stored: all that the release holds, if that is known.
    """

    name: str
    config: ModelConfig
    drafter: AnyDrafterConfig | None
    layout: layouts.Layout | None
    stored: Stored | None


def find_model(
    model: str | Path | ModelConfig, drafter: AnyDrafterConfig | bool | str = True
) -> Model:
    """Finds a model by its preset's name, its checkpoint's directory, or its configuration.

    Args:
      model: a directory needs its config.json alone; with its tensors their dtypes are known too.
      drafter: "dflash", "mtp", True (the first that the model has), False, or a configuration.

    Raises:
      MimoError: if there is no such model, or it has no such drafter.
    """
    if isinstance(model, ModelConfig):
        found = Model(f"a model of {model.num_hidden_layers} layers", model, None, None, None)
    elif Path(model).is_dir():
        found = _in_directory(Path(model))
    elif str(model) in preset_names():
        found = _preset(str(model))
    else:
        raise MimoError(
            f"{str(model)!r} is neither a directory nor a preset; presets: "
            f"{', '.join(preset_names())}."
        )
    return dataclasses.replace(found, drafter=_choose(found, drafter))


def _choose(found: Model, wanted: AnyDrafterConfig | bool | str) -> AnyDrafterConfig | None:
    """The drafter that is asked for."""
    if not isinstance(wanted, bool | str):
        return wanted
    layers = found.config.num_nextn_predict_layers
    own = {"dflash": found.drafter, "mtp": MTPConfig(found.config, layers) if layers else None}
    present = {kind: config for kind, config in own.items() if config is not None}
    if wanted is True:
        return next(iter(present.values()), None)
    if wanted is not False and wanted not in present:
        raise MimoError(
            f"drafter={wanted!r} is not allowed: {found.name} has "
            f"{' and '.join(map(repr, present)) or 'no drafter'}."
        )
    return present.get(wanted) if wanted else None


def _preset(name: str) -> Model:
    drafter = drafter_preset(name) if name in preset_names(drafter=True) else None
    config, layout, stored = preset(name), layouts.LAYOUTS.get(layouts.RELEASES.get(name, "")), None
    if layout is not None:
        stored = Stored.of(xiaomi.declare(config, drafter, layout), ENCODERS.get(name, (0, 0)))
    return Model(name, config, drafter, layout, stored)


def _in_directory(directory: Path) -> Model:
    """The model of our own or of a released checkpoint."""
    fields = read_json(directory / "config.json")
    config = ModelConfig.from_dict(fields)
    paths = [directory / name for name in DRAFTER_FILES if (directory / name).exists()]
    drafter = DrafterConfig.from_dict(read_json(paths[0])) if paths else None
    tensors = _tensors(directory)
    if tensors is None:
        return Model(str(directory), config, drafter, _layout(fields), None)
    layout, config = recognition.detect(config, tensors)
    elements: dict[str, int] = {}
    for tensor in tensors.values():
        size = tensor.nbytes // layouts.BYTES.get(tensor.dtype, 1)
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + size
    skipped = [t for name, t in tensors.items() if name.startswith(layouts.SKIPPED)]
    encoders = len(skipped), sum(t.nbytes for t in skipped) // layouts.BYTES["BF16"]
    return Model(str(directory), config, drafter, layout, Stored(len(tensors), elements, *encoders))


def _tensors(directory: Path) -> dict[str, StoredTensor] | None:
    """What safetensors files hold; None if there are none, or not yet all: a plan needs neither."""
    if not (directory / INDEX).exists() and not any(directory.glob(f"*{SUFFIX}")):
        return None
    try:
        return TensorFiles.open(directory).tensors
    except MimoError:
        return None


def _layout(fields: dict[str, Any]) -> layouts.Layout | None:
    """How a release stores its weights, by its config.json alone; None if that does not say."""
    quantization = fields.get("quantization_config") or {}
    if quantization.get("quant_method") != "fp8":
        return None
    fused = fields.get("attention_projection_layout") == "fused_qkv"
    experts = layouts.MXFP4 if quantization.get("store_dtype") == "mxfp4" else layouts.FP8
    return layouts.Layout(fused=fused, linear=layouts.FP8, experts=experts)
