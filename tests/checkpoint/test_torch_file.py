"""mask_embedding.pt: what torch.save writes is read exactly, all else is refused, nothing runs."""

import collections
import io
import pickle
import pickletools
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.checkpoint.torch_file import read_mask_embedding
from mimo_jax.errors import MimoError

DTYPES = {
    "BFloat16Storage": ml_dtypes.bfloat16,
    "HalfStorage": np.float16,
    "FloatStorage": np.float32,
}


class Tensor:
    """Pickles as torch's tensors do: a function of torch's and the storage it works on."""

    def __init__(self, torch, storage, start, size, stride=(1,)):
        hooks = collections.OrderedDict()
        self.parts = (storage, start, size, stride, False, hooks)
        self.rebuild = torch._utils._rebuild_tensor_v2

    def __reduce_ex__(self, protocol):
        return self.rebuild, self.parts


class Storage:
    def __init__(self, kind, key, count, device="cpu"):
        self.reference = ("storage", kind, key, device, count)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.reference if isinstance(value, Storage) else None


def make_torch():
    """The names of torch that its files mention, without torch."""
    torch = types.ModuleType("torch")
    torch._utils = types.ModuleType("torch._utils")
    for name in (*DTYPES, "DoubleStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch", "__qualname__": name}))

    def _rebuild_tensor_v2():
        """Only its name is written."""

    for function in (_rebuild_tensor_v2,):
        function.__module__, function.__qualname__ = "torch._utils", function.__name__
        setattr(torch._utils, function.__name__, function)
    return torch


def dump(torch, value, protocol=2) -> bytes:
    buffer = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", torch._utils)
        Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def write(path, program, data, compression=zipfile.ZIP_STORED, **more):
    """The zip that torch.save makes; `more` adds members or, with None, leaves them out."""
    members = {"data.pkl": program, "byteorder": b"little", "data/0": data, "version": b"3\n"}
    members |= {".data/serialization_id": b"0" * 40} | more
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(f"mask_embedding/{name}", content)
    return path


@pytest.fixture(scope="module")
def torch():
    return make_torch()


@pytest.fixture
def good(torch, rng):
    """Storage bytes of a bfloat16 embedding of 37, and the value that torch.save would be given."""
    row = rng.standard_normal(37).astype(ml_dtypes.bfloat16)
    tensor = Tensor(torch, Storage(torch.BFloat16Storage, "0", 37), 0, (37,))
    return row.tobytes(), {"mask_token_id": 151675, "embedding": tensor}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("order", [1, -1])
def test_every_dtype_is_read_exactly(tmp_path, torch, rng, kind, order):
    """A row that was saved as a view of its whole embedding, too, and either order of the keys."""
    table = rng.standard_normal((5, 41)).astype(DTYPES[kind])
    tensor = Tensor(torch, Storage(getattr(torch, kind), "0", 205, "cuda:3"), 3 * 41, (41,))
    token = int(rng.integers(2**31))
    value = dict([("mask_token_id", token), ("embedding", tensor)][::order])
    path = write(tmp_path / "a.pt", dump(torch, value), table.tobytes())
    found, row = read_mask_embedding(path)
    assert found == token and row.dtype == DTYPES[kind]
    np.testing.assert_array_equal(row, table[3])


def test_a_large_storage_is_read_in_pieces(tmp_path, torch, rng):
    """The row crosses the border of two pieces."""
    table = rng.standard_normal(300_000).astype(np.float32)
    start = (1 << 18) - 11
    tensor = Tensor(torch, Storage(torch.FloatStorage, "0", table.size), start, (43,))
    program = dump(torch, {"mask_token_id": 7, "embedding": tensor})
    _, row = read_mask_embedding(write(tmp_path / "a.pt", program, table.tobytes()))
    np.testing.assert_array_equal(row, table[start : start + 43])


class Evil:
    def __reduce__(self):
        return print, ("owned",)


class HiddenCall:
    """REDUCE on a known name, but not one of the two calls."""

    def __reduce__(self):
        return collections.OrderedDict, ([("a", 1)],)


