"""The look at a directory: whole, damaged, half downloaded, or nothing at all."""

import dataclasses
import json
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
from tiny_checkpoint import checkpoint  # noqa: F401

import mimo_jax
from mimo_jax import cli
from mimo_jax.checkpoint.layout import BYTES, LAYOUTS, MASK_EMBEDDING
from mimo_jax.checkpoint.xiaomi import declare
from mimo_jax.errors import MimoError
from mimo_jax.planning.inspection import inspect
from mimo_jax.presets import preset

INDEX = "model.safetensors.index.json"
FILES = 3
CONFIG = dataclasses.replace(
    preset("mimo-nano"),
    num_hidden_layers=3,
    hybrid_layer_pattern=(0, 1, 0),
    moe_layer_freq=(0, 1, 1),
    n_routed_experts=5,
    num_nextn_predict_layers=2,
)
ENCODER = {"visual.blocks.0.attn.qkv.weight": (64, 3), "audio_encoder.norm.weight": (17,)}


def write(folder: pathlib.Path, layout: str, numbers=range(FILES)) -> dict:
    """Writes headers of a layout, and holes where the bytes would be, into some of its files."""
    declared = declare(CONFIG, None, layout)
    tensors = {name: (t.dtype, t.shape) for name, t in declared.items()}
    tensors |= {name: ("BF16", shape) for name, shape in ENCODER.items()}
    files: list[dict] = [{} for _ in range(FILES)]
    for number, name in enumerate(sorted(tensors)):
        files[number % FILES][name] = tensors[name]
    folder.mkdir()
    for number in numbers:
        header, end = {}, 0
        for name, (dtype, shape) in files[number].items():
            size = BYTES[dtype]
            for length in shape:
                size *= length
            offsets = [end, end + size]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
            end += size
        text = json.dumps(header).encode()
        with (folder / f"part{number}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    where = {name: f"part{n}.safetensors" for n, names in enumerate(files) for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    fields = CONFIG.to_dict() | {"num_nextn_predict_layers": None}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}"}))
    return declared


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_released_checkpoint(layout, tmp_path):
    declared = write(tmp_path / "model", layout)
    found = inspect(tmp_path / "model")
    assert found.complete and found.kind == "released", (found.missing, found.problems)
    assert found.tensors == len(declared) + len(ENCODER)
    size = sum(tensor.nbytes for tensor in declared.values()) + 2 * (64 * 3 + 17)
    assert found.nbytes == size == sum(found.dtypes.values()) == sum(found.groups.values())
    assert found.counts["skipped: other modalities"] == 2
    assert (found.mtp_layers, found.drafter) == (2, None)
    assert found.groups["MTP layers"] > 0 and "unknown" not in found.groups
    words = {"v2.6": "experts MXFP4, attention inputs and dense MLPs FP8", "split-bf16": "none"}
    assert found.quantisation == words.get(layout, found.quantisation)
    assert found.layout == ("fused qkv" if LAYOUTS[layout].fused else "split q, k, v")
    assert "chat_template in tokenizer_config.json" in found.files


@pytest.mark.parametrize("numbers", [(), (0,), (1, 2)])
@pytest.mark.parametrize("layout", ["v2.6", "v2-flash"])
def test_a_half_downloaded_checkpoint(layout, numbers, tmp_path):
    declared = write(tmp_path / "model", layout, numbers)
    found = inspect(tmp_path / "model")
    away = FILES - len(numbers)
    assert not found.complete and found.kind == "released"
    assert not found.problems, "what is not there is no damage"
    [files] = found.missing
    lost = len(declared) + len(ENCODER) - found.tensors
    assert files.startswith(f"{away} files, with {lost} tensors: part")
    if numbers:
        assert found.mtp_layers == 2 and found.quantisation != "none"
        assert "unknown" not in found.groups


def test_damage_is_named(tmp_path):
    folder = tmp_path / "model"
    declared = write(folder, "v2.6")
    index = json.loads((folder / INDEX).read_text())
    name = next(n for n in declared if n.endswith("layers.1.input_layernorm.weight"))
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    path = folder / "part1.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    (folder / "tokenizer.json").unlink()
    (folder / "dflash").mkdir()
    (folder / "dflash" / "config.json").write_text("{,}")
    found = inspect(folder)
    assert not found.complete
    missing, problems = "\n".join(found.missing), "\n".join(found.problems)
    for words in ("tokenizer.json", MASK_EMBEDDING, "dflash/ has no .safetensors"):
        assert words in missing
    for words in ("part1.safetensors", "dflash/config.json"):
        assert words in problems
    text = str(found)
    assert "not complete" in text and "PROBLEM" in text


def test_surplus_and_wrong_tensors_are_named(tmp_path):
    folder = tmp_path / "model"
    write(folder, "split-bf16")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"num_hidden_layers": 2, "intermediate_size": 96}
    fields |= {name: fields[name][:2] for name in ("hybrid_layer_pattern", "moe_layer_freq")}
    (folder / "config.json").write_text(json.dumps(fields))
    found = inspect(folder)
    surplus, wrong = found.problems
    assert "belong to nothing: model.layers.2." in surplus
    assert "another dtype or shape" in wrong and "mlp.down_proj" in wrong
    assert found.counts["unknown"] > 10


def test_our_own(checkpoint, tmp_path):  # noqa: F811
    found = inspect(checkpoint)
    assert found.complete and found.kind == "mimo_jax" and found.drafter is not None
    assert found.quantisation == "experts MXFP4"
    with mimo_jax.load(checkpoint, devices=1, experts="packed", progress=False) as engine:
        experts = engine._plan.params[0]["layers"][1]["ffn"]["experts"]
        held = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(experts))
    assert found.groups["experts"] == 2 * held
    shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "params")
    (tmp_path / "copy" / "drafter.json").unlink()
    found = inspect(tmp_path / "copy")
    assert sorted(found.missing) == ["the file drafter.json", "the folder params"]
    (tmp_path / "copy" / "manifest.json").write_text("[]")
    (tmp_path / "copy" / "params").mkdir()
    assert "manifest.json" in "\n".join(inspect(tmp_path / "copy").problems)


def test_no_checkpoint_at_all(tmp_path):
    found = inspect(tmp_path)
    assert found.kind == "no checkpoint" and not found.complete
    with pytest.raises(MimoError, match="is not a directory"):
        inspect(tmp_path / "nowhere")


def test_an_index_that_leads_out_of_the_directory_is_not_followed(tmp_path):
    write(tmp_path / "model", "v2.6")
    names = {"a.weight": "../model/part0.safetensors", "b.weight": "/etc/passwd"}
    other = tmp_path / "other"
    other.mkdir()
    (other / INDEX).write_text(json.dumps({"weight_map": names}))
    found = inspect(other)
    assert found.tensors == 0 and "2 files, with 2 tensors" in "\n".join(found.missing)


def test_the_command_needs_no_jax(tmp_path, capsys):
    write(tmp_path / "model", "v2.6")
    code = (
        "import sys; from mimo_jax import cli; "
        "code = cli.main(sys.argv[1:]); "
        "assert not {'jax', 'flax'} & set(sys.modules), 'JAX was imported'; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "inspect", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "fused qkv" in done.stdout and done.stdout.endswith("  complete\n")
    (tmp_path / "half").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "half")
    assert cli.main(["inspect", str(tmp_path / "half")]) == 1
    assert capsys.readouterr().out.endswith("  not complete\n")
    assert cli.main(["inspect", str(tmp_path / "model"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["complete"] and figures["config"]["num_hidden_layers"] == 3
