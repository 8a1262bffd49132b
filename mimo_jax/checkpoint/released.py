"""Opens a checkpoint as Xiaomi releases it, and loads it onto a mesh without conversion."""

import dataclasses
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from mimo_jax.checkpoint.assemble import Assembler, Index
from mimo_jax.checkpoint.flat import by_name, of_names
from mimo_jax.checkpoint.layout import (
    DRAFTER_FOLDER,
    FP8,
    MASK_EMBEDDING,
    MXFP4,
    SKIPPED,
    TILE,
    Declared,
    Layout,
)
from mimo_jax.checkpoint.manifest import FLOATS
from mimo_jax.checkpoint.recognition import compare, detect
from mimo_jax.checkpoint.safetensors import INDEX, SUFFIX, TensorFiles
from mimo_jax.checkpoint.torch_file import read_mask_embedding
from mimo_jax.checkpoint.xiaomi import declare, recipes
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig, MTPConfig
from mimo_jax.errors import MimoError
from mimo_jax.json_files import parse_json, read_json
from mimo_jax.quant import fp8

CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer.json", "generation_config.json"
SHORT_TILES = 1000
"""One FP8 tile in so many may stay below the largest code."""


@dataclasses.dataclass(frozen=True)
class Released:
    """An opened checkpoint: names, shapes and dtypes are checked, no weight is read yet.

    Attributes:
      directory: of the files.
      config: of the target, amended by what the files tell: MTP layers, the router's dtype.
      drafter: of the DFlash drafter in "dflash/", or None.
      layout: how the weights are stored.
      declared: what is stored, by name; the drafter's tensors under "dflash/".
      skipped: names of tensors of other modalities, which are not read.
      notes: what a user should be told, in sentences.
    """

    directory: Path
    config: ModelConfig
    drafter: DrafterConfig | None
    layout: Layout
    declared: dict[str, Declared]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    files: TensorFiles
    drafter_files: TensorFiles | None
    mask: np.ndarray | None

    @property
    def tokenizer(self) -> Path:
        """Path of the tokenizer's file.

        Raises:
          MimoError: if there is none.
        """
        path = self.directory / TOKENIZER
        if not path.is_file():
            raise MimoError(f"{path} is missing: text cannot be encoded. Fetch it too.")
        return path

    @property
    def mtp(self) -> MTPConfig | None:
        """The target's MTP layers, if there are any."""
        layers = self.config.num_nextn_predict_layers
        return MTPConfig(self.config, layers) if layers else None

    @property
    def packed(self) -> bool:
        """Whether the experts are stored as MXFP4."""
        return self.layout.experts == MXFP4

    @property
    def fp8(self) -> bool:
        """Whether attention's input projections and dense MLPs are stored as FP8."""
        return self.layout.linear == FP8

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are read: target, MTP layers and drafter."""
        return sum(tensor.nbytes for tensor in self.declared.values())

    def read(self, name: str) -> np.ndarray:
        """A stored tensor, by its name in `declared`; a read-only view of its file.

        Raises:
          MimoError: if it does not exist, or its file was changed.
        """
        if name == MASK_EMBEDDING and self.mask is not None:
            return self.mask
        if name.startswith(DRAFTER_FOLDER) and self.drafter_files is not None:
            return self.drafter_files.read(name.removeprefix(DRAFTER_FOLDER))
        return self.files.read(name)

    def release(self, names: list[str]) -> None:
        """Lets the memory of tensors' pages go, which come from the file again if need be."""
        self.files.release(n for n in names if not n.startswith(DRAFTER_FOLDER))
        if self.drafter_files is not None:
            bare = (n.removeprefix(DRAFTER_FOLDER) for n in names if n.startswith(DRAFTER_FOLDER))
            self.drafter_files.release(n for n in bare if n in self.drafter_files.tensors)

    def assembler(self, shards: int = 1) -> Assembler:
        """What makes parameters of this checkpoint.

        Args:
          shards: devices of the mesh; more of them than key/value heads share copies of these.
        """
        return Assembler(recipes(self.config, self.drafter, self.layout, shards), self.read)

    def check_rows(self, parameter: str) -> None:
        """Makes sure that a fused projection's rows lie as Xiaomi stores them.

        Re-exports with plain [Q | K | V] have the same names and shapes. But every FP8 tile of
        Xiaomi's files reaches the largest code, 448: where tiles were made over other rows, many
        do not. Tiles of zeros prove nothing, and one tile in a thousand may be short. Layers whose
        chunks are whole tiles pass either way; full attention's are not in any release.

        Args:
          parameter: such as "target.layers.0.attention.qkv"; any other name passes.

        Raises:
          MimoError: if too many tiles do not reach it.
        """
        fused = self.layout.mtp_fused if parameter.startswith("mtp.") else self.layout.fused
        part, *_, leaf = parameter.split(".")
        if leaf != "qkv" or part == "drafter" or not fused or not self.fp8:
            return
        prefix = {"target": "model", "mtp": "model.mtp"}[part]
        name = f"{prefix}.layers.{parameter.split('.')[2]}.self_attn.qkv_proj.weight"
        codes = self.read(name).view(np.uint8)
        chunks = codes.reshape(self.config.num_key_value_heads, -1, codes.shape[-1])
        largest = np.concatenate([fp8.tile_max(chunk & np.uint8(0x7F)) for chunk in chunks])
        short, used = int(((largest > 0) & (largest < 0x7E)).sum()), int((largest > 0).sum())
        if short * SHORT_TILES > used:
            raise MimoError(
                f"{name}: {short} of {used} tiles of {TILE} x {TILE} do not reach FP8's largest "
                f"value, as all do in Xiaomi's files. It is stored otherwise than in "
                f"{len(chunks)} chunks [Q|K|V] whose tiles run through all three: by a re-export "
                "with plain [Q|K|V], say. Its rows would be misread; use the original release."
            )


