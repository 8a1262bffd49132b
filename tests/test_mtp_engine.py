"""Checkpoints with MTP layers: stored exactly, chosen by name, and answers as without drafts."""

import argparse
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoint import CONFIG, DRAFTER, random_params, write_tokenizer

import mimo_jax
from mimo_jax import loading
from mimo_jax.checkpoint import store
from mimo_jax.checkpoint.flat import flatten
from mimo_jax.commands.model import add_model_arguments, load_model
from mimo_jax.decode.program import make_plan
from mimo_jax.drafter_config import MTPConfig
from mimo_jax.errors import MimoError
from mimo_jax.model.mtp import MTP
from mimo_jax.sharding import make_mesh
from mimo_jax.train.export import save_with_drafter, stored_part

MTP_CONFIG = MTPConfig(CONFIG, 3, hidden_normed=True)
BLOCK = 4


@jax.jit
def make_layers(key):
    return nnx.state(MTP(MTP_CONFIG, nnx.Rngs(key), dtype=jnp.float32))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with a DFlash drafter and MTP layers, and the arrays of the latter."""
    folder = tmp_path_factory.mktemp("mtp")
    tokenizer = write_tokenizer(folder / "source-tokenizer.json")
    target, drafter = random_params(tokenizer, 0)
    layers = make_layers(jax.random.key(5))
    store.save(
        folder / "model",
        CONFIG,
        target,
        DRAFTER,
        drafter,
        mtp_config=MTP_CONFIG,
        mtp_params=layers,
        tokenizer=folder / "source-tokenizer.json",
    )
    store.save(
        folder / "without",
        CONFIG,
        target,
        mtp_config=MTP_CONFIG,
        mtp_params=layers,
        tokenizer=folder / "source-tokenizer.json",
    )
    return folder / "model", folder / "without", flatten(layers)


def test_a_new_drafter_leaves_the_rest_of_the_checkpoint(saved, tmp_path):
    """Trained for a target with MTP layers and a template: both are in what is written."""
    before = store.open_checkpoint(saved[1])
    source = dataclasses.replace(
        before, directory=pathlib.Path(shutil.copytree(saved[1], tmp_path / "source"))
    )
    (source.directory / "generation_config.json").write_text('{"temperature": 0.6}')
    _, params = random_params(write_tokenizer(tmp_path / "tokenizer.json"), 1)
    options = (DRAFTER, params, jnp.float32, before.tokenizer, {})
    after = store.open_checkpoint(save_with_drafter(tmp_path / "new", source, *options))
    assert after.drafter == DRAFTER and after.mtp == before.mtp == MTP_CONFIG
    for part in ("target", "mtp"):
        found, right = (stored_part(opened, part) for opened in (after, before))
        jax.tree.map(np.testing.assert_array_equal, found, right)
    assert "generation_config.json" in after.manifest.files


@pytest.mark.parametrize("devices", [1, 8])
def test_the_layers_come_back(saved, devices):
    """On eight devices each of the four key/value heads is there twice."""
    opened = store.open_checkpoint(saved[0])
    assert (opened.mtp, opened.drafter) == (MTP_CONFIG, DRAFTER)
    # Experts packed in blocks of 32 cannot be cut in eight.
    plan = make_plan(CONFIG, opened.mtp, make_mesh(devices), packed=False, dtype=jnp.float32)
    assert plan.parts == ("target", "mtp")
    arrays = flatten(store.load(opened, plan.params, plan.param_shardings, parts=plan.parts)[1])
    assert arrays.keys() == saved[2].keys() and len(arrays) == 3 * 11
    for name, array in arrays.items():
        expected = saved[2][name]
        if name.endswith("qkv") and devices == 8:
            keys = expected[:, -(CONFIG.swa_head_dim + CONFIG.swa_v_head_dim) :]
            queries = expected[:, : -keys.shape[1]].reshape(8, -1, CONFIG.hidden_size)
            expected = np.concatenate([queries, np.repeat(keys, 2, axis=0)], axis=1)
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_mtp_changes_no_token(saved, rng):
    """Whole, in pieces, and in turns; fewer drafts; and drafts are kept at times."""
    kept = 0
    with mimo_jax.load(saved[0], devices=1, drafter="mtp", progress=False) as engine:
        assert (engine.block, engine.drafter) == (BLOCK, MTP_CONFIG)
        assert "mtp, 3 layers, block 4" in engine.summary()
        for number in range(200):
            if kept >= 3 and number >= 2:
                break
            prompt = [int(t) for t in rng.integers(1, CONFIG.vocab_size, rng.integers(1, 40))]
            options = {"max_tokens": int(rng.integers(1, 60)), "seed": int(rng.integers(2**32))}
            options["temperature"] = float(rng.choice([0.0, 0.7]))
            plain = engine.generate(prompt, speculative=False, **options)
            drafted = engine.generate(prompt, **options)
            again = engine.generate(prompt, **options)
            assert drafted.tokens == plain.tokens and drafted.text == plain.text
            # What an earlier answer left behind is not seen: the rounds are the same too.
            assert (again.tokens, again.rounds) == (drafted.tokens, drafted.rounds)
            assert engine.generate(prompt, max_draft=1, **options).tokens == plain.tokens
            pieces = list(engine.stream(prompt, every=5, **options))
            assert sum((piece.tokens for piece in pieces), ()) == plain.tokens
            histogram = drafted.stats.acceptance_histogram
            assert pieces[-1].stats.acceptance_histogram == histogram
            assert len(histogram) == BLOCK + 1
            kept += sum(histogram[2:])
            session = engine.session()
            cut = int(rng.integers(len(prompt)))
            if cut:
                session.send(prompt[:cut], max_tokens=7)
                whole = [*session.tokens, *prompt[cut:]]
                answer = session.send(prompt[cut:], **options)
                assert answer.tokens == engine.generate(whole, **options).tokens
            session.close()
    assert kept >= 3


def test_true_takes_dflash_first_and_names_take_what_they_say(saved):
    both, alone = (store.open_checkpoint(path) for path in saved[:2])
    for opened, wanted, expected in (
        (both, True, DRAFTER),
        (both, "dflash", DRAFTER),
        (both, "mtp", MTP_CONFIG),
        (both, False, None),
        (alone, True, MTP_CONFIG),
    ):
        assert loading._drafter(wanted, opened) == expected
    for path, wanted, words in (
        (saved[1], "dflash", "'dflash' is not allowed: .* has 'mtp'"),
        (saved[0], "eagle", "'eagle' is not allowed: .* has 'dflash' and 'mtp'"),
    ):
        with pytest.raises(MimoError, match=words):
            mimo_jax.load(path, devices=1, drafter=wanted, progress=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], True), (["--drafter", "mtp"], "mtp"), (["--drafter", "none"], False)],
)
def test_the_command_names_a_drafter(saved, arguments, expected, monkeypatch):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    monkeypatch.setattr(mimo_jax, "load", lambda path, drafter, **_: drafter)
    assert load_model(parser.parse_args(["--model", str(saved[0]), *arguments])) == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 2, "hidden_normed": True}, "mtp.json was changed"),
        (None, "mtp.json is missing"),
    ],
)
def test_a_changed_configuration_is_refused(saved, tmp_path, fields, words):
    copy = pathlib.Path(shutil.copytree(saved[1], tmp_path / "copy"))
    if fields is None:
        (copy / "mtp.json").unlink()
    else:
        (copy / "mtp.json").write_text(json.dumps(fields))
    with pytest.raises(MimoError, match=words):
        store.open_checkpoint(copy)


def test_saving_takes_both_or_neither(saved, tmp_path):
    target = random_params(write_tokenizer(tmp_path / "t.json"), 0)[0]
    with pytest.raises(MimoError, match="mtp_config and mtp_params"):
        store.save(tmp_path / "x", CONFIG, target, mtp_config=MTP_CONFIG)
    # Two layers' arrays where three are said to be.
    fewer = {"layers": {"0": {}, "1": {}}}
    with pytest.raises(MimoError, match="missing .*mtp.layers.0"):
        store.save(tmp_path / "x", CONFIG, target, mtp_config=MTP_CONFIG, mtp_params=fewer)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 3}, "has the fields hidden_normed, num_hidden_layers"),
        ({"num_hidden_layers": 3, "hidden_normed": False, "x": 1}, "has hidden_normed, num_h.*, x"),
        ({"num_hidden_layers": 0, "hidden_normed": False}, "num_hidden_layers=0"),
        ({"num_hidden_layers": True, "hidden_normed": False}, "num_hidden_layers=True"),
        ({"num_hidden_layers": 3, "hidden_normed": "no"}, "hidden_normed='no'"),
        ({"num_hidden_layers": 7, "hidden_normed": False}, "at most 6, half the target's window"),
    ],
)
def test_configurations_that_are_not_allowed(fields, words):
    with pytest.raises(MimoError, match=words):
        MTPConfig.from_dict(fields, CONFIG)


def test_layers_of_another_target_are_refused():
    for field, value in (("hidden_size", 100), ("sliding_window", 14), ("layernorm_epsilon", 1e-6)):
        other = MTPConfig(dataclasses.replace(CONFIG, **{field: value}))
        with pytest.raises(MimoError, match="the MTP layers'"):
            make_plan(CONFIG, other, make_mesh(1), dtype=jnp.float32)


def test_fp8_is_where_the_target_has_it():
    layers = make_plan(CONFIG, MTP_CONFIG, make_mesh(1), fp8=True, dtype=jnp.float32).params[1]
    dtypes = {
        ".".join(map(str, path[2:])): parameter.dtype.name
        for path, parameter in nnx.to_flat_state(layers)
        if path[1] == 2
    }
    codes = {name for name, dtype in dtypes.items() if dtype == "float8_e4m3fn"}
    assert codes == {"attention.qkv", "ffn.gate_up", "ffn.down"}
    assert {f"{name}_scale" for name in codes} < dtypes.keys()
    drafter = make_plan(CONFIG, DRAFTER, make_mesh(1), fp8=True, dtype=jnp.float32).params[1]
    assert all(p.dtype == jnp.float32 for _, p in nnx.to_flat_state(drafter))
