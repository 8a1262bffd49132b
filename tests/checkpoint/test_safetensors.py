"""The safetensors reader: what the library writes is read exactly, each broken promise is named."""

import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors import TensorSpec, serialize_file

from mimo_jax.checkpoint.safetensors import DTYPES, INDEX, MAX_HEADER, TensorFiles
from mimo_jax.errors import MimoError

LIBRARY_NAMES = {
    # The library's own names of dtypes, and numpy's of the same content.
    "BOOL": ("bool", np.bool_),
    "U8": ("uint8", np.uint8),
    "I8": ("int8", np.int8),
    "F8_E4M3": ("float8_e4m3fn", ml_dtypes.float8_e4m3fn),
    "F8_E5M2": ("float8_e5m2", ml_dtypes.float8_e5m2),
    "F8_E8M0": ("float8_e8m0fnu", np.uint8),
    "F4": ("float4_e2m1fn_x2", np.uint8),
    "U16": ("uint16", np.uint16),
    "I16": ("int16", np.int16),
    "F16": ("float16", np.float16),
    "BF16": ("bfloat16", ml_dtypes.bfloat16),
    "U32": ("uint32", np.uint32),
    "I32": ("int32", np.int32),
    "F32": ("float32", np.float32),
    "U64": ("uint64", np.uint64),
    "I64": ("int64", np.int64),
    "F64": ("float64", np.float64),
}