def edits(torch):
    storage = Storage(torch.BFloat16Storage, "0", 37)
    far = Storage(torch.BFloat16Storage, "1", 37)
    double = Storage(torch.DoubleStorage, "0", 37)
    long = Storage(torch.BFloat16Storage, "0", 38)
    strange = Storage(torch.BFloat16Storage, "../0", 37)
    return {
        "print": ({"extra": Evil()}, "asks for '__builtin__ print'"),
        "extra": ({"extra": 1}, "keys .*'extra'"),
        "bool": ({"mask_token_id": True}, "mask_token_id that is no integer"),
        "text": ({"mask_token_id": "3"}, "mask_token_id that is no integer.*'3'"),
        "negative": ({"mask_token_id": -2}, "mask_token_id that is no integer"),
        "huge": ({"mask_token_id": 2**40}, "the pickle instruction LONG1"),
        "float": ({"mask_token_id": 1.5}, "the pickle instruction BINFLOAT"),
        "list": ({"embedding": [1, 2]}, "the pickle instruction EMPTY_LIST"),
        "number": ({"embedding": 5}, "embedding that is no tensor, but a int"),
        "bytes": ({"embedding": b"abc"}, "asks for '_codecs encode'"),
        "calls": ({"embedding": HiddenCall()}, "EMPTY_LIST"),
        "double": ({"embedding": Tensor(torch, double, 0, (37,))}, "torch DoubleStorage"),
        "beyond": ({"embedding": Tensor(torch, storage, 1, (37,))}, "contiguous axis inside"),
        "before": ({"embedding": Tensor(torch, storage, -1, (37,))}, "contiguous axis inside"),
        "strided": ({"embedding": Tensor(torch, storage, 0, (18,), (2,))}, "contiguous axis"),
        "matrix": ({"embedding": Tensor(torch, storage, 0, (1, 37), (37, 1))}, "contiguous axis"),
        "empty": ({"embedding": Tensor(torch, storage, 0, (0,))}, "contiguous axis"),
        "absent": ({"embedding": Tensor(torch, far, 0, (37,))}, "one storage, data/1"),
        "length": ({"embedding": Tensor(torch, long, 0, (37,))}, "74 bytes in data/0, not 38 bf"),
        "path": ({"embedding": Tensor(torch, strange, 0, (37,))}, "no storage of floats"),
    }


@pytest.mark.parametrize("name", edits(make_torch()))
def test_other_values_are_refused(tmp_path, torch, good, name, capsys):
    data, value = good
    change, match = edits(torch)[name]
    path = write(tmp_path / "a.pt", dump(torch, value | change), data)
    with pytest.raises(MimoError, match=match) as caught:
        read_mask_embedding(path)
    assert "a.pt" in str(caught.value) and "torch.save" in str(caught.value)
    assert "owned" not in capsys.readouterr().out


def test_a_missing_key_and_no_dictionary(tmp_path, torch, good):
    data, value = good
    for other in ({"mask_token_id": 3}, (1, 2), value["embedding"]):
        path = write(tmp_path / "a.pt", dump(torch, other), data)
        with pytest.raises(MimoError, match=r"a.pt has (keys|a )"):
            read_mask_embedding(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data.pkl": None}, "holds no data.pkl"),
        ({"data/0": None}, r"one storage, data/0, but has \[\]"),
        ({"data/1": b"abc"}, "one storage"),
        ({"data/0": b"a" * 72}, "72 bytes in data/0, not 37 bfloat16"),
        ({"byteorder": b"big"}, "little-endian"),
        ({"code/run.py": b"1"}, "holds 'mask_embedding/code/run.py'"),
        ({"data.pkl": b"\x80\x02}" + b"0" * (1 << 17)}, "data.pkl of 131075 bytes"),
        ({"compression": zipfile.ZIP_DEFLATED}, "data.pkl' compressed"),
    ],
)
def test_other_zips_are_refused(tmp_path, torch, good, change, match):
    data, value = good
    path = write(tmp_path / "a.pt", **({"program": dump(torch, value), "data": data} | change))
    with pytest.raises(MimoError, match=match):
        read_mask_embedding(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(tmp_path, torch, good):
    path = write(tmp_path / "a.pt", dump(torch, good[1]), good[0])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"")
    with pytest.raises(MimoError, match="holds 'data.pkl' twice"):
        read_mask_embedding(path)


