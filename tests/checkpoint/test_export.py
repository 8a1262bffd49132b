"""Exported checkpoints hold what they were made from, and other programs read them."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors
from flax import nnx
from oracles import to_tree
from oracles.random_weights import example, random_checkpoint, random_drafter, random_drafter_config
from xiaomi_writer import Writer

import mimo_jax
from mimo_jax.checkpoint import released, store
from mimo_jax.checkpoint.convert import convert
from mimo_jax.checkpoint.export import export
from mimo_jax.checkpoint.export_config import target_fields
from mimo_jax.checkpoint.layout import LAYOUTS
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.errors import MimoError

NANO = pathlib.Path(__file__).resolve().parents[2] / "checkpoints" / "mimo-nano"
PROMPT = "def fibonacci(n):\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, module_rng):
    """A checkpoint of random MXFP4 weights, and its configuration and weights under their names."""
    config, *_ = example(int(module_rng.integers(2**32)))
    config |= {"hidden_size": 96, "moe_intermediate_size": 64, "expert_format": "mxfp4"}
    rng = np.random.RandomState(int(module_rng.integers(2**32)))
    weights = to_tree.round_experts(random_checkpoint(config, rng))
    draft_config = random_drafter_config(config, rng)
    draft = random_drafter(draft_config, rng)
    folder = tmp_path_factory.mktemp("export") / "ours"
    store.save(
        folder,
        ModelConfig.from_dict(config),
        nnx.state(to_tree.target(config, weights, packed=True)),
        DrafterConfig.from_dict(draft_config),
        nnx.state(to_tree.drafter(draft_config, draft)),
    )
    return folder, config, weights, draft


def read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """A file's tensors, by the library of the format."""
    dtypes = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    dtypes |= {"F32": np.float32, "U8": np.uint8}
    return {
        name: np.frombuffer(bytes(entry["data"]), dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(path.read_bytes())
    }


def read_all(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors that an index names."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = {file: read_file(directory / file) for file in set(index["weight_map"].values())}
    assert sum(map(len, files.values())) == len(index["weight_map"])
    return {name: files[file][name] for name, file in index["weight_map"].items()}


def test_for_transformers(saved, tmp_path):
    """Split, decoded, in Xiaomi's names: the very dictionary that the model was made from."""
    source, config, weights, _ = saved
    exported = export(source, tmp_path / "hf", "v2-flash", shard_bytes=200_000)
    assert exported.left_out == ("drafter",) and len(exported.files) > 3
    assert exported.nbytes == sum(array.nbytes for array in weights.values())
    assert max(path.stat().st_size for path in exported.files) < 250_000
    found = read_all(tmp_path / "hf")
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    read = released.open_released(tmp_path / "hf").config
    kept = store.open_checkpoint(source).config
    assert read.to_dict() == kept.to_dict() | {"expert_format": "dense"}


def test_as_released(saved, tmp_path):
    """Fused, packed, with the drafter: reading it again gives every parameter bit for bit."""
    source, _, _, draft = saved
    exported = export(source, tmp_path / "v26", "v2.6")
    assert exported.left_out == ()
    checkpoint = store.open_checkpoint(source)
    again = released.open_released(tmp_path / "v26")
    assert again.packed and again.drafter == checkpoint.drafter
    assert again.config == checkpoint.config
    arrays = store.read(checkpoint, list(checkpoint.manifest.arrays))
    assembler = again.assembler()
    assert assembler.table.keys() == arrays.keys()
    for name, array in arrays.items():
        stored = assembler.stored(name)
        assert stored.dtype == array.dtype and stored.tobytes() == array.tobytes(), name
    stored = read_file(tmp_path / "v26" / "dflash" / "dflash_draft_model.safetensors")
    assert stored.keys() == draft.keys() - {"mask_embedding"}


def test_there_and_back(tmp_path, rng):
    """A release, converted and exported again: every byte of every tensor that we read."""
    writer = Writer("v2.6", rng)
    draft = writer.write(tmp_path / "release")
    convert(tmp_path / "release", tmp_path / "ours", verify=False)
    export(tmp_path / "ours", tmp_path / "again", "v2.6")
    wanted = {n: a for n, a in writer.stored.items() if not n.startswith(released.SKIPPED)}
    found = read_all(tmp_path / "again")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name
    opened = released.open_released(tmp_path / "again")
    assert opened.config == released.open_released(tmp_path / "release").config
    np.testing.assert_array_equal(opened.mask.astype(np.float32), draft["mask_embedding"])


def test_a_kill_leaves_no_checkpoint(saved, tmp_path, monkeypatch):
    """The index comes last: what was cut short is not taken for a checkpoint."""
    monkeypatch.setattr("mimo_jax.checkpoint.export.write_small_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(saved[0], tmp_path / "cut")
    assert not released.is_released(tmp_path / "cut")
    with pytest.raises(MimoError, match="no manifest.json"):
        mimo_jax.load(tmp_path / "cut")


def test_what_cannot_be_exported(saved, tmp_path):
    source, *_ = saved
    with pytest.raises(MimoError, match=r"layout='v3' is not known: it must be one of v2-flash"):
        export(source, tmp_path / "out", "v3")
    with pytest.raises(MimoError, match="holds something already"):
        export(source, source)
    checkpoint = store.open_checkpoint(source)
    odd = checkpoint.config.to_dict() | {"add_full_attention_sink_bias": True}
    checkpoint = dataclasses.replace(checkpoint, config=ModelConfig.from_dict(odd))
    with pytest.raises(MimoError, match=r"add_full_attention_sink_bias=True: transformers"):
        target_fields(checkpoint, "v2-flash", LAYOUTS["split-bf16"])


def test_mimo_nano_as_released(tmp_path):
    """The shipped model, written in V2.6's form and opened as such."""
    export(NANO, tmp_path / "nano", "v2.6")
    checkpoint = store.open_checkpoint(NANO)
    assembler = released.open_released(tmp_path / "nano").assembler()
    for name, array in store.read(checkpoint, list(checkpoint.manifest.arrays)).items():
        assert assembler.stored(name).tobytes() == array.tobytes(), name


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_transformers_generates_the_same(tmp_path):
    """mimo-nano in transformers, from the exported directory alone: the same 64 tokens."""
    import torch
    import transformers

    export(NANO, tmp_path / "hf")
    options = {"dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    engine = mimo_jax.load(NANO, devices=1, progress=False)
    assert list(engine.tokenizer.encode(PROMPT)) == ids[0].tolist()
    ours = engine.generate(PROMPT, max_tokens=64, ignore_eos=True)
    assert list(ours.tokens) == out[0, ids.shape[1] :].tolist()
