"""Safetensors files, checked and memory-mapped: one file, or shards through their index.

The format: 8 bytes little-endian length N, N bytes of JSON that give each tensor its dtype, shape
and byte range, then the bytes of all tensors without a hole. Files come from strangers, so that
whatever the format promises is checked before a byte is used; nothing here runs what it reads.
"""

import dataclasses
import math
import mmap
import threading
from collections.abc import Iterable
from os.path import isfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.errors import MimoError
from mimo_jax.json_files import parse_json, read_json

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
METADATA = "__metadata__"
MAX_HEADER = 100_000_000
"""Bytes of JSON that a header may have; other readers of the format have the same limit."""

MAX_AXES = 64
"""Axes that numpy can give an array."""

MAX_BYTES = 2**63 - 1
AGAIN = "Fetch the file again; if it stays so, it was not written as the safetensors format asks."

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(np.uint8),
    "F4": np.dtype(np.uint8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
"""What `TensorFiles.read` gives for a stored dtype. F4 holds two numbers a byte."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what it is.

    Attributes:
      name: as in the file.
      dtype: as in the file, a key of `DTYPES`.
      shape: as in the file, in numbers; F4 has two of them a byte.
      path: of its file.
      offset: of its first byte in the file.
      nbytes: its length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


class TensorFiles:
    """The tensors of a directory's safetensors files; bytes are read when they are used.

    Example:
      files = TensorFiles.open("MiMo-V2.6-Flash")
      files.read("model.norm.weight")  # a read-only bfloat16 view of the file, [d]

    Attributes:
      directory: that was opened.
      tensors: by name; in the order of files and of bytes in each.
      metadata: the index's "metadata"; empty without an index.
      unlisted: safetensors files of the directory that its index does not name; they are not read.
    """

    def __init__(
        self,
        directory: Path,
        tensors: dict[str, StoredTensor],
        metadata: dict[str, Any],
        unlisted: tuple[Path, ...],
        sizes: dict[Path, int],
    ):
        self.directory = directory
        self.tensors = tensors
        self.metadata = metadata
        self.unlisted = unlisted
        self._sizes = sizes
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: str | Path) -> "TensorFiles":
        """Reads and checks the headers of all files that the index names, or of the single file.

        Raises:
          MimoError: if a file is missing or breaks the format, or files and index disagree; the
            file and the tensor are named.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise MimoError(
                f"{directory} is not a directory: give the one with the {SUFFIX} files."
            )
        present = sorted(path for path in directory.glob(f"*{SUFFIX}") if path.is_file())
        if not (directory / INDEX).exists():
            tensors, size = read_header(_single(directory, present))
            return cls(directory, tensors, {}, (), {present[0]: size})
        weight_map, metadata = _read_index(directory / INDEX)
        _check_present(directory, weight_map)
        tensors: dict[str, StoredTensor] = {}
        sizes = {}
        for file in dict.fromkeys(weight_map.values()):
            path = directory / file
            found, sizes[path] = read_header(path)
            _check_listed(found, weight_map, file, directory / INDEX)
            tensors |= found
        for name in weight_map.keys() - tensors.keys():
            raise MimoError(
                f"{directory / INDEX} says that {shown(name)} is in {weight_map[name]}, but the "
                f"file does not hold it. Fetch both again: they are of different versions."
            )
        unlisted = tuple(path for path in present if path not in sizes)
        return cls(directory, tensors, metadata, unlisted, sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """A read-only view of a tensor's bytes in its file; nothing is copied.

        Returns:
          the tensor, with the dtype that `DTYPES` gives: F8_E8M0 as bytes, F4 as bytes of two
          numbers each, so that its last axis is half as long.

        Raises:
          MimoError: if there is no such tensor, or its file was changed since it was opened.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise MimoError(f"{self.directory} holds no tensor {shown(name)}.")
        shape = tensor.shape
        if tensor.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        dtype = DTYPES[tensor.dtype]
        data = np.frombuffer(
            self._map(tensor.path),
            dtype=dtype,
            count=tensor.nbytes // dtype.itemsize,
            offset=tensor.offset,
        )
        return data.reshape(shape)

    def release(self, names: Iterable[str]) -> None:
        """Tells the system that these tensors' pages may leave memory.

        Views stay good: a page that is touched again comes from the file again. Without this a
        process that reads a whole checkpoint seems to hold all of it.
        """
        for name in names:
            tensor = self.tensors[name]
            if tensor.path in self._maps and tensor.nbytes:
                start = tensor.offset - tensor.offset % mmap.PAGESIZE
                length = tensor.offset + tensor.nbytes - start
                self._maps[tensor.path].madvise(mmap.MADV_DONTNEED, start, length)

    def _map(self, path: Path) -> mmap.mmap:
        """The mapped file, mapped when it is first needed."""
        with self._lock:
            if path not in self._maps:
                try:
                    with path.open("rb") as file:
                        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise MimoError(f"{path} cannot be read any more: {error}.") from None
                if len(mapped) != self._sizes[path]:
                    raise MimoError(
                        f"{path} has {len(mapped)} bytes now, and had {self._sizes[path]} when it "
                        "was opened: open it again when nobody writes to it."
                    )
                self._maps[path] = mapped
            return self._maps[path]


def read_header(path: Path) -> tuple[dict[str, StoredTensor], int]:
    """Reads and checks one file's header.

    Returns:
      the tensors by name, in the order of their bytes, and the file's length.

    Raises:
      MimoError: if the file breaks the format; the tensor at fault is named.
    """
    header, start, size = _load_header(path)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise _broken(path, f"its {METADATA} must be an object of strings")
    tensors = [_entry(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole"
            raise _broken(
                path, f"{shown(tensor.name)} {what}: it begins at {tensor.offset}, not at {end}"
            )
        end += tensor.nbytes
    if end != size:
        last = f"{shown(tensors[-1].name)}, its last tensor, ends" if tensors else "its header ends"
        raise _broken(path, f"{last} at byte {end}, but the file has {size} bytes")
    return {tensor.name: tensor for tensor in tensors}, size


def shown(name: str) -> str:
    """A name from a file as an error may print it: quoted, escaped, and not endless."""
    return ascii(name) if len(name) <= 200 else f"{ascii(name[:200])}... ({len(name)} characters)"


def _load_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON, where the tensors' bytes begin, and the file's length."""
    try:
        # A pipe of this name would keep `open` waiting.
        if not path.is_file():
            raise MimoError(f"{path} is missing, or is not a file: fetch it again.")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise _broken(path, f"its {size} bytes are too few for 8 and a header of {length}")
            if length > MAX_HEADER:
                raise _broken(path, f"its header of {length} bytes exceeds {MAX_HEADER}")
            text = file.read(length)
    except (OSError, ValueError) as error:
        if isinstance(error, MimoError):
            raise
        raise MimoError(f"{path} cannot be read: {error}.") from None
    if not text.startswith(b"{"):
        raise _broken(path, f"its header begins with {text[:1]!r}, not with a brace")
    return parse_json(text, f"The header of {path}"), 8 + length, size


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """One tensor of a header, checked by itself."""
    tensor = shown(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"{tensor} must have dtype, shape and data_offsets, and no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MimoError(
            f"{path}: {tensor} has dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}."
        )
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise _broken(path, f"{tensor} has shape {str(shape)[:80]}, not at most {MAX_AXES} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(path, f"{tensor} has data_offsets {str(offsets)[:80]}, not [begin, end]")
    # Axes of length zero must not hide an overflow from numpy, which multiplies the others.
    if math.prod(size or 1 for size in shape) > MAX_BYTES // 8:
        raise _broken(path, f"{tensor} has shape {shape}, more than can be counted in 64 bits")
    begin, end = offsets
    nbytes = _nbytes(path, tensor, dtype, shape)
    if nbytes != end - begin:
        raise _broken(
            path, f"{tensor}, {dtype}{shape}, needs {nbytes} bytes, but its range has {end - begin}"
        )
    return StoredTensor(name, dtype, tuple(shape), path, start + begin, nbytes)


def _nbytes(path: Path, tensor: str, dtype: str, shape: list[int]) -> int:
    count = math.prod(shape)
    if dtype != "F4":
        return count * DTYPES[dtype].itemsize
    if not shape or shape[-1] % 2:
        raise _broken(path, f"{tensor}, F4{shape}, does not fill bytes: its last axis must be even")
    return count // 2


def _are_sizes(value: Any) -> bool:
    """Whether this is a list of integers from 0 to 2^63 - 1; in JSON true is no integer."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_BYTES for v in value)


def _single(directory: Path, present: list[Path]) -> Path:
    if len(present) != 1:
        found = f"{len(present)} {SUFFIX} files" if present else f"no {SUFFIX} file"
        raise MimoError(
            f"{directory} has {found} and no {INDEX}: fetch the index too, or keep one file."
        )
    return present[0]


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The index's map from tensor to file, and its metadata."""
    index = read_json(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise MimoError(
            f'{path} must have a "weight_map" from tensors to files, and its "metadata", if there '
            "is any, must be an object. Fetch it again."
        )
    for name, file in weight_map.items():
        if type(file) is not str or not _is_inside(file):
            raise MimoError(
                f"{path} says that {shown(name)} is in {shown(str(file))}, which is not the name "
                f"of a {SUFFIX} file inside the directory. Do not use this checkpoint."
            )
    return weight_map, metadata


def _is_inside(file: str) -> bool:
    """Whether a file's name leads nowhere but into the directory, on any system, and prints."""
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    steps = {*posix.parts, *windows.parts}
    absolute = posix.is_absolute() or windows.drive or windows.root
    return file.endswith(SUFFIX) and not absolute and ".." not in steps and file.isprintable()


def _check_present(directory: Path, weight_map: dict[str, str]) -> None:
    """Raises a MimoError if a file is missing; a download that was cut short often lacks some."""
    missing = [f for f in dict.fromkeys(weight_map.values()) if not isfile(directory / f)]
    if missing:
        name = next(name for name, file in weight_map.items() if file == missing[0])
        others = f" and {len(missing) - 1} other files" if missing[1:] else ""
        raise MimoError(
            f"{directory / missing[0]}{others}, which {INDEX} names for {shown(name)}, is missing "
            "or is not a file: fetch the whole checkpoint."
        )


def _check_listed(
    found: dict[str, StoredTensor], weight_map: dict[str, str], file: str, index: Path
) -> None:
    for name in found:
        if weight_map.get(name) != file:
            where = f"puts it into {weight_map[name]}" if name in weight_map else "does not name it"
            raise MimoError(
                f"{found[name].path} holds {shown(name)}, but {index.name} {where}. Fetch both "
                "again: they are of different versions."
            )


def _broken(path: Path, why: str) -> MimoError:
    return MimoError(f"{path} is damaged: {why}. {AGAIN}")