def test_files_that_are_none(tmp_path, torch, good):
    with pytest.raises(MimoError, match="nowhere.pt is missing"):
        read_mask_embedding(tmp_path / "nowhere.pt")
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    (tmp_path / "a.pt").write_bytes(legacy)
    with pytest.raises(MimoError, match="torch before 1.6 wrote another format"):
        read_mask_embedding(tmp_path / "a.pt")
    later = dump(torch, good[1], protocol=4)
    with pytest.raises(MimoError, match="the pickle instruction FRAME"):
        read_mask_embedding(write(tmp_path / "a.pt", later, good[0]))


def test_values_that_would_be_endless_to_print(tmp_path, good):
    """Twice a tuple of twice a tuple of ...: 2^3000 elements, if an error wrote them out."""
    program = b"\x80\x02)q\x00" + b"h\x00\x86q\x00h\x00" * 3000 + b"Q."
    with pytest.raises(MimoError, match="no storage of floats"):
        read_mask_embedding(write(tmp_path / "a.pt", program, good[0]))


def test_one_flipped_byte_of_the_storage_is_seen(tmp_path, torch, good, rng):
    path = write(tmp_path / "a.pt", dump(torch, good[1]), good[0])
    content = bytearray(path.read_bytes())
    content[content.index(good[0]) + int(rng.integers(74))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    with pytest.raises(MimoError, match="a.pt is damaged"):
        read_mask_embedding(path)


@st.composite
def programs(draw):
    """A pickle like torch's with some instructions or bytes changed."""
    torch = make_torch()
    tensor = Tensor(torch, Storage(torch.FloatStorage, "0", 4), 0, (4,))
    program = bytearray(dump(torch, {"mask_token_id": 9, "embedding": tensor}))
    starts = [at for _, _, at in pickletools.genops(bytes(program))]
    codes = [op.code.encode("latin-1") for op in pickletools.opcodes]
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.sampled_from(starts))
        what = draw(st.integers(0, 3))
        if what == 0:
            program[at : at + 1] = draw(st.sampled_from(codes))
        elif what == 1:
            program[at:at] = draw(st.sampled_from(codes)) + draw(st.binary(max_size=6))
        elif what == 2:
            del program[at : at + draw(st.integers(1, 9))]
        else:
            program[at:at] = struct.pack("<cI", b"X", draw(st.integers(0, 2**32 - 1)))
    return bytes(program)


@given(program=programs())
def test_fuzzed_programs(tmp_path_factory, program):
    path = write(tmp_path_factory.mktemp("fuzz") / "a.pt", program, bytes(range(16)))
    try:
        token, row = read_mask_embedding(path)
    except MimoError:
        return
    # A change may leave a good file of the same kind.
    assert 0 <= token < 2**31 and row.dtype == np.float32 and len(row) <= 4


@given(at=st.integers(0, 2000), what=st.binary(max_size=4), skip=st.integers(0, 8))
def test_fuzzed_zips(tmp_path_factory, at, what, skip):
    torch = make_torch()
    tensor = Tensor(torch, Storage(torch.FloatStorage, "0", 4), 0, (4,))
    program = dump(torch, {"mask_token_id": 9, "embedding": tensor})
    path = write(tmp_path_factory.mktemp("fuzz") / "a.pt", program, bytes(range(16)))
    content = path.read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + what + content[at + skip :])
    try:
        token, row = read_mask_embedding(path)
    except MimoError:
        return
    assert token == 9 and row.tobytes() == bytes(range(16))


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_a_file_of_torch_itself(tmp_path, name):
    import torch

    table = torch.randn(6, 53).to(getattr(torch, name))
    for row in (table[4], table[4].clone()):
        torch.save({"mask_token_id": 151675, "embedding": row}, tmp_path / "a.pt")
        token, found = read_mask_embedding(tmp_path / "a.pt")
        assert token == 151675
        np.testing.assert_array_equal(found.astype(np.float32), row.float().numpy())
