"""Our checkpoints as Hugging Face safetensors: for transformers, or as Xiaomi releases them.

The table of xiaomi.py is read backwards: it says where each stored row lies among our parameters.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mimo_jax.checkpoint import store
from mimo_jax.checkpoint.export_config import FORMATS, target_fields, write_small_files
from mimo_jax.checkpoint.layout import (
    DRAFTER_FOLDER,
    FP8,
    MASK_EMBEDDING,
    MXFP4,
    Declared,
    Layout,
    Piece,
    backwards,
)
from mimo_jax.checkpoint.manifest import write_atomically
from mimo_jax.checkpoint.safetensors import DTYPES, INDEX
from mimo_jax.checkpoint.torch_file import write_mask_embedding
from mimo_jax.checkpoint.xiaomi import declare, recipes
from mimo_jax.errors import MimoError

SHARD_BYTES = 5 * 10**9
"""Bytes of a file, unless one tensor is larger."""

NAMES = {"bfloat16": "BF16", "float32": "F32", "float8_e4m3fn": FP8, "uint8": MXFP4}
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      files: the safetensors files.
      nbytes: of their tensors.
      left_out: parts of the checkpoint that the format has no place for: "drafter".
    """

    files: tuple[Path, ...]
    nbytes: int
    left_out: tuple[str, ...]


