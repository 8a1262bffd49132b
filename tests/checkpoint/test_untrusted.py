"""Fuzzed headers, indexes and configurations: a MimoError or a good result, in little memory."""

import json
import pathlib
import resource

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_jax.checkpoint.manifest import Manifest, _hash_body
from mimo_jax.checkpoint.safetensors import DTYPES, INDEX, TensorFiles
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.errors import MimoError
from mimo_jax.json_files import read_json
from mimo_jax.presets import drafter_preset, preset

EXAMPLES = 100
"""Of each kind."""

SECONDS = 60
"""For one example, on a machine with other work; none takes more than some milliseconds."""

fuzz = settings(
    max_examples=EXAMPLES, deadline=1000 * SECONDS, suppress_health_check=list(HealthCheck)
)

INTEGERS = st.integers(-3, 300) | st.sampled_from(
    [
        2**31 - 1,
        2**31,
        2**32,
        2**40,
        2**53,
        2**62,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        10**400,
        -(2**63),
    ]
)
NUMBERS = INTEGERS | st.floats() | st.sampled_from([1e308, -1e-320, 0.0, 0.5])
TEXTS = st.text(max_size=8) | st.sampled_from(
    [
        "F32",
        "F4",
        "U8",
        "../x",
        "a.safetensors",
        "\x00",
        "mxfp4",
        "default",
        "yarn",
        "silu",
        "n" * 3000,
    ]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
DEEP = st.integers(1, 3000).map(lambda n: "[" * n + "]" * n)


@pytest.fixture(autouse=True)
def little_memory():
    """No example may have asked for much: the peak of the process grows by less than 256 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    yield path
    keys = value if isinstance(value, dict) else range(len(value) if type(value) is list else 0)
    for key in keys:
        yield from places(value[key], (*path, key))


def put(value, path, new):
    """A copy of a JSON value with another one at that path; a removed one for `...`."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is ... and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


@st.composite
def changed(draw, value):
    """A JSON value with one to three of its parts replaced, removed or added; at times as text."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in places(value) if p] or [()]))
        value = put(value, path, ... if path and draw(st.integers(0, 5)) == 0 else draw(VALUES))
        if not isinstance(value, dict | list) or not value:
            break
    if isinstance(value, dict) and draw(st.integers(0, 5)) == 0:
        value = value | {draw(TEXTS): draw(VALUES)}
    return value


@st.composite
def damaged(draw, value) -> bytes:
    """JSON text of a changed value; at times with other bytes, repeated keys, or deep nesting."""
    text = json.dumps(draw(changed(value)))
    how = draw(st.integers(0, 7))
    at = draw(st.integers(0, len(text)))
    if how == 0:
        text = text[:at] + draw(DEEP) + text[at:]
    elif how == 1 and text.startswith("{"):
        text = text.replace("{", '{"dtype": "F32", "dtype": "U8", ', 1)
    data = text.encode("utf-8", "surrogatepass")
    if how == 2:
        data = data[:at] + draw(st.binary(max_size=5)) + data[at + draw(st.integers(0, 9)) :]
    return data


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F4", "shape": [3, 4], "data_offsets": [24, 30]},
    "c": {"dtype": "BF16", "shape": [0, 5], "data_offsets": [30, 30]},
    "d": {"dtype": "U8", "shape": [], "data_offsets": [30, 31]},
}


@fuzz
@given(header=damaged(HEADER), shift=st.sampled_from([0] * 8 + [-1, 1, 2**20, 2**40]))
def test_headers(folder, header, shift):
    content = max(len(header) + shift, 0).to_bytes(8, "little") + header + bytes(31)
    (folder / "a.safetensors").write_bytes(content)
    (folder / INDEX).unlink(missing_ok=True)
    try:
        files = TensorFiles.open(folder)
    except MimoError as error:
        assert "a.safetensors" in str(error) and len(str(error)) < 2000
        return
    total = 0
    for name, tensor in files.tensors.items():
        array = files.read(name)
        assert array.nbytes == tensor.nbytes and array.dtype == DTYPES[tensor.dtype]
        assert array.tobytes() == content[tensor.offset :][: tensor.nbytes]
        total += tensor.nbytes
    assert total == files.nbytes == len(content) - 8 - int.from_bytes(content[:8], "little")


WEIGHT_MAP = {name: "a.safetensors" for name in "abcd"}


@fuzz
@given(index=damaged({"metadata": {"tp_size": 4}, "weight_map": WEIGHT_MAP}))
def test_indexes(folder, index):
    header = json.dumps(HEADER).encode()
    (folder / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(31))
    (folder / INDEX).write_bytes(index)
    try:
        files = TensorFiles.open(folder)
    except MimoError as error:
        assert str(error).startswith(str(folder)) and len(str(error)) < 2000
    else:
        assert files.tensors.keys() == set("abcd")


RELEASED = json.loads(json.dumps(preset("mimo-v2.6-flash").to_dict())) | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
    "quantization_config": {"store_dtype": "mxfp4"},
    "eos_token_id": [3, 5],
    "hybrid_block_size": 6,
    "swa_num_attention_heads": 64,
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
}
DRAFTER = drafter_preset("mimo-v2.6-flash").to_dict()
DRAFTER = {k: DRAFTER[k] for k in DRAFTER if k != "target_layer_ids"} | {
    "dflash_config": {"target_layer_ids": [0, 11, 23, 35, 47]},
    "layer_types": ["sliding_attention"] * 5,
    "is_causal": False,
    "swa_window_size": 1024,
}
MANIFEST = {
    "format": 2,
    "arrays": {"target.a": {"shape": [2, 3], "dtype": "float32", "hash": "0" * 32}},
    "files": {"config.json": "0" * 32},
    "notes": {"by": "us"},
    "blobs": {"target.a/d/0": [24, "0" * 32]},
}
CONFIGS = {ModelConfig: RELEASED, DrafterConfig: DRAFTER}


def use(config) -> None:
    """Computes what depends on the configuration alone."""
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    shapes = config.attention
    if isinstance(config, ModelConfig):
        shapes = config.attention(config.num_hidden_layers - 1)
    assert 2 <= shapes.rotary_dim <= shapes.head_dim and shapes.num_heads % shapes.num_kv_heads == 0


@pytest.mark.parametrize("cls", CONFIGS)
def test_the_configurations_are_good_before_they_are_fuzzed(cls):
    use(cls.from_dict(CONFIGS[cls]))


@pytest.mark.parametrize("cls", CONFIGS)
def test_configurations(cls):
    @fuzz
    @given(fields=changed(CONFIGS[cls]).filter(lambda value: isinstance(value, dict)))
    def check(fields):
        try:
            config = cls.from_dict(fields)
        except MimoError as error:
            assert len(str(error)) < 5000
        else:
            use(config)

    check()


def test_one_field_after_the_other():
    """Every field with every kind of wrong value: random changes need not meet them all."""
    wrong = [None, True, -1, 0, 0.5, 2**31, 10**400, float("inf"), float("nan"), "x", [], {}]
    wrong += [[None], [[1]], [-1], ["a"], {"rope_type": []}, {"target_layer_ids": 3}, [0] * 5000]
    refused = 0
    for cls, good in CONFIGS.items():
        for name in good:
            for value in wrong:
                try:
                    use(cls.from_dict(good | {name: value}))
                except MimoError:
                    refused += 1
    assert refused > len(wrong) * 20


@fuzz
@given(body=changed({k: v for k, v in MANIFEST.items() if k != "hash"}))
def test_manifests_with_a_hash_that_fits(folder, body):
    """As a forger would write them."""
    text = json.dumps(body | {"hash": _hash_body(body)}) if isinstance(body, dict) else "[]"
    (folder / "manifest.json").write_text(text)
    try:
        manifest = Manifest.read(folder)
        for check in (manifest.check_files, manifest.check_blobs):
            check(folder)
    except MimoError:
        return
    assert not manifest.files and not manifest.blobs


def test_manifests_do_not_lead_out_of_their_directory(folder):
    for key, entry in (("files", "0" * 32), ("blobs", [3, ""])):
        for name in ("../x", "/etc/hosts", "a/../../x", "a\x00"):
            body = MANIFEST | {key: {name: entry}}
            body.pop("hash", None)
            (folder / "manifest.json").write_text(json.dumps(body | {"hash": _hash_body(body)}))
            with pytest.raises(MimoError, match="is no file of this directory"):
                Manifest.read(folder)


def test_names_that_are_too_long(folder):
    body = MANIFEST | {"files": {"n" * 3000: "0" * 32}}
    (folder / "manifest.json").write_text(json.dumps(body | {"hash": _hash_body(body)}))
    with pytest.raises(MimoError, match="nnn is missing"):
        Manifest.read(folder).check_files(folder)


@fuzz
@given(data=damaged(RELEASED) | st.binary(max_size=40))
def test_json_files(folder, data):
    path = pathlib.Path(folder / "config.json")
    path.write_bytes(data)
    try:
        fields = read_json(path)
        ModelConfig.from_dict(fields)
    except MimoError:
        pass


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_hidden_layers", 10**12, "num_hidden_layers=1000000000000 .* from 1 to 4096"),
        ("num_hidden_layers", "48", "num_hidden_layers='48' is not allowed: .* an integer"),
        ("hidden_size", 4096.0, "hidden_size=4096.0 is not allowed: .* an integer"),
        ("rope_theta", 1e999, "rope_theta=inf is not allowed: .* a finite number above 0"),
        ("rope_theta", True, "rope_theta=True"),
        ("partial_rotary_factor", 2.0, "partial_rotary_factor=2.0 .* above 0, at most 1"),
        ("norm_topk_prob", 1, "norm_topk_prob=1 .* true or false"),
        ("hybrid_layer_pattern", "0101", "hybrid_layer_pattern='0101' .* a list of"),
        ("moe_layer_freq", 0, "moe_layer_freq=0 is not allowed: .* integer from 1 .* or a list of"),
        ("quantization_config", [], r"quantization_config=\[\] .* an object"),
        ("eos_token_id", "x", "eos_token_id='x'"),
    ],
)
def test_wrong_types_are_named(name, value, words):
    with pytest.raises(MimoError, match=words):
        ModelConfig.from_dict(RELEASED | {name: value})
