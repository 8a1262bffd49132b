"""Settings: read, overridden, refused by name, written and read back."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from mimo_jax.errors import MimoError
from mimo_jax.train import config as settings
from mimo_jax.train.config import TrainConfig, from_dict, load_config, to_dict, to_toml

RECIPES = sorted((Path(__file__).resolve().parents[2] / "checkpoints").glob("*.toml"))


def test_a_recipe_and_overrides(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[optimizer]\nlr = 1\nname = "adamw"\n[data]\nfiles = "one.txt"\n'
        "[model.shape]\nhidden_size = 8\n"
    )
    config = load_config(
        path, ["optimizer.lr=3e-4", "run.out=runs/mine", "run.remat=true", "data.heldout=['a','b']"]
    )
    assert config.optimizer == dataclasses.replace(TrainConfig().optimizer, lr=3e-4, name="adamw")
    assert (config.run.out, config.run.remat) == ("runs/mine", True)
    assert (config.data.files, config.data.heldout) == (("one.txt",), ("a", "b"))
    assert load_config(path).optimizer.lr == 1.0
    deeper = load_config(path, ["model.shape.head_dim=4", "drafter.shape={block_size = 3}"])
    assert deeper.model.shape == {"hidden_size": 8, "head_dim": 4}
    assert deeper.drafter.shape == {"block_size": 3}
    assert load_config() == TrainConfig()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=1", r"field optimizer.lrr is not known; did you mean lr\?"),
        ("optimiser.lr=1", r"section \[optimiser\] is not known; did you mean optimizer\?"),
        ("run.steps=0", "run.steps=0 is not allowed: it must be 1 or more"),
        ("run.steps=1.5", "run.steps=1.5 is not allowed: it must be a whole number"),
        ("run.steps=true", "run.steps=True is not allowed: it must be a whole number"),
        ("run.remat=1", "run.remat=1 is not allowed: it must be true or false"),
        ("run.out=3", "run.out=3 is not allowed: it must be text"),
        ("optimizer.lr=fast", "optimizer.lr='fast' is not allowed: it must be a number"),
        ("optimizer.lr=nan", "optimizer.lr=nan is not allowed: it must be 0.0 or more"),
        ("optimizer.beta1=1.5", "optimizer.beta1=1.5 is not allowed: it must be 0.0 to 1.0"),
        ("optimizer.name=sgd", r"must be one of \('muon', 'adamw'\)"),
        ("data.files=7", "data.files=7 is not allowed: it must be a list of texts"),
        ("data.files=[1]", "data.files=1 is not allowed: it must be text"),
        ("model.shape=3", "model.shape=3 is not allowed: it must be a table"),
        ("run=3", "write section.field=value"),
        ("run.steps", "write section.field=value"),
        ("run.steps.more=1", "run.steps=.* is not allowed: it must be a whole number"),
    ],
)
def test_what_is_refused(override, words):
    with pytest.raises(MimoError, match=words):
        load_config(None, [override])


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(MimoError, match="does not exist: give a recipe"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(MimoError, match="is not a TOML file"):
        load_config(tmp_path / "bad.toml")
    with pytest.raises(MimoError, match="is not a TOML file"):
        load_config(tmp_path)
    with pytest.raises(MimoError, match=r"run=3 is not allowed: \[run\] is a section"):
        from_dict({"run": 3})


def test_all_settings_round_trip(rng):
    """Every field, with another value than its default, through TOML."""
    values = {}
    for section in dataclasses.fields(TrainConfig):
        fields = values[section.name] = {}
        for field in dataclasses.fields(section.default):
            default, kind = getattr(section.default, field.name), field.type
            if field.metadata["choices"]:
                fields[field.name] = str(rng.choice(field.metadata["choices"]))
            elif kind is bool:
                fields[field.name] = not default
            elif kind is int:
                fields[field.name] = default + int(rng.integers(1, 9))
            elif kind is float:
                fields[field.name] = default / 2 + 0.01
            elif kind is str:
                fields[field.name] = 'a "b" \\ \u00fc'
            else:
                fields[field.name] = (
                    {"a": 1, "b": [True, 2.5]}
                    if not default and kind not in (tuple[str, ...],)
                    else ["x", "y"]
                )
    config = from_dict(values)
    assert from_dict(tomllib.loads(to_toml(config))) == config
    assert to_dict(config) == values
    assert settings.differences(config, config) == []


def test_what_a_run_may_go_on_with():
    old = load_config(None, ["run.steps=5"])
    new = load_config(None, ["run.steps=6", "run.log_every=3", "optimizer.lr=1.0"])
    assert settings.differences(old, new) == [
        "optimizer.lr: 0.003, now 1.0",
        "run.steps: 5, now 6",
    ]
    names = {f"{s}.{f}" for s, fields in to_dict(old).items() for f in fields}
    assert settings.MAY_CHANGE <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_here(path):
    assert load_config(path) != TrainConfig()
