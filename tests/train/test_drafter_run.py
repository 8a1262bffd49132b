"""Drafters from start to end: devices, both kinds of answers, going on, the engine."""

import dataclasses
import shutil

import numpy as np
import pytest
from tiny_run import DRAFTER, assert_same_bits, changed, make_config, make_task, write_data

import mimo_jax
from mimo_jax.checkpoint import store
from mimo_jax.errors import MimoError
from mimo_jax.train import drafter as drafter_training
from mimo_jax.train.export import stored_target
from mimo_jax.train.metrics import read_metrics
from mimo_jax.train.steps import Steps
from mimo_jax.train.tasks import train

BOTH = {"answers": "both", "own_rows": 14, "own_length": 20, "own_batch": 4, "greedy": 0.5}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A target that has learnt to repeat, and its data: always the same, as in test_run.py."""
    folder = tmp_path_factory.mktemp("target")
    data = write_data(folder / "data", np.random.default_rng(7))
    config = make_config(data, folder / "run", run={"steps": 60, "save_every": 60})
    return train("target", config).checkpoint, data


def drafter_config(target, out, **sections):
    checkpoint, data = target
    data = {**data, "heldout": [data["files"][0].replace("train", "heldout")]}
    config = make_config(data, out, **sections)
    model = dataclasses.replace(config.model, shape={}, start=str(checkpoint))
    return dataclasses.replace(config, model=model)


@pytest.mark.slow
def test_a_drafter_learns_goes_on_and_decodes(target, tmp_path):
    section = {"steps": 60, "save_every": 20, "eval_every": 30}
    config = drafter_config(target, tmp_path / "whole", run=section, drafter=BOTH)
    result = train("drafter", config)
    records = [r["acceptance"] for r in read_metrics(tmp_path / "whole") if "acceptance" in r]
    assert np.mean(records[-5:]) > 1.5 > np.mean(records[:2])
    assert result.evaluation["heldout_acceptance"] > 1.5
    parts = changed(config, out=str(tmp_path / "parts"))
    train("drafter", changed(parts, stop_at=23))
    train("drafter", parts)
    task, _ = make_task(parts, "drafter")
    states = [Steps(c.run.out).restore(task.abstract)[0] for c in (config, parts)]
    assert_same_bits(*states)

    before, after = (store.open_checkpoint(p) for p in (target[0], result.checkpoint))
    mine, theirs = stored_target(after), stored_target(before)
    assert all(mine[name].tobytes() == value.tobytes() for name, value in theirs.items())
    prompt = np.load(target[1]["files"][0])[:11].tolist()
    with mimo_jax.load(result.checkpoint, devices=1, progress=False) as engine:
        answer = engine.generate(prompt, max_tokens=30, ignore_eos=True)
        plain = engine.generate(prompt, max_tokens=30, ignore_eos=True, speculative=False)
    assert answer.tokens == plain.tokens
    assert answer.stats.acceptance_length > 1.3


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention"], "add_swa_attention_sink_bias": False},
    ],
    ids=["windows", "mixed", "full"],
)
def test_8_devices_compute_what_one_does(changes, target, tmp_path, monkeypatch):
    monkeypatch.setattr(drafter_training, "_ANCHORS_AT_ONCE", 2)
    found = {}
    shape = DRAFTER | changes
    for devices in (1, 8):
        config = drafter_config(
            target,
            tmp_path / str(devices),
            run={"devices": devices},
            drafter=BOTH | {"shape": shape},
        )
        if devices > 1:
            # The same answers: those of other devices may differ where two tokens are close.
            shutil.copytree(tmp_path / "1/data", tmp_path / "data")
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
            shutil.copytree(tmp_path / "data", tmp_path / f"{devices}/data")
            shutil.copy(tmp_path / "1/recipe.toml", tmp_path / f"{devices}/recipe.toml")
        task, placing = make_task(config, "drafter")
        state = task.init()
        for number in range(2):  # A batch of the data, and one of its own answers.
            state, metrics = task.step(state, placing.batch(next(task.loader)), number)
            found[devices, number] = {name: float(value) for name, value in metrics.items()}
    assert 0.4 < np.load(tmp_path / "1/data/own-trained.npy").mean() < 0.9
    for number in range(2):
        for name in ("loss", "grad_norm", "acceptance"):
            assert np.isclose(found[1, number][name], found[8, number][name], rtol=1e-4), name


@pytest.mark.slow
def test_a_drafter_needs_a_target(target, tmp_path):
    config = drafter_config(target, tmp_path / "a")
    alone = dataclasses.replace(config, model=dataclasses.replace(config.model, start=""))
    with pytest.raises(MimoError, match="model.start is empty: name the target"):
        train("drafter", alone)
    missing = dataclasses.replace(config.model, start=str(tmp_path / "none"))
    with pytest.raises(MimoError, match="none is not a directory"):
        train("drafter", dataclasses.replace(config, model=missing))
    wide = dataclasses.replace(config.drafter, shape={"hidden_size": 48})
    with pytest.raises(MimoError, match="drafter hidden_size=48 is not allowed"):
        train("drafter", dataclasses.replace(config, drafter=wide))


@pytest.mark.slow
def test_answers_are_generated_by_as_many_devices_as_can_share_the_heads(target, tmp_path, capsys):
    config = drafter_config(target, tmp_path, run={"devices": 8}, drafter=BOTH)
    make_task(config, "drafter")
    words = capsys.readouterr().err
    assert "16 of the target's own answers" in words and "4 of 8 devices" in words
    ids = np.load(tmp_path / "data/own.npy").reshape(-1, 20)
    assert ids.shape == (16, 20) and len({tuple(row) for row in ids.tolist()}) > 4
