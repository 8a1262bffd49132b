"""A manifest: each array's shape, dtype and content hash, and the hashes of the small files."""

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from os.path import isfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.errors import MimoError
from mimo_jax.json_files import read_json

FORMATS = (1, 2)
"""Versions of the checkpoint's layout; a reader refuses those that it does not know. In 2 each
group of arrays has an Orbax tree of its own."""

NAME, PARAMS = "manifest.json", "params"
SMALL = 1 << 20
"""Bytes up to which a file below params is hashed as a whole. Others hold arrays, which have hashes
of their own; hashing them twice would take twice as long."""

TAIL = 1 << 16
"""Bytes hashed at the end of each of the others, where Orbax's own records are, read or not."""

FLOATS = ("float32", "bfloat16")
_ML_DTYPES = {t.name: t for t in map(np.dtype, (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn))}
CODES = (np.dtype(np.uint8), _ML_DTYPES["float8_e4m3fn"])
"""MXFP4 codes and scales; FP8 codes."""
PIECE = 1 << 26
"""Bytes of an array that are hashed at a time, in a thread each."""

AGAIN = "Fetch the checkpoint again, or write it again with mimo_jax.checkpoint.store.save."


@dataclasses.dataclass(frozen=True)
class ArrayEntry:
    """What an array must be. `hash` is from `hash_array`."""

    shape: tuple[int, ...]
    dtype: str
    hash: str

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize

    @classmethod
    def read(cls, fields: dict[str, Any]) -> "ArrayEntry":
        """From JSON; raises a ValueError or a KeyError for what cannot be."""
        shape, dtype = fields["shape"], fields["dtype"]
        sizes = all(type(size) is int and 0 <= size < 2**40 for size in shape)
        if not sizes or len(shape) > 8 or dtype not in (*FLOATS, *(code.name for code in CODES)):
            raise ValueError(f"an array is {str(dtype)[:40]}{str(shape)[:80]}")
        return cls(tuple(shape), dtype, fields["hash"])

    @classmethod
    def of(cls, array: np.ndarray) -> "ArrayEntry":
        """Describes an array."""
        return cls(tuple(array.shape), array.dtype.name, hash_array(array))

    def check(self, name: str, array: np.ndarray) -> None:
        """Raises a MimoError unless the array is the one that was saved."""
        for what, found, wanted in (
            ("shape", tuple(array.shape), self.shape),
            ("dtype", array.dtype.name, self.dtype),
        ):
            if found != wanted:
                raise MimoError(
                    f"{name} has {what} {found} on disk, but the manifest says {wanted}: the "
                    f"checkpoint is damaged. {AGAIN}"
                )
        if hash_array(array) != self.hash:
            raise MimoError(
                f"{name} {self.shape} is damaged: its content does not have the hash that the "
                f"manifest gives. {AGAIN}"
            )


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All that a checkpoint's content is held to.

    Attributes:
      arrays: by dotted name, "target.layers.0.attention.qkv".
      files: hashes of config.json and the other small files, by name.
      notes: free remarks of who saved it: recipe, figures.
      blobs: for each file below params, by path: its size, and the hash of it or of its end.
        Checkpoints of earlier versions lack it.
      grouped: whether each group of arrays has an Orbax tree of its own.
    """

    arrays: dict[str, ArrayEntry]
    files: dict[str, str]
    notes: dict[str, Any]
    blobs: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    grouped: bool = False

    def folder(self, name: str) -> str:
        """Where the Orbax tree lies that holds an array, in the checkpoint's directory."""
        return f"{PARAMS}/{group_of(name)}" if self.grouped else PARAMS

    def write(self, directory: Path) -> None:
        """Writes the manifest in one atomic step; with it the checkpoint is complete."""
        body = {
            "format": FORMATS[self.grouped],
            "arrays": {name: dataclasses.asdict(entry) for name, entry in self.arrays.items()},
            "files": self.files,
            "notes": self.notes,
        } | ({"blobs": self.blobs} if self.blobs else {})
        text = json.dumps(body | {"hash": _hash_body(body)}, indent=1) + "\n"
        write_atomically(directory / NAME, text.encode())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads and checks the manifest itself.

        Raises:
          MimoError: if it is missing, damaged or of another format.
        """
        path = directory / NAME
        if not directory.is_dir():
            raise MimoError(
                f"{directory} is not a directory: give the directory of a checkpoint, such as "
                "checkpoints/mimo-nano in the repository."
            )
        if not path.exists():
            raise MimoError(
                f"{directory} has no {NAME}, so it is not a checkpoint of mimo_jax, or its saving "
                f"was interrupted. {AGAIN}"
            )
        try:
            body = read_json(path)
        except MimoError as error:
            raise MimoError(f"{error} {AGAIN}") from None
        if body.get("format") not in FORMATS:
            raise MimoError(
                f"{path} has format {body.get('format')!r}; this version of mimo_jax reads "
                f"{FORMATS}. Install the version that wrote it, or save it anew."
            )
        if body.pop("hash", None) != _hash_body(body):
            raise MimoError(f"{path} was changed after it was written: its hash differs. {AGAIN}")
        try:
            arrays = {name: ArrayEntry.read(entry) for name, entry in body["arrays"].items()}
            blobs = {name: (size, text) for name, (size, text) in body.get("blobs", {}).items()}
            files, grouped = dict(body["files"]), body["format"] == FORMATS[True]
            for name in [*files, *blobs]:
                if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
                    raise ValueError(f"{name!r} is no file of this directory")
            return cls(arrays, files, dict(body["notes"]), blobs, grouped)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise MimoError(
                f"{path} lacks a part or has one malformed ({error}). {AGAIN}"
            ) from None

    def check_files(self, directory: Path) -> None:
        """Raises a MimoError naming the first small file that is missing or was changed."""
        for name, expected in self.files.items():
            path = directory / name
            if not isfile(path):
                raise MimoError(f"{path} is missing, but the manifest lists it. {AGAIN}")
            if hash_bytes(path.read_bytes()) != expected:
                raise MimoError(
                    f"{path} was changed after the checkpoint was saved: its hash is not the "
                    f"manifest's. {AGAIN}"
                )

    def check_blobs(self, directory: Path) -> None:
        """Raises a MimoError naming the first file below params that is cut short, or damaged.

        What large files hold is checked with each array, when it is read.
        """
        for name, (size, expected) in self.blobs.items():
            path = directory / PARAMS / name
            if not isfile(path):
                raise MimoError(f"{path} is missing, but the manifest lists it. {AGAIN}")
            found = path.stat().st_size
            if found != size:
                raise MimoError(
                    f"{path} has {found} bytes, but the manifest says {size}: it was not written, "
                    f"or not fetched, to its end. {AGAIN}"
                )
            if expected != hash_end(path):
                raise MimoError(
                    f"{path} was changed after the checkpoint was saved: its hash is not the "
                    f"manifest's. {AGAIN}"
                )


def group_of(name: str) -> str:
    """The group of an array: its layer, or what it is at the top: "target.layers.3", "target.head".

    A converter writes a group at a time, which bounds the memory that it needs.
    """
    parts = name.split(".")
    return ".".join(parts[: 3 if parts[1] == "layers" else 2])


def describe_blobs(params: Path) -> dict[str, tuple[int, str]]:
    """Sizes of all files in a folder, by path, and hashes of them or of their ends."""
    files = sorted(path for path in params.rglob("*") if path.is_file())
    return {
        path.relative_to(params).as_posix(): (path.stat().st_size, hash_end(path)) for path in files
    }


def hash_end(path: Path) -> str:
    """BLAKE2b of a file of at most SMALL bytes, or of the last TAIL bytes of a larger one."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0 if size <= SMALL else size - TAIL)
        return hash_bytes(file.read())


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of that name, those of ml_dtypes included."""
    return _ML_DTYPES.get(name) or np.dtype(name)


def hash_bytes(data: Any) -> str:
    """BLAKE2b of bytes, 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def hash_array(array: np.ndarray) -> str:
    """BLAKE2b of an array's bytes in C order; of more than PIECE, of its pieces' BLAKE2b in turn.

    A thread hashes some hundred megabytes a second, disks read faster.
    """
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if data.size <= PIECE:
        return hash_bytes(data)
    pieces = [data[start : start + PIECE] for start in range(0, data.size, PIECE)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return hash_bytes("".join(pool.map(hash_bytes, pieces)).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash there is the old one or the new one, whole."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _hash_body(body: dict[str, Any]) -> str:
    return hash_bytes(json.dumps(body, sort_keys=True).encode())
