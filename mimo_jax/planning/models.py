"""The model that a name or a directory stands for, and what its release stores."""

import dataclasses
from pathlib import Path

from mimo_jax.checkpoint import xiaomi
from mimo_jax.checkpoint.safetensors import INDEX, TensorFiles
from mimo_jax.config import DrafterConfig, ModelConfig, read_json
from mimo_jax.errors import MimoError
from mimo_jax.presets import ENCODERS, drafter_preset, preset, preset_names

DRAFTER_FILES = ("drafter.json", f"{xiaomi.DRAFTER_FOLDER}config.json")
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
        return sum(count * xiaomi.BYTES[dtype] for dtype, count in self.elements.items())

    @classmethod
    def of(
        cls, declared: dict[str, xiaomi.Declared], encoders: tuple[int, int] = (0, 0)
    ) -> "Stored":
        """Counts what a layout declares, and encoders' tensors and BF16 elements beside it."""
        drafter = [
            tensor
            for name, tensor in declared.items()
            if name.startswith(xiaomi.DRAFTER_FOLDER) and name != xiaomi.MASK_EMBEDDING
        ]
        own = [t for name, t in declared.items() if not name.startswith(xiaomi.DRAFTER_FOLDER)]
        elements: dict[str, int] = {}
        for tensor in own:
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.elements
        count, size = encoders
        if size:
            elements["BF16"] = elements.get("BF16", 0) + size
        drafter_bytes = sum(tensor.nbytes for tensor in drafter)
        return cls(len(own) + count, elements, count, size, len(drafter), drafter_bytes)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to plan for.

    Attributes:
      name: for people.
      config: of the target.
      drafter: of the drafter, or None.
      layout: in which its weights are stored, if that is known.
      stored: all that the release holds, if that is known.
    """

    name: str
    config: ModelConfig
    drafter: DrafterConfig | None
    layout: xiaomi.Layout | None
    stored: Stored | None


def find_model(model: str | Path | ModelConfig, drafter: DrafterConfig | bool = True) -> Model:
    """Finds a model by its preset's name, its checkpoint's directory, or its configuration.

    Args:
      model: a directory needs its config.json alone; with its tensors their dtypes are known too.
      drafter: True takes the model's own, if there is one; False none; or a configuration.

    Raises:
      MimoError: if there is no such model.
    """
    given = None if isinstance(drafter, bool) else drafter
    if isinstance(model, ModelConfig):
        return Model(f"{model.num_hidden_layers} layers", model, given, None, None)
    name = str(model)
    if Path(name).is_dir():
        return _in_directory(Path(name), given, drafter is True)
    if name not in preset_names():
        raise MimoError(
            f"{name!r} is neither a directory nor a preset; presets: {', '.join(preset_names())}."
        )
    config = preset(name)
    own = drafter_preset(name) if name in preset_names(drafter=True) else None
    layout, stored = xiaomi.LAYOUTS.get(xiaomi.RELEASES.get(name, "")), None
    if layout is not None:
        drafted = own if isinstance(own, DrafterConfig) else None
        stored = Stored.of(xiaomi.declare(config, drafted, layout), ENCODERS.get(name, (0, 0)))
    return Model(name, config, own if drafter is True else given, layout, stored)


def _in_directory(directory: Path, given: DrafterConfig | None, with_drafter: bool) -> Model:
    """The model of our own or of a released checkpoint."""
    config = ModelConfig.from_dict(read_json(directory / "config.json"))
    found = [directory / name for name in DRAFTER_FILES if (directory / name).exists()]
    if found and with_drafter:
        given = DrafterConfig.from_dict(read_json(found[0]))
    layout = stored = None
    if (directory / INDEX).exists() or any(directory.glob("*.safetensors")):
        tensors = TensorFiles.open(directory).tensors
        layout, config = xiaomi.detect(config, tensors)
        elements: dict[str, int] = {}
        for tensor in tensors.values():
            size = tensor.nbytes // xiaomi.BYTES.get(tensor.dtype, 1)
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + size
        skipped = [t for name, t in tensors.items() if name.startswith(xiaomi.SKIPPED)]
        encoders = len(skipped), sum(t.nbytes for t in skipped) // xiaomi.BYTES["BF16"]
        stored = Stored(len(tensors), elements, *encoders)
    return Model(str(directory), config, given, layout, stored)