def random_array(rng, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random bytes as that dtype: NaNs, infinities and subnormals are among them."""
    kind = np.dtype(LIBRARY_NAMES[dtype][1])
    if dtype == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] * kind.itemsize), dtype=np.uint8)
    return raw.view(kind)


def write_library(path, arrays: dict[str, tuple[str, np.ndarray]], metadata=None) -> None:
    """Writes with the library; each array comes with the dtype to store it as."""
    specs = {
        name: TensorSpec(
            dtype=LIBRARY_NAMES[dtype][0],
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, (dtype, array) in arrays.items()
    }
    serialize_file(specs, path, metadata)


def write_raw(path: pathlib.Path, header, data: bytes, length: int | None = None) -> None:
    """Writes whatever header is given: an object, or text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


def test_every_dtype_of_the_librarys_writer(tmp_path, rng):
    arrays = {name: (name, random_array(rng, name, (3, 5, 14))) for name in LIBRARY_NAMES}
    arrays |= {"scalar": ("F32", random_array(rng, "F32", (1,)).reshape(()))}
    arrays |= {"nothing": ("BF16", np.zeros((4, 0, 3), ml_dtypes.bfloat16))}
    arrays |= {"名 / ..": ("U8", random_array(rng, "U8", (11,)))}
    write_library(tmp_path / "any name.safetensors", arrays, {"format": "pt"})
    files = TensorFiles.open(tmp_path)
    assert DTYPES.keys() == LIBRARY_NAMES.keys()
    assert files.tensors.keys() == arrays.keys() and files.metadata == {} and not files.unlisted
    assert files.nbytes == sum(array.nbytes for _, array in arrays.values())
    for name, (dtype, array) in arrays.items():
        found, tensor = files.read(name), files.tensors[name]
        same_bits(found, array)
        assert (tensor.name, tensor.dtype, tensor.nbytes) == (name, dtype, array.nbytes)
        # F4's shape in the file counts numbers, two of them a byte.
        stored = (*array.shape[:-1], 2 * array.shape[-1]) if dtype == "F4" else array.shape
        assert tensor.shape == stored and tensor.path == tmp_path / "any name.safetensors"
        assert tensor.path.read_bytes()[tensor.offset :][: tensor.nbytes] == array.tobytes()
    with pytest.raises(MimoError, match="holds no tensor 'missing'"):
        files.read("missing")


def test_views_share_the_files_memory(tmp_path, rng):
    array = random_array(rng, "BF16", (7, 9))
    write_library(tmp_path / "a.safetensors", {"a": ("BF16", array)})
    files = TensorFiles.open(tmp_path)
    first, second = files.read("a"), files.read("a")
    assert np.shares_memory(first, second) and not first.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0
    files.release(["a"])
    same_bits(first, array)


def test_unaligned_tensors(tmp_path, rng):
    """The library sorts tensors so that all are aligned; others need not."""
    number = random_array(rng, "F64", (5,))
    header = {"b": entry("U8", (3,), (0, 3)), "a": entry("F64", (5,), (3, 43))}
    write_raw(tmp_path / "a.safetensors", header, b"xyz" + number.tobytes())
    same_bits(TensorFiles.open(tmp_path).read("a"), number)


@pytest.fixture
def shards(tmp_path, rng):
    """Two shards that split a weight from its scale, an index, and a file that it does not name."""
    arrays = {
        "l.10.weight": ("F8_E4M3", random_array(rng, "F8_E4M3", (6, 20))),
        "l.10.weight_scale_inv": ("F32", random_array(rng, "F32", (2, 3))),
        "l.9.weight": ("U8", random_array(rng, "U8", (6, 16))),
        "l.9.weight_scale": ("U8", random_array(rng, "U8", (6, 1))),
    }
    parts = {"model_pp0_ep0_shard0": [0, 2, 3], "sub/model_mtp": [1]}
    weight_map = {}
    (tmp_path / "sub").mkdir()
    names = list(arrays)
    for file, indices in parts.items():
        part = {names[i]: arrays[names[i]] for i in indices}
        write_library(tmp_path / f"{file}.safetensors", part)
        weight_map |= dict.fromkeys(part, f"{file}.safetensors")
    write_library(tmp_path / "other.safetensors", {"x": arrays["l.9.weight"]})
    index = {"metadata": {"tp_size": 4, "total_size": 1}, "weight_map": weight_map}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path, arrays, index


def test_shards_through_the_index(shards):
    directory, arrays, index = shards
    files = TensorFiles.open(str(directory))
    assert files.metadata == index["metadata"] and files.tensors.keys() == arrays.keys()
    assert files.unlisted == (directory / "other.safetensors",)
    for name, (_, array) in arrays.items():
        same_bits(files.read(name), array)
        assert files.tensors[name].path == directory / index["weight_map"][name]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"l.9.weight": "absent.safetensors"},
            "absent.safetensors, which .* 'l.9.weight', is missing",
        ),
        (
            {"l.9.weight": "sub/model_mtp.safetensors"},
            "holds 'l.9.weight', but .* puts it into sub",
        ),
        ({"l.9.weight": None}, "ep0_shard0.* holds 'l.9.weight', but .*index.* does not name it"),
        ({"y": "sub/model_mtp.safetensors"}, "says that 'y' is in sub/.*but the file does not"),
        ({"y": "../a.safetensors"}, r"'y' is in '../a.safetensors', which is not the name"),
        ({"y": "a/../../b.safetensors"}, "which is not the name"),
        ({"y": "/a.safetensors"}, "which is not the name"),
        ({"y": "C:\\a.safetensors"}, "which is not the name"),
        ({"y": "..\\a.safetensors"}, "which is not the name"),
        ({"y": "\\\\host\\a.safetensors"}, "which is not the name"),
        ({"y": "a\0.safetensors"}, "which is not the name"),
        ({"y": "a\x1b[2J.safetensors"}, r"\\x1b.*which is not the name"),
        ({"y": "mask_embedding.pt"}, "which is not the name"),
        ({"y": ""}, "which is not the name"),
        ({"y": 3}, "'y' is in '3', which is not the name"),
        ({"y": ["a.safetensors"]}, "which is not the name"),
        ({"y": "a" * 300 + ".safetensors"}, "which .* for 'y', is missing"),
    ],
)
def test_an_index_that_lies(shards, change, match):
    directory, _, index = shards
    weight_map = {k: v for k, v in (index["weight_map"] | change).items() if v is not None}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MimoError, match=match):
        TensorFiles.open(directory)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"weight_map": {}}', 'must have a "weight_map"'),
        ('{"weight_map": []}', 'must have a "weight_map"'),
        ('{"metadata": {}}', 'must have a "weight_map"'),
        ('{"metadata": [1], "weight_map": {"a": "b.safetensors"}}', '"metadata", if there is'),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "key 'a' is there twice"),
        ("[]", "holds a list"),
        ("{,}", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"metadata": {"total_size": NaN}, "weight_map": {}}', "NaN is no JSON number"),
        ('{"metadata": {"total_size": ' + "9" * 5000 + '}, "weight_map": {}}', "not valid JSON"),
        ('{"\\ud800": 1}', "not valid JSON"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, match):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(MimoError, match=match) as caught:
        TensorFiles.open(tmp_path)
    assert INDEX in str(caught.value)


