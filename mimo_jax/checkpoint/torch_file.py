"""The drafter's mask_embedding.pt, read without unpickling, and written: a tensor and an integer.

A pickle is a program for a stack machine, and can do whatever Python can. Here runs a machine that
knows the instructions, names and values which torch.save needs for this one dictionary; it stops at
all others. The file around it is the zip of torch 1.6 and later: data.pkl, and data/KEY for each
storage.
"""

import dataclasses
import io
import pickle
import pickletools
import reprlib
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.errors import MimoError

KEYS = {"mask_token_id", "embedding"}
MAX_PROGRAM = 1 << 16
"""Bytes that data.pkl may have; one dictionary of two needs about 300."""

MAX_ID = 2**31
STORAGES = {
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch HalfStorage": np.dtype("<f2"),
    "torch FloatStorage": np.dtype("<f4"),
}
REBUILD, ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
GLOBALS = {*STORAGES, REBUILD, ORDERED}
ALSO_IN_ZIP = {
    *("version", "byteorder", ".data/serialization_id", ".format_version", ".storage_alignment")
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
WAY_OUT = (
    'It must be what torch.save({"mask_token_id": int, "embedding": tensor}, path) writes, with a '
    "bfloat16, float16 or float32 tensor of one axis. Fetch the drafter again, or save it so."
)


def read_mask_embedding(path: str | Path) -> tuple[int, np.ndarray]:
    """Reads {mask_token_id: int, embedding: tensor [d]} as torch.save writes it.

    Args:
      path: of a .pt file.

    Returns:
      the token's id, and its embedding: bfloat16, float16 or float32, [d].

    Raises:
      MimoError: if the file holds anything else, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise MimoError(f"{path} is missing, or is not a file. {WAY_OUT}")
    try:
        return _read(path)
    except _Refused as error:
        raise MimoError(f"{path} {error}. {WAY_OUT}") from None
    # What zipfile raises for files in whatever state: damage, encryption, unknown compression.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError):
        raise MimoError(f"{path} is damaged: it is no whole zip file of torch. {WAY_OUT}") from None


def write_mask_embedding(path: str | Path, token: int, embedding: np.ndarray) -> None:
    """Writes what `read_mask_embedding` and torch.load read.

    Args:
      path: of the .pt file.
      token: mask_token_id.
      embedding: [d], of a dtype that can be read.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {dtype: name for name, dtype in STORAGES.items()}
    members = {
        "data.pkl": _program(token, kinds[embedding.dtype], len(embedding)),
        "byteorder": b"little",
        "data/0": embedding.tobytes(),
        "version": b"3\n",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(f"{path.stem}/{name}", data)


def _program(token: int, storage: str, count: int) -> bytes:
    """The pickle of the dictionary, instruction by instruction as torch.save has it."""

    def text(value: str) -> bytes:
        data = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(data)) + data

    def integer(value: int) -> bytes:
        return pickle.BININT + struct.pack("<i", value)

    def name(value: str) -> bytes:
        return pickle.GLOBAL + value.replace(" ", "\n").encode() + b"\n"

    reference = (
        pickle.MARK + text("storage") + name(storage) + text("0") + text("cpu") + integer(count)
    )
    tensor = (
        name(REBUILD)
        + pickle.MARK
        + (reference + pickle.TUPLE + pickle.BINPERSID)
        + integer(0)
        + (integer(count) + pickle.TUPLE1)
        + (integer(1) + pickle.TUPLE1)
        + pickle.NEWFALSE
        + (name(ORDERED) + pickle.EMPTY_TUPLE + pickle.REDUCE)
        + (pickle.TUPLE + pickle.REDUCE)
    )
    items = text("mask_token_id") + integer(token) + text("embedding") + tensor
    head = pickle.PROTO + bytes([2]) + pickle.EMPTY_DICT + pickle.MARK
    return head + items + pickle.SETITEMS + pickle.STOP


class _Refused(Exception):
    """Why a file is not read; the end of a sentence that begins with its path."""


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One axis, contiguous: `count` elements of a storage, from `start` on."""

    storage: _Storage
    start: int
    count: int


_MARK = object()
_HOOKS = object()
"""The empty OrderedDict that a tensor has where hooks of its gradient would be."""


def _read(path: Path) -> tuple[int, np.ndarray]:
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise _Refused("is not a zip file; torch before 1.6 wrote another format")
    with zipfile.ZipFile(path) as archive:
        members = _members(archive)
        program = members["data.pkl"]
        if program.file_size > MAX_PROGRAM:
            raise _Refused(f"has a data.pkl of {program.file_size} bytes, over {MAX_PROGRAM}")
        token, tensor = _check(_interpret(archive.read(program)))
        storage = tensor.storage
        member = members.get(f"data/{storage.key}")
        stored = [name for name in members if name.startswith("data/")]
        if member is None or len(stored) != 1:
            raise _Refused(f"must hold one storage, data/{storage.key}, but has {stored}")
        if member.file_size != storage.count * storage.dtype.itemsize:
            raise _Refused(
                f"has {member.file_size} bytes in {stored[0]}, not {storage.count} {storage.dtype}"
            )
        if "byteorder" in members and archive.read(members["byteorder"]).strip() != b"little":
            raise _Refused("is not in little-endian byte order")
        size = storage.dtype.itemsize
        data = _slice(archive, member, tensor.start * size, tensor.count * size)
    return token, np.frombuffer(data, storage.dtype)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The zip's members by name without their common folder, nothing compressed or unknown."""
    members = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if name not in ALSO_IN_ZIP | {"data.pkl"} and not name.startswith("data/"):
            raise _Refused(f"holds {info.filename[:80]!r}, which torch.save does not write")
        if name in members:
            raise _Refused(f"holds {name[:80]!r} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise _Refused(f"has {info.filename[:80]!r} compressed, which torch.save does not do")
        members[name] = info
    if "data.pkl" not in members:
        raise _Refused("holds no data.pkl")
    return members


def _slice(archive: zipfile.ZipFile, member: zipfile.ZipInfo, start: int, length: int) -> bytes:
    """Some bytes of a member; all of it is read, piece by piece, so that its CRC is checked.

    A row of an embedding saved as it is brings the whole embedding along: that is not kept here.
    """
    kept, at = io.BytesIO(), 0
    with archive.open(member) as file:
        while piece := file.read(1 << 20):
            kept.write(piece[max(start - at, 0) : max(start + length - at, 0)])
            at += len(piece)
    return kept.getvalue()


def _check(value: Any) -> tuple[int, _Tensor]:
    if type(value) is not dict or value.keys() != KEYS:
        keys = f"keys {sorted(value)[:8]}" if type(value) is dict else f"a {type(value).__name__}"
        raise _Refused(f"has {keys[:200]}, not {sorted(KEYS)}")
    token, tensor = value["mask_token_id"], value["embedding"]
    if type(token) is not int or not 0 <= token < MAX_ID:
        raise _Refused(f"has a mask_token_id that is no integer from 0 on: {_shown(token)}")
    if type(tensor) is not _Tensor:
        raise _Refused(f"has an embedding that is no tensor, but a {type(tensor).__name__}")
    return token, tensor


def _interpret(program: bytes) -> Any:
    """Runs a pickle's instructions, those that are known, and gives its one value."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
    except ValueError as error:
        raise _Refused(f"has a malformed data.pkl ({str(error)[:200]})") from None
    except (IndexError, KeyError):
        raise _Refused("has a malformed data.pkl: it uses values that it has not made") from None
    if len(machine.stack) != 1:
        raise _Refused("has a malformed data.pkl: it does not end with one value")
    return machine.stack[0]


class _Machine:
    """Pickle's stack machine, without the instructions that torch.save does not need here."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Runs one instruction."""
        stack = self.stack
        if name == "PROTO":
            return
        if name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2"):
            stack.append(argument)
        elif name in ("NEWTRUE", "NEWFALSE"):
            stack.append(name == "NEWTRUE")
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in TUPLES:
            stack.append(tuple(self._pop(TUPLES[name])))
        elif name == "SETITEM":
            self._set_items(self._pop(2))
        elif name == "SETITEMS":
            self._set_items(self._since_mark())
        elif name == "GLOBAL":
            stack.append(_global(argument))
        elif name == "BINPERSID":
            stack.append(_storage(self._pop(1)[0]))
        elif name == "REDUCE":
            stack.append(_call(*self._pop(2)))
        else:
            raise _Refused(f"has the pickle instruction {name}, which one tensor does not need")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _since_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                values = self.stack[at + 1 :]
                del self.stack[at:]
                return values
        raise IndexError

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise IndexError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise _Refused(f"has the key {_shown(key)} twice, or it is no string")
            target[key] = value


def _global(name: str) -> _Global:
    if name not in GLOBALS:
        raise _Refused(f"asks for {name[:80]!r}, which one tensor of floats does not need")
    return _Global(name)


def _storage(reference: Any) -> _Storage:
    """A storage from the tuple by which torch refers to it; on which device it was is ignored."""
    match reference:
        case ("storage", _Global(name), str(key), str(), int(count)) if name in STORAGES:
            if key.isascii() and key.isdigit() and count >= 0:
                return _Storage(STORAGES[name], key, count)
    raise _Refused(f"refers to something that is no storage of floats: {_shown(reference)}")


def _call(function: Any, arguments: Any) -> Any:
    """The two calls there are: a tensor from a storage, and the empty OrderedDict beside it."""
    if function == _Global(ORDERED) and arguments == ():
        return _HOOKS
    if function != _Global(REBUILD):
        raise _Refused(f"calls {_shown(function)}, with {_shown(arguments)}")
    match arguments:
        case (_Storage() as storage, int(start), (int(count),), (1,), bool(), hooks) if (
            hooks is _HOOKS and start >= 0 and count > 0 and start + count <= storage.count
        ):
            return _Tensor(storage, start, count)
    raise _Refused(
        f"has a tensor that is not one contiguous axis inside its storage: {_shown(arguments)}"
    )


def _shown(value: Any) -> str:
    """A value in an error. Tuples can share parts so that writing them out would never end."""
    return reprlib.repr(value)[:200]