def export(
    source: str | Path,
    directory: str | Path,
    layout: str = "v2-flash",
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Writes one of our checkpoints as safetensors with Xiaomi's names.

    "v2-flash" is what transformers reads: attention split, every weight decoded to the dtype of
    the others (MXFP4 values are exact in bfloat16); the drafter has no place in it. "v2.6" is the
    released form: attention fused in chunks, MXFP4 experts as they are, FP8 where the checkpoint
    has it, the drafter beside it.

    The index comes last: without it the directory does not count as a checkpoint. Host memory holds
    one layer and one file's tensors.

    Args:
      source: directory of the checkpoint.
      directory: to write to; missing, or empty.
      layout: "v2-flash" or "v2.6".
      shard_bytes: of one file.
      progress: called with the bytes written so far and all bytes.

    Raises:
      MimoError: if the checkpoint is damaged, the layout cannot express it, or the directory holds
        something.

    Example:
      export("checkpoints/mimo-nano", "nano-hf")
      transformers.AutoModelForCausalLM.from_pretrained("nano-hf")
    """
    if layout not in FORMATS:
        raise MimoError(f"layout={layout!r} is not known: it must be one of {', '.join(FORMATS)}.")
    checkpoint, directory = store.open_checkpoint(source), Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise MimoError(f"{directory} holds something already: name a new or an empty directory.")
    stored = _layout(checkpoint, layout)
    fields = target_fields(checkpoint, layout, stored)
    drafter = checkpoint.drafter if layout == "v2.6" else None
    tensors = declare(checkpoint.config, drafter, stored)
    directory.mkdir(parents=True, exist_ok=True)
    writer = _Shards(directory, shard_bytes, sum(t.nbytes for t in tensors.values()), progress)
    pieces = backwards(recipes(checkpoint.config, drafter, stored))
    tensors |= {MASK_EMBEDDING: _mask(drafter, stored)} if drafter else {}
    for arrays, names in _groups(checkpoint, tensors, stored):
        for name in names:
            if name == MASK_EMBEDDING:
                mask = arrays["drafter.mask_embedding"]
                write_mask_embedding(directory / name, drafter.mask_token_id, mask)
            else:
                writer.add(name, _assemble(name, tensors[name], pieces[name], arrays))
    writer.flush()
    write_small_files(checkpoint, directory, fields, drafter)
    files = writer.finish()
    left_out = ("drafter",) if checkpoint.drafter and drafter is None else ()
    return Exported(files, writer.done, left_out)


def _layout(checkpoint: store.Checkpoint, layout: str) -> Layout:
    """How this checkpoint is stored in a layout: codes stay codes where the layout has them."""
    kinds = {
        entry.dtype
        for name, entry in checkpoint.manifest.arrays.items()
        if entry.dtype in ("float32", "bfloat16")
        and ".router." not in name
        and not name.endswith(store.SCALE)
    }
    plain = NAMES["float32" if "float32" in kinds else "bfloat16"]
    if layout == "v2-flash":
        return Layout(fused=False, linear=plain, experts=plain, other=plain)
    return Layout(
        fused=True,
        linear=FP8 if checkpoint.fp8 else plain,
        experts=MXFP4 if checkpoint.packed else plain,
        other=plain,
    )


def _mask(drafter: Any, stored: Layout) -> Declared:
    return Declared(stored.other, (drafter.hidden_size,), "drafter.mask_embedding")


def _groups(
    checkpoint: store.Checkpoint, tensors: dict[str, Declared], stored: Layout
) -> Iterator[tuple[Arrays, list[str]]]:
    """Arrays of one layer, or one other array, with the names of the tensors that they make."""
    grouped: dict[str, list[str]] = {}
    for name, declared in tensors.items():
        parts = declared.parameter.split(".")
        group = ".".join(parts[:3] if parts[1] == "layers" else parts)
        grouped.setdefault(group, []).append(name)
    for group, names in grouped.items():
        own = [
            name
            for name in checkpoint.manifest.arrays
            if name == group or name.startswith(f"{group}.")
        ]
        arrays = store.read(checkpoint, own)
        wanted = {tensors[name].parameter: tensors[name].dtype for name in names}
        yield {name: _stored(checkpoint, name, arrays, wanted) for name in wanted}, names


def _stored(
    checkpoint: store.Checkpoint, name: str, arrays: Arrays, wanted: dict[str, str]
) -> np.ndarray:
    """An array as the layout stores it: as it is, or decoded."""
    value, dtype = arrays[name], DTYPES[wanted[name]]
    if name + store.SCALE in arrays and name + store.SCALE not in wanted:
        scales = arrays[name + store.SCALE]
        value = store.decode_weights(name, value, scales, dtype, checkpoint)
    if value.dtype == dtype:
        return value
    if value.dtype.itemsize > dtype.itemsize:
        raise MimoError(f"{name} is {value.dtype}, which {dtype} would cut off.")
    return value.astype(dtype)


def _assemble(name: str, declared: Declared, pieces: list[Piece], arrays: Arrays) -> np.ndarray:
    """A stored tensor out of its pieces."""
    out = np.empty(declared.shape, DTYPES[declared.dtype])
    written = np.zeros(declared.shape[0], bool)
    for piece in pieces:
        array = arrays[piece.parameter]
        inner = array.shape[-1:] if len(declared.shape) > 1 else ()
        rows = array.reshape(-1, array.shape[-len(inner) - 1], *inner)[piece.index]
        count = (piece.stop - piece.start) * piece.repeat
        taken = rows[piece.row : piece.row + count].reshape(-1, piece.repeat, *inner)
        place = slice(piece.start, piece.stop)
        same = (taken == taken[:, :1]).all()
        if written[place].any():
            same = same and (out[place][written[place]] == taken[written[place], 0]).all()
        if not same:
            raise MimoError(
                f"{name} cannot be written: {piece.parameter} has other scales inside one tile of "
                "this layout. Export with --layout v2-flash, which decodes them."
            )
        out[place], written[place] = taken[:, 0], True
    assert written.all(), name
    return out


class _Shards:
    """Writes tensors to numbered files of bounded size, then the index that names them."""

    def __init__(self, directory: Path, limit: int, total: int, progress: Callable):
        self.directory, self.limit, self.total, self.progress = directory, limit, total, progress
        self.done = self.size = 0
        self.held: Arrays = {}
        self.shards: list[list[str]] = []
        self.drafter: Arrays = {}

    def add(self, name: str, tensor: np.ndarray) -> None:
        if name.startswith(DRAFTER_FOLDER):
            self.drafter[name.removeprefix(DRAFTER_FOLDER)] = tensor
            return
        if self.held and self.size + tensor.nbytes > self.limit:
            self.flush()
        self.held[name] = tensor
        self.size += tensor.nbytes

    def flush(self) -> None:
        """Writes what is held to the next file."""
        if self.held:
            self.shards.append(list(self.held))
            self._save(self.directory / _part(len(self.shards)), self.held)
            self.held, self.size = {}, 0

    def finish(self) -> tuple[Path, ...]:
        """Names the files by their number, writes the drafter's file and the index."""
        files, weight_map = [], {}
        for number, names in enumerate(self.shards, start=1):
            path = self.directory / f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            (self.directory / _part(number)).rename(path)
            files.append(path)
            weight_map |= dict.fromkeys(names, path.name)
        if self.drafter:
            files.append(self.directory / DRAFTER_FOLDER / "dflash_draft_model.safetensors")
            self._save(files[-1], self.drafter)
        index = {"metadata": {"total_size": self.done}, "weight_map": weight_map}
        text = json.dumps(index, indent=1) + "\n"
        write_atomically(self.directory / INDEX, text.encode())
        return tuple(files)

    def _save(self, path: Path, tensors: Arrays) -> None:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # The library lets nobody but the owner read.
        self.done += sum(tensor.nbytes for tensor in tensors.values())
        self.progress(self.done, self.total)


def _part(number: int) -> str:
    return f"model-{number:05d}.partial"
