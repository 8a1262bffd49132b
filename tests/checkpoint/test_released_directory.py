"""A release's directory as downloaded: the engine opens it, its own files are read and checked."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoint import write_tokenizer
from xiaomi_writer import MTP_LAYERS

import mimo_jax
from mimo_jax.checkpoint import released
from mimo_jax.errors import MimoError


def copy_of(files, release: str, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(files(release)[0], folder)
    return folder


def carried(engine) -> str:
    """What the program's loops carry from round to round, in XLA's words."""
    (program,) = engine._programs.values()
    return "\n".join(line for line in program.as_text().splitlines() if " while(" in line)


def answers(folder, look=lambda engine: None, **options) -> list[tuple[int, ...]]:
    """Greedy answers to three prompts; `look` sees the engine afterwards."""
    options = {"devices": 1, "max_len": 48, "drafter": False, "progress": False} | options
    with mimo_jax.load(folder, **options) as engine:
        outputs = [engine.generate(p, max_tokens=16, ignore_eos=True) for p in ("abc", "d", "gh")]
        look(engine)
    assert all(len(output.tokens) == 16 for output in outputs)
    return [tuple(output.tokens) for output in outputs]


def agree(a, b) -> bool:
    """Whether answers are the same: of one at least, as two programs may round a near tie apart."""
    return any(x == y for x, y in zip(a, b, strict=True))


def test_the_engine_opens_a_directory_as_downloaded(files, tmp_path, capsys):
    """Text in, text out; FP8 kept in memory answers as FP8 decoded at load."""
    folder = copy_of(files, "v2.6", tmp_path)
    write_tokenizer(folder / "tokenizer.json")
    loops = []
    decoded = answers(folder, lambda engine: loops.append(carried(engine)), progress=True)
    said = capsys.readouterr().err
    assert "3 tensors of other modalities are not read" in said and "MB on disk" in said
    kept = answers(folder, lambda engine: loops.append(carried(engine)), linear="fp8")
    assert agree(decoded, kept)
    # Decoded weights are not held beside the codes: decoding was not moved out of the loop.
    for dtype, carries in (("f32", [True, False]), ("f8e4m3fn", [False, True])):
        names = [f"{dtype}{shape}" for shape in ("[2,1088,288]", "[2176,288]")]
        assert [any(name in text for name in names) for text in loops] == carries


@pytest.mark.slow
def test_the_engines_other_ways_to_open_it(files, tmp_path):
    folder = copy_of(files, "v2.6", tmp_path)
    write_tokenizer(folder / "tokenizer.json")
    plain = answers(folder)
    assert agree(answers(folder, drafter=True), plain)
    assert agree(answers(folder, drafter="mtp"), plain)
    assert agree(answers(folder, experts="packed", linear="fp8"), plain)
    loops = []
    answers(folder, lambda engine: loops.append(carried(engine)), o_proj="fp8")
    answers(folder, lambda engine: loops.append(carried(engine)))
    # The output projections are the only FP8 that is left when all other is decoded.
    assert ["f8e4m3fn[" in text for text in loops] == [True, False]
    older = tmp_path / "older"
    shutil.copytree(files("v2-flash")[0], older)
    write_tokenizer(older / "tokenizer.json")
    with mimo_jax.load(older, devices=1, max_len=48, drafter=False, experts="mxfp4") as engine:
        assert engine.experts == "packed"
        assert len(engine.generate("abc", max_tokens=9, ignore_eos=True).tokens) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"linear": "fp8"}, "linear='fp8', but .* stores no FP8 weights"),
        ({"linear": "fp4"}, "linear='fp4' is not allowed"),
        ({"layout": "pipeline"}, "layout='pipeline' is not allowed"),
        ({"o_proj": "fp4"}, "o_proj='fp4' is not allowed"),
        ({"kernel": "all"}, "kernel='all' is not allowed"),
        ({"experts": "packed"}, "experts='packed', but .*'mxfp4'"),
        ({"experts": "fp8"}, "experts='fp8' is not allowed"),
    ],
)
def test_options_that_do_not_fit_the_checkpoint(options, words, files):
    with pytest.raises(MimoError, match=words):
        mimo_jax.load(files("bf16")[0], devices=1, progress=False, **options)


def test_a_released_checkpoint_without_a_tokenizer_is_refused(files):
    with pytest.raises(MimoError, match="tokenizer.json is missing"):
        mimo_jax.load(files("bf16")[0], devices=1, progress=False)


def test_what_a_user_is_told(files):
    notes = released.open_released(files("v2.6")[0]).notes
    assert notes == (
        "3 tensors of other modalities are not read: visual.*, audio_encoder.*, "
        "speech_embeddings.*.",
    )
    (note,) = released.open_released(files("v2.5-fp4")[0]).notes
    assert "dflash/config.json is not valid JSON: a comma" in note
    (note,) = released.open_released(files("fused-bf16")[0]).notes
    assert "read in 2 chunks [Q|K|V]" in note
    assert released.open_released(files("bf16")[0]).notes == ()


def test_the_files_tell_what_the_configuration_leaves_out(files):
    config = released.open_released(files("v2.5-fp4")[0]).config
    assert (config.num_nextn_predict_layers, config.moe_router_dtype) == (MTP_LAYERS, "float32")
    assert released.open_released(files("bf16")[0]).config.num_nextn_predict_layers == 0
    assert released.open_released(files("v2.6")[0]).config.moe_router_dtype == "bfloat16"


def test_the_drafters_own_files_are_checked(files, tmp_path):
    folder = copy_of(files, "v2.6", tmp_path)
    config = folder / "dflash" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("301", "300"))
    with pytest.raises(MimoError, match=r"of token 301, .* mask_token_id=300"):
        released.open_released(folder)
    config.write_text(text.replace("301", "301,,"))
    with pytest.raises(MimoError, match="not valid JSON"):
        released.open_released(folder)
    config.write_text(text.replace('"qwen3"', '"a, ]"').replace("2\n ],", "2,\n ],"))
    assert "a comma" in released.open_released(folder).notes[0]
    (folder / "dflash" / "mask_embedding.pt").unlink()
    with pytest.raises(MimoError, match="mask_embedding.pt is missing.*drafter=False"):
        released.open_released(folder)
    assert released.open_released(folder, drafter=False).drafter is None


def test_the_index_and_the_generation_config(files, tmp_path):
    folder = copy_of(files, "v2.6", tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"tp_size": 2', '"tp_size": 4'))
    with pytest.raises(MimoError, match="tp_size=4.*num_key_value_heads=2"):
        released.open_released(folder)
    index.write_text(index.read_text().replace('"tp_size": 4', '"tp_size": "2"'))
    assert released.open_released(folder).config.eos_token_ids == (5,)
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert released.open_released(folder).config.eos_token_ids == ()
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert released.open_released(folder).config.eos_token_ids == (7, 9)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 320]}')
    with pytest.raises(MimoError, match="eos_token_id=.7, 320.*vocabulary"):
        released.open_released(folder)


@pytest.mark.parametrize(
    ("name", "parameter", "value", "words"),
    [
        ("layers.0.self_attn.qkv_proj.weight", "layers.0.attention.qkv", 0x7F, "is NaN"),
        ("layers.0.mlp.down_proj.weight_scale_inv", "layers.0.ffn.down", 0xFF, "scale at"),
        (
            "layers.1.mlp.experts.10.up_proj.weight_scale",
            "layers.1.ffn.experts.gate_up",
            0xFF,
            "scale byte 255",
        ),
    ],
)
def test_damaged_codes_are_refused_by_name(name, parameter, value, words, files, tmp_path):
    folder = copy_of(files, "v2.6", tmp_path)
    stored = released.open_released(folder).files.tensors[f"model.{name}"]
    with stored.path.open("r+b") as file:
        file.seek(stored.offset)
        file.write(bytes([value]) * min(4, stored.nbytes))
    assembler = released.open_released(folder).assembler()
    weight = f"model.{name.removesuffix('_scale').removesuffix('_scale_inv')}"
    for read in (assembler.stored, lambda n: assembler.values(n, np.float32)):
        with pytest.raises(MimoError, match=words) as error:
            read(f"target.{parameter}")
        assert weight in str(error.value)


def test_what_is_not_stored_cannot_be_made(files):
    assembler = released.open_released(files("bf16")[0]).assembler()
    with pytest.raises(MimoError, match=r"embedding cannot be made as float8_e4m3fn"):
        assembler.make("target.embedding", ml_dtypes.float8_e4m3fn)
    with pytest.raises(MimoError, match=r"layers\.0\.attention\.qkv_scale cannot be made"):
        assembler.make("target.layers.0.attention.qkv_scale", np.float32)