@runtime_checkable
class Source(Protocol):
    """What `load` needs of an opened checkpoint."""

    def assembler(self, shards: int = 1) -> Assembler:
        """What makes parameters, for that many devices."""

    def check_rows(self, parameter: str) -> None:
        """Raises a MimoError if the rows of a parameter lie otherwise than its recipe says."""

    def release(self, names: list[str]) -> None:
        """Lets the memory of stored tensors go."""


def is_released(directory: str | Path) -> bool:
    """Whether a directory looks like a checkpoint of safetensors files with a config.json."""
    directory = Path(directory)
    has_tensors = (directory / INDEX).exists() or any(directory.glob(f"*{SUFFIX}"))
    return has_tensors and (directory / CONFIG).exists()


def open_released(directory: str | Path, *, drafter: bool = True) -> Released:
    """Reads configurations and headers, and holds them to each other.

    Args:
      directory: with config.json and the safetensors files.
      drafter: whether to look for a drafter, in the folder "dflash".

    Raises:
      MimoError: if a file is missing or damaged, a tensor is missing, unknown, or of another dtype
        or shape than its layout has, or target and drafter do not fit each other.
    """
    directory = Path(directory)
    config = ModelConfig.from_dict(read_json(directory / CONFIG))
    files = TensorFiles.open(directory)
    found: dict[str, Any] = dict(files.tensors)
    draft, drafter_files, mask, notes = None, None, None, []
    if drafter and (directory / DRAFTER_FOLDER / CONFIG).exists():
        draft, drafter_files, mask, notes = _open_drafter(directory / DRAFTER_FOLDER)
        draft.check_target(config)
        found |= {f"{DRAFTER_FOLDER}{n}": tensor for n, tensor in drafter_files.tensors.items()}
    layout, config = detect(config, found)
    _check_chunks(config, layout, files)
    declared = declare(config, draft, layout)
    if mask is not None:
        found[MASK_EMBEDDING] = declared[MASK_EMBEDDING]
    skipped = compare(found, declared)
    if skipped:
        kinds = [kind for kind in SKIPPED if any(name.startswith(kind) for name in skipped)]
        notes.append(
            f"{len(skipped)} tensors of other modalities are not read: "
            f"{', '.join(f'{kind}*' for kind in kinds)}."
        )
    if layout.fused and layout.linear != FP8:
        notes.append(
            "qkv_proj has no FP8 tiles by which its order of rows could be checked: it is read in "
            f"{config.num_key_value_heads} chunks [Q|K|V], as Xiaomi stores it."
        )
    config = _with_ends(config, directory)
    return Released(
        directory,
        config,
        draft,
        layout,
        declared,
        tuple(skipped),
        tuple(notes),
        files,
        drafter_files,
        mask,
    )


