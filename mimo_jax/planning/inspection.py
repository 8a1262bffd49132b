"""What a checkpoint's directory holds: ours or a released one, whole or half downloaded.

Headers alone are read, and no JAX is needed. Nothing here raises because a part is missing or
damaged: that is what a look at a directory is to find out.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimo_jax.checkpoint import layout as layouts
from mimo_jax.checkpoint import recognition, xiaomi
from mimo_jax.checkpoint.manifest import NAME as MANIFEST
from mimo_jax.checkpoint.manifest import Manifest
from mimo_jax.checkpoint.safetensors import INDEX, SUFFIX, StoredTensor, read_header
from mimo_jax.config import FULL, ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.errors import MimoError
from mimo_jax.json_files import read_json
from mimo_jax.planning.groups import gigabytes, group_of

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
OURS, RELEASED, OTHER = "mimo_jax", "released", "no checkpoint"
DRAFTER = layouts.DRAFTER_FOLDER
SKIPPED, UNKNOWN = "skipped: other modalities", "unknown"
SHOWN = 4
"""Names of a long list that are given."""

TEXT_FILES = (TOKENIZER, "tokenizer_config.json", "chat_template.jinja")
TEMPLATE_KEY = "chat_template"


@dataclasses.dataclass
class Inspection:
    """What is known of a directory.

    Attributes:
      directory: that was looked at.
      kind: "mimo_jax" (ours), "released", or "no checkpoint".
      config: the target's, or None if it cannot be read.
      drafter: likewise; None too if there is none.
      mtp_layers: multi-token-prediction layers whose tensors are there.
      tensors: how many are there, the drafter's included.
      nbytes: of these.
      dtypes: bytes by dtype.
      groups: bytes by group of parameters; those to be skipped or unknown are groups too.
      counts: tensors by group.
      quantisation: in words.
      layout: how the weights are stored, in words; empty if that cannot be told.
      files: which there are of those for text.
      missing: files and tensors that should be there, in words.
      problems: what is damaged or not supported, in words.
    """

    directory: str
    kind: str = OTHER
    config: ModelConfig | None = None
    drafter: DrafterConfig | None = None
    mtp_layers: int = 0
    tensors: int = 0
    nbytes: int = 0
    dtypes: dict[str, int] = dataclasses.field(default_factory=dict)
    groups: dict[str, int] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    quantisation: str = "none"
    layout: str = ""
    files: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing and nothing damaged."""
        return self.kind != OTHER and not self.missing and not self.problems

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return dataclasses.asdict(self) | {"complete": self.complete}

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def count(self, group: str, dtype: str, nbytes: int) -> None:
        """Adds a tensor."""
        self.tensors += 1
        self.nbytes += nbytes
        self.dtypes[dtype] = self.dtypes.get(dtype, 0) + nbytes
        self.groups[group] = self.groups.get(group, 0) + nbytes
        self.counts[group] = self.counts.get(group, 0) + 1