HUGE = 2**40
BROKEN = {
    # What is wrong: header, bytes after it, and the error's words.
    "hole": ({"a": entry(), "b": entry(offsets=(32, 56))}, 56, "'b' leaves a hole"),
    "hole first": ({"a": entry(offsets=(8, 32))}, 32, "'a' leaves a hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=(20, 44))}, 44, "'b' overlaps"),
    "same range": ({"a": entry(), "b": entry()}, 24, "'b' overlaps|'a' overlaps"),
    "surplus": ({"a": entry()}, 25, "'a', its last tensor, ends at byte .* but the file has"),
    "truncated": ({"a": entry()}, 23, "'a', its last tensor, ends at byte"),
    "only surplus": ({}, 5, "its header ends at byte"),
    "short range": ({"a": entry(offsets=(0, 20))}, 20, "'a', F32.2, 3., needs 24 .*range has 20"),
    "reversed": ({"a": entry(offsets=(24, 0))}, 24, "'a' has data_offsets .24, 0."),
    "negative": ({"a": entry(offsets=(-24, 0))}, 24, "'a' has data_offsets"),
    "three": ({"a": entry(offsets=(0, 12, 24))}, 24, "'a' has data_offsets"),
    "float offset": ({"a": entry(offsets=(0, 24.0))}, 24, "'a' has data_offsets"),
    "true": ({"a": entry("U8", (1,), (False, True))}, 1, "'a' has data_offsets"),
    "far": ({"a": entry("U8", (HUGE,), (0, HUGE))}, 24, "'a', its last tensor, ends"),
    "huge offset": ({"a": entry(offsets=(0, 2**64))}, 24, "'a' has data_offsets"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "'a' must have dtype, shape"),
    "more": ({"a": entry() | {"strides": [1]}}, 24, "'a' must have dtype, shape and data_off"),
    "no object": ({"a": [1]}, 0, "'a' must have dtype"),
    "F32 in lower case": ({"a": entry("f32")}, 24, "'a' has dtype 'f32'; known are BOOL"),
    "F6": ({"a": entry("F6_E2M3")}, 24, "'a' has dtype 'F6_E2M3'"),
    "dtype a list": ({"a": entry(["F32"])}, 24, "'a' has dtype"),
    "negative size": ({"a": entry(shape=(-2, -3))}, 24, "'a' has shape"),
    "float size": ({"a": entry(shape=(2.0, 3))}, 24, "'a' has shape"),
    "shape an int": ({"a": entry() | {"shape": 6}}, 24, "'a' has shape"),
    "true size": ({"a": entry(shape=(True, 6))}, 24, "'a' has shape"),
    "overflow": ({"a": entry(shape=(2**33, 2**33))}, 24, "'a' has shape .*64 bits"),
    "hidden overflow": ({"a": entry("U8", (0, 2**62, 2**62), (0, 0))}, 0, "'a' has shape .*64 b"),
    "many axes": ({"a": entry(shape=(1,) * 65)}, 4, "'a' has shape"),
    "half a byte": ({"a": entry("F4", (3, 3), (0, 4))}, 4, "'a', F4.3, 3., does not fill bytes"),
    "F4 scalar": ({"a": entry("F4", (), (0, 0))}, 0, "'a', F4.., does not fill bytes"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__ must be an object of strings"),
    "metadata list": ({"__metadata__": ["a"]}, 0, "__metadata__ must be an object of strings"),
    "twice": (
        f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode(),
        24,
        "the key 'a' is there twice",
    ),
    "twice inside": (b'{"a": {"dtype": "F32", "dtype": "U8"}}', 0, "the key 'dtype' is there"),
    "cut": (b'{"a": {"dtype"', 0, "not valid JSON"),
    "array": (b"[]", 0, "begins with b'\\['"),
    "space": (b" {}", 0, "begins with b' '"),
    "no text": (b'{"\xff": 1}', 0, "not valid JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), 0, "begins with b'\\\\xff'"),
    "surrogate": (b'{"\\ud800": 1}', 0, "not valid JSON"),
    "deep": (b'{"a":' * 100_000, 0, "nested too deeply"),
    "empty": (b"", 0, "begins with b''"),
    "long name": ({"n" * 5000: [1]}, 0, r"nnn'\.\.\. \(5000 characters\) must have"),
    "escape in a name": ({"\x1b[2J": [1]}, 0, r"'\\x1b\[2J' must have"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_every_promise_of_the_format(tmp_path, fault):
    header, nbytes, match = BROKEN[fault]
    write_raw(tmp_path / "a.safetensors", header, bytes(nbytes))
    with pytest.raises(MimoError, match=match) as caught:
        TensorFiles.open(tmp_path)
    assert "a.safetensors" in str(caught.value) and len(str(caught.value)) < 1000
    assert str(caught.value).isascii() and str(caught.value).isprintable()


NARROWER = {
    "more": "fields that the format does not have could change what the others mean",
    "hidden overflow": "numpy cannot make such an array of no elements",
    "twice": "which of the two is meant?",
    "space": "the format's page says that a header begins with a brace",
}
"""Plants that the library reads and we do not, and why."""


@pytest.mark.parametrize("fault", sorted(BROKEN))
def test_the_library_agrees_that_it_is_broken(tmp_path, fault):
    """An oracle of the plants: none of them is a good file after all."""
    header, nbytes, _ = BROKEN[fault]
    write_raw(tmp_path / "a.safetensors", header, bytes(nbytes))
    if fault in NARROWER:
        safetensors.safe_open(tmp_path / "a.safetensors", "numpy")
    else:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(tmp_path / "a.safetensors", "numpy")


@pytest.mark.parametrize("content", [b"", b"\x02", b"\x02\0\0\0\0\0\0", b"\x03" + bytes(7) + b"{}"])
def test_files_that_are_too_short(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(MimoError, match="a.safetensors .* too few for"):
        TensorFiles.open(tmp_path)


def test_a_header_beyond_the_limit(tmp_path):
    """Neither the length of a header nor that of a file makes us reserve memory."""
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(1 << 40)
    with pytest.raises(MimoError, match="header of 100000001 bytes exceeds 100000000"):
        TensorFiles.open(tmp_path)
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(b"\xff" * 8)
    with pytest.raises(MimoError, match="too few for 8 and a header of 18446744073709551615"):
        TensorFiles.open(tmp_path)


def test_directories_that_cannot_be_read(tmp_path):
    with pytest.raises(MimoError, match="nowhere is not a directory"):
        TensorFiles.open(tmp_path / "nowhere")
    with pytest.raises(MimoError, match="has no .safetensors file and no model.safetensors.index"):
        TensorFiles.open(tmp_path)
    for name in "ab":
        write_raw(tmp_path / f"{name}.safetensors", {}, b"")
    with pytest.raises(MimoError, match="has 2 .safetensors files and no model.safe"):
        TensorFiles.open(tmp_path)


def test_a_pipe_does_not_keep_us_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "a.safetensors"}}')
    with pytest.raises(MimoError, match="a.safetensors, which .* is missing or is not a file"):
        TensorFiles.open(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    """Mapping it as it was would kill the process with SIGBUS."""
    write_raw(tmp_path / "a.safetensors", {"a": entry("U8", (9000,), (0, 9000))}, bytes(9000))
    files = TensorFiles.open(tmp_path)
    os.truncate(tmp_path / "a.safetensors", 4096)
    with pytest.raises(MimoError, match="a.safetensors has 4096 bytes now, and had 90"):
        files.read("a")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(MimoError, match="a.safetensors cannot be read any more"):
        files.read("a")


MEMORY = """
import resource, sys
from mimo_jax.checkpoint.safetensors import TensorFiles
files = TensorFiles.open(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
views = [files.read(f"t{i}") for i in range(8)]
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096, "opening reads nothing"
for i, view in enumerate(views):
    assert view.sum(dtype="int64") == 0
    files.release([f"t{i}"])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 48 << 10, f"{grown} KiB grown over 8 tensors of 16 MiB"
print(files.nbytes)
"""


def test_memory_is_that_of_what_is_used(tmp_path):
    """In a process of its own: 128 MiB of tensors, of which one at a time is kept."""
    size = 16 << 20
    header = {f"t{i}": entry("U8", (size,), (i * size, (i + 1) * size)) for i in range(8)}
    write_raw(tmp_path / "a.safetensors", header, b"")
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) + 8 * size)
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == f"{8 * size}\n", done.stderr
