"""Loading: what does not fit is explained, compiled programs are kept, a closed engine says so."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_checkpoint import CONFIG, checkpoint, write_tokenizer  # noqa: F401

import mimo_jax
from mimo_jax import loading, sharding
from mimo_jax.checkpoint import store
from mimo_jax.compilation import use_compilation_cache
from mimo_jax.errors import MimoError


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"devices": 3}, r"devices=3 cannot divide .* numbers that can: \[1, 2, 4, 8\]"),
        ({"devices": 9}, "devices=9, but"),
        ({"devices": 0}, "devices=0"),
        ({"devices": 8}, "numbers that can"),
        ({"experts": "fast"}, "experts='fast' .* 'packed', 'dequantized', 'mxfp4'"),
        ({"layout": "data"}, "layout='data'"),
        ({"dtype": "float16"}, "dtype='float16' .* float32 or bfloat16"),
        ({"max_len": 1}, "max_len=1 .* 2 to 176, the model's context"),
        ({"max_len": 177}, "max_len=177"),
        ({"devices": 1, "mesh": mimo_jax.make_mesh(1)}, "mesh and devices are both given"),
    ],
)
def test_loading_that_is_not_allowed(checkpoint, options, match):  # noqa: F811
    with pytest.raises(MimoError, match=match):
        mimo_jax.load(checkpoint, progress=False, **options)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: sharding.make_mesh("8"), "devices='8' is not allowed: it must be 1 to 8, or"),
        (lambda: sharding.make_mesh([]), r"devices=\[\]"),
        (lambda: sharding.make_mesh(True), "devices=True"),
        (lambda: sharding.make_mesh(-1), "devices=-1 is not allowed"),
        (lambda: loading._mesh(3, None), "mesh=3 is not allowed"),
        (lambda: loading._mesh(jax.make_mesh((2,), ("x",)), None), "of one axis, 'model'"),
        (lambda: loading._open(None, True), "path=None is not allowed"),
    ],
)
def test_arguments_of_other_types(call, match):
    with pytest.raises(MimoError, match=match):
        call()


@pytest.mark.parametrize("max_len", [64.0, "64", True, np.float32(64)])
def test_what_is_no_length(max_len):
    """Past the type checks that only tests have."""
    with pytest.raises(MimoError, match=f"max_len={re.escape(repr(max_len))} is not allowed"):
        loading._max_len(max_len, CONFIG)


def test_a_tokenizer_of_another_model(checkpoint, tmp_path):  # noqa: F811
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    write_tokenizer(copy / "tokenizer.json", 320)
    manifest = store.Manifest.read(copy)
    data = store.hash_bytes((copy / "tokenizer.json").read_bytes())
    files = manifest.files | {"tokenizer.json": data}
    dataclasses.replace(manifest, files=files).write(copy)
    with pytest.raises(MimoError, match="has 320 tokens, the model 312"):
        mimo_jax.load(copy, devices=1)


def test_the_compilation_cache(tmp_path, monkeypatch, caplog):
    """A folder of ours unless the user has chosen one; without a writable place, a warning."""
    chosen = jax.config.jax_compilation_cache_dir
    try:
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == chosen
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
        assert "Compiled programs are not kept" in caplog.text
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        use_compilation_cache()
        folder = tmp_path / "cache" / "mimo_jax" / "xla"
        assert jax.config.jax_compilation_cache_dir == str(folder) and folder.is_dir()
    finally:
        jax.config.update("jax_compilation_cache_dir", chosen)
        compilation_cache.reset_cache()


def test_a_closed_engine(checkpoint):  # noqa: F811
    engine = mimo_jax.load(checkpoint, devices=1, progress=False)
    session = engine.session()
    engine.close()
    engine.close()
    for use in (lambda: engine.generate("a"), engine.session, engine.summary):
        with pytest.raises(MimoError, match="engine was closed"):
            use()
    with pytest.raises(MimoError, match="engine was closed"):
        session.send("a")


def test_public_names_are_there():
    for name in mimo_jax.__all__:
        assert getattr(mimo_jax, name) is not None and name in dir(mimo_jax)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = mimo_jax.lode


def test_a_runs_folder_and_half_a_download(checkpoint, tmp_path):  # noqa: F811
    shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint")
    with mimo_jax.load(tmp_path / "run", devices=1, progress=False) as engine:
        assert engine.generate("abx", max_tokens=3).tokens
    (tmp_path / "half").mkdir()
    shutil.copy(checkpoint / "config.json", tmp_path / "half")
    with pytest.raises(MimoError, match=r"no .safetensors files: `mimo inspect .*half` says"):
        mimo_jax.load(tmp_path / "half")