def inspect(directory: str | Path) -> Inspection:
    """Looks at a directory; see `Inspection`.

    Raises:
      MimoError: only if there is no such directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise MimoError(f"{directory} is not a directory: give that of a checkpoint.")
    found = Inspection(str(directory))
    if (directory / CONFIG).is_file():
        found.config = _tried(found, lambda: ModelConfig.from_dict(read_json(directory / CONFIG)))
    else:
        found.missing.append(f"the file {CONFIG}")
    if (directory / MANIFEST).exists() or (directory / "params").is_dir():
        _inspect_ours(directory, found)
    else:
        _inspect_released(directory, found)
    _inspect_text(directory, found)
    return found


def _inspect_ours(directory: Path, found: Inspection) -> None:
    """A checkpoint of this package: its manifest knows everything."""
    found.kind = OURS
    manifest = _tried(found, lambda: Manifest.read(directory))
    if (directory / "drafter.json").exists():
        found.drafter = _tried(
            found, lambda: DrafterConfig.from_dict(read_json(directory / "drafter.json"))
        )
    if manifest is None:
        return
    for name in manifest.files:
        if not (directory / name).is_file():
            found.missing.append(f"the file {name}")
    if not (directory / "params").is_dir():
        found.missing.append("the folder params")
    for name, entry in manifest.arrays.items():
        found.count(group_of(name), entry.dtype, entry.nbytes)
    packed = any(name.endswith(".experts.gate_up_scale") for name in manifest.arrays)
    found.quantisation = "experts MXFP4" if packed else "none"
    found.layout = "Orbax"
    layers = {name.split(".")[2] for name in manifest.arrays if name.startswith("mtp.layers.")}
    found.mtp_layers = len(layers)


def _inspect_released(directory: Path, found: Inspection) -> None:
    """A directory of safetensors files."""
    listed = _listed(directory, found)
    tensors, absent = _headers(directory, listed, found)
    drafter = _inspect_drafter(directory, found)
    if not listed and not drafter:
        found.missing.append(f"tensors: there is no {INDEX} and no {SUFFIX} file")
        return
    found.kind = RELEASED
    # Of several files without an index nobody knows whether they are all.
    known = (directory / INDEX).exists() or len(listed) == 1
    declared = _declared(tensors | drafter, absent, found) if known else {}
    for name, tensor in (tensors | drafter).items():
        found.count(_group(name, declared), tensor.dtype, tensor.nbytes)
    if not declared:
        return
    present = tensors.keys() | drafter.keys() | absent
    lacking = [name for name in declared if name not in present and name != layouts.MASK_EMBEDDING]
    if lacking:
        found.missing.append(_some("tensors that no file has", lacking))
    unknown = [name for name in tensors | drafter if _group(name, declared) == UNKNOWN]
    if unknown:
        found.problems.append(_some("tensors that belong to nothing", unknown))
    wrong = [
        f"{name} {t.dtype}{list(t.shape)} instead of {declared[name].dtype}"
        f"{list(declared[name].shape)}"
        for name, t in (tensors | drafter).items()
        if name in declared and (t.dtype, t.shape) != (declared[name].dtype, declared[name].shape)
    ]
    if wrong:
        found.problems.append(_some("tensors of another dtype or shape", wrong))


def _listed(directory: Path, found: Inspection) -> dict[str, list[str]]:
    """Tensors by file, as the index has them; files alone where there is no index."""
    if not (directory / INDEX).exists():
        files = sorted(path.name for path in directory.glob(f"*{SUFFIX}"))
        if len(files) > 1:
            found.missing.append(f"the file {INDEX}, which says what else there should be")
        return {name: [] for name in files}
    index = _tried(found, lambda: read_json(directory / INDEX)) or {}
    weight_map = index.get("weight_map")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items() if isinstance(weight_map, dict) else ():
        files.setdefault(str(file), []).append(name)
    if not files:
        found.problems.append(f"{INDEX} lists no tensors")
    return files


def _headers(
    directory: Path, listed: dict[str, list[str]], found: Inspection
) -> tuple[dict[str, StoredTensor], set[str]]:
    """Tensors that are there, and names of those that the index knows and that are not."""
    tensors: dict[str, StoredTensor] = {}
    absent: set[str] = set()
    away = []
    for file, names in listed.items():
        absent.update(names)
        # A name that leads out of the directory is not followed.
        if Path(file).name != file or not (directory / file).is_file():
            away.append(file)
        else:
            tensors |= _tried(found, lambda file=file: read_header(directory / file)[0]) or {}
    if away:
        count = sum(len(listed[file]) for file in away)
        found.missing.append(_some(f"files, with {count} tensors", away))
    return tensors, absent - tensors.keys()


def _inspect_drafter(directory: Path, found: Inspection) -> dict[str, StoredTensor]:
    """The folder "dflash": its configuration, its tensors by their listed names, its mask."""
    folder = directory / DRAFTER
    if not folder.is_dir():
        return {}
    found.drafter = _tried(
        found, lambda: DrafterConfig.from_dict(read_json(folder / "config.json"))
    )
    mask = directory / layouts.MASK_EMBEDDING
    if not mask.is_file():
        found.missing.append(f"the file {layouts.MASK_EMBEDDING}, without which nothing is drafted")
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        found.missing.append(f"the drafter's tensors: {DRAFTER} has no {SUFFIX} file")
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        header = _tried(found, lambda path=path: read_header(path)[0])
        tensors |= {f"{DRAFTER}{name}": tensor for name, tensor in (header or {}).items()}
    return tensors


def _declared(
    tensors: dict[str, StoredTensor], absent: set[str], found: Inspection
) -> dict[str, layouts.Declared]:
    """The tensors that there should be, if that can be told from those that are there."""
    if found.config is None or not tensors:
        return {}
    known = _likely(tensors, absent) | tensors
    detected = _tried(found, lambda: recognition.detect(found.config, known))
    if detected is None:
        return {}
    layout, found.config = detected
    found.mtp_layers = found.config.num_nextn_predict_layers
    found.layout = "fused qkv" if layout.fused else "split q, k, v"
    kinds = {"experts": layout.experts, "attention inputs and dense MLPs": layout.linear}
    words = {layouts.MXFP4: "MXFP4", layouts.FP8: "FP8"}
    coded = [f"{what} {words[kind]}" for what, kind in kinds.items() if kind in words]
    found.quantisation = ", ".join(coded) or "none"
    return _tried(found, lambda: xiaomi.declare(found.config, found.drafter, layout)) or {}


def _likely(tensors: dict[str, StoredTensor], absent: set[str]) -> dict[str, layouts.Declared]:
    """What tensors that are not there may be: as those of other layers, or as their names say."""

    def pattern(name: str) -> str:
        return re.sub(r"\.\d+\.", ".N.", name)

    similar = {pattern(name): tensor.dtype for name, tensor in tensors.items()}
    names = tensors.keys() | absent

    def dtype(name: str) -> str:
        if name.endswith((".weight_scale_inv", ".e_score_correction_bias")):
            return "F32"
        if name.endswith(".weight_scale") or f"{name}_scale" in names:
            return layouts.MXFP4
        return layouts.FP8 if f"{name}_scale_inv" in names else "BF16"

    return {
        name: layouts.Declared(similar.get(pattern(name)) or dtype(name), (), "") for name in absent
    }


def _group(name: str, declared: dict[str, layouts.Declared]) -> str:
    if name in declared:
        return group_of(declared[name].parameter)
    if name.startswith(layouts.SKIPPED):
        return SKIPPED
    if name.startswith(DRAFTER) and not any(other.startswith(DRAFTER) for other in declared):
        return "drafter"
    return UNKNOWN


def _inspect_text(directory: Path, found: Inspection) -> None:
    """What turns text into tokens, and conversations into text."""
    found.files = [name for name in TEXT_FILES if (directory / name).is_file()]
    settings: dict[str, Any] = {}
    if "tokenizer_config.json" in found.files:
        settings = _tried(found, lambda: read_json(directory / "tokenizer_config.json")) or {}
    if settings.get(TEMPLATE_KEY):
        found.files.append(f"{TEMPLATE_KEY} in tokenizer_config.json")
    if found.kind == RELEASED and TOKENIZER not in found.files:
        found.missing.append(f"the file {TOKENIZER}")


def _tried(found: Inspection, look: Callable[[], Any]) -> Any:
    """What `look` gives; or None, and the problem noted."""
    try:
        return look()
    except (MimoError, OSError) as error:
        found.problems.append(str(error))
        return None


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}"


def _lines(found: Inspection) -> list[str]:
    """A report."""
    lines = [f"{found.directory}: {found.kind}" + (f", {found.layout}" if found.layout else "")]
    if found.config is not None:
        lines += [f"  model         {_model(found.config)}"]
    if found.drafter is not None:
        lines += [
            f"  drafter       DFlash, {found.drafter.num_hidden_layers} layers, block "
            f"{found.drafter.block_size}"
        ]
    if found.mtp_layers:
        lines += [f"  MTP           {found.mtp_layers} layers"]
    lines += [
        f"  quantisation  {found.quantisation}",
        f"  tensors       {found.tensors:,}, {gigabytes(found.nbytes)}: "
        + ", ".join(f"{dtype} {gigabytes(size)}" for dtype, size in sorted(found.dtypes.items())),
        *(
            f"    {group:<26}{found.counts[group]:>9,} {gigabytes(size):>10}"
            for group, size in sorted(found.groups.items(), key=lambda item: -item[1])
        ),
        f"  text          {', '.join(found.files) or 'none'}",
        *(f"  missing       {words}" for words in found.missing),
        *(f"  PROBLEM       {words}" for words in found.problems),
    ]
    return [*lines, "  complete" if found.complete else "  not complete"]


def _model(config: ModelConfig) -> str:
    full = config.hybrid_layer_pattern.count(FULL)
    moe = sum(config.moe_layer_freq)
    return (
        f"{config.num_hidden_layers} layers ({full} full attention), hidden {config.hidden_size}, "
        f"{moe} with {config.n_routed_experts} experts, {config.num_experts_per_tok} active; "
        f"context {config.max_position_embeddings:,}, vocabulary {config.vocab_size:,}"
    )