def load(
    checkpoint: Source,
    params: tuple[nnx.State | None, nnx.State | None],
    shardings: tuple[Any, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
    parts: tuple[str, str] = ("target", "drafter"),
) -> tuple[nnx.State | None, nnx.State | None]:
    """Reads parameters onto a mesh; each device's part is made from the rows that it needs.

    What the abstract parameters ask for is made on the way: other float dtypes, repeated key/value
    heads for more devices than heads, plain weights out of FP8 and MXFP4, MXFP4 experts out of
    others. Of host memory it takes the size of one parameter, and as much of its file's pages.

    Args:
      checkpoint: from `open_released`, or another source.
      params: abstract states, as a `decode.program.Plan` of `checkpoint.config` has them.
      shardings: NamedShardings in the same trees.
      progress: called with the bytes read so far and all bytes to read, as stored.
      parts: what the names of each state's parameters begin with: "mtp" where those layers draft.

    Returns:
      the states, with arrays.

    Raises:
      MimoError: naming the tensor that is damaged, or stored in another order of rows.
    """
    wanted = by_name(parts, params, shardings)
    shards = max(len(sharding.device_set) for _, sharding in wanted.values())
    assembler = checkpoint.assembler(shards)
    sizes = {name: assembler.nbytes(name) for name in wanted if name in assembler.table}
    done, placed = 0, {}
    for name, (variable, sharding) in wanted.items():
        checkpoint.check_rows(name)
        placed[name] = variable.replace(_place(assembler, name, variable, sharding))
        if name in sizes:
            checkpoint.release(assembler.tensors(name))
            done += sizes[name]
            progress(done, sum(sizes.values()))
    return of_names(parts, params, placed)


def _place(assembler: Assembler, name: str, variable: Any, sharding: NamedSharding) -> jax.Array:
    """One parameter on the mesh."""
    shape = tuple(variable.shape)

    def key(index: Index) -> tuple[tuple[int, int, int], ...]:
        return tuple(part.indices(size) for part, size in zip(index, shape, strict=True))

    # Devices that hold the same part get the same array; the others' are made side by side.
    parts = {
        key(index): index for index in sharding.addressable_devices_indices_map(shape).values()
    }
    with ThreadPoolExecutor(len(parts)) as pool:
        arrays = pool.map(lambda index: assembler.make(name, variable.dtype, index), parts.values())
        made = dict(zip(parts, arrays, strict=True))
    array = jax.make_array_from_callback(shape, sharding, lambda index: made[key(index)])
    return jax.block_until_ready(array)


def _open_drafter(
    folder: Path,
) -> tuple[DrafterConfig, TensorFiles, np.ndarray, list[str]]:
    """The drafter's configuration, tensors and mask embedding, and what to say of them."""
    fields, notes = _drafter_json(folder / CONFIG)
    config = DrafterConfig.from_dict(fields)
    files = TensorFiles.open(folder)
    path = folder / Path(MASK_EMBEDDING).name
    if not path.exists():
        raise MimoError(
            f"{path} is missing: without the mask's embedding the drafter cannot draft, since the "
            "target's own row for that token is all but zero. Fetch it too, or load with "
            "drafter=False."
        )
    token, mask = read_mask_embedding(path)
    if token != config.mask_token_id:
        raise MimoError(
            f"{path} is of token {token}, but {folder / CONFIG} has mask_token_id="
            f"{config.mask_token_id}: they are of different drafters. Fetch both again."
        )
    if mask.shape != (config.hidden_size,):
        raise MimoError(
            f"{path} holds {mask.shape[0]} numbers; the drafter's hidden_size is "
            f"{config.hidden_size}."
        )
    return config, files, mask if mask.dtype.name in FLOATS else mask.astype(np.float32), notes


def _drafter_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A drafter's config.json. Early releases have a comma too many, which is not JSON."""
    try:
        return read_json(path), []
    except MimoError:
        data = path.read_bytes()
        # Strings are matched too, so that what looks like a comma inside them stays.
        repaired = re.sub(rb'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', rb"\1", data)
        if repaired == data:
            raise
        return parse_json(repaired, str(path)), [
            f"{path} is not valid JSON: a comma before a closing bracket was ignored."
        ]


def _check_chunks(config: ModelConfig, layout: Layout, files: TensorFiles) -> None:
    chunks = files.metadata.get("tp_size")
    if layout.fused and chunks is not None and str(chunks) != str(config.num_key_value_heads):
        raise MimoError(
            f"{INDEX} says tp_size={chunks!r}, the number of chunks of each qkv_proj, but "
            f"config.json has num_key_value_heads={config.num_key_value_heads}, which it must "
            "equal. Fetch both again: they are of different versions."
        )


def _with_ends(config: ModelConfig, directory: Path) -> ModelConfig:
    """End-of-sequence tokens from generation_config.json where config.json has none."""
    path = directory / GENERATION
    if config.eos_token_ids or not path.exists():
        return config
    eos = read_json(path).get("eos_token_id")
    ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if any(type(i) is not int or not 0 <= i < config.vocab_size for i in ids):
        raise MimoError(f"{path} has eos_token_id={eos!r}: it must be tokens of the vocabulary.")
    return dataclasses.replace(config, eos_token_ids=ids)
