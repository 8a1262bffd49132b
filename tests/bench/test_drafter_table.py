"""`mimo bench drafter`: arms of a tiny drafter at equal budgets, from start to end."""

import json

import pytest

from mimo_jax import cli
from mimo_jax.bench import drafter
from mimo_jax.errors import MimoError
from mimo_jax.train.config import to_toml
from mimo_jax.train.tasks import train
from tests.train.tiny_run import make_config, write_data

OWN = {"answers": "both", "own_rows": 14, "own_length": 20, "own_batch": 7}


def test_nothing_to_read(tmp_path, capsys):
    with pytest.raises(MimoError, match="holds no result of an arm"):
        drafter.read_arms(tmp_path)
    assert cli.main(["bench", "drafter", str(tmp_path), "--target", "x"]) == 1
    assert "--target is given without --recipe or --prompts" in capsys.readouterr().err


@pytest.mark.parametrize("weighting", ["decay", "flat", "dpace"])
def test_an_arm_that_is_the_recipe_itself_is_left_out(weighting, tmp_path, rng):
    data = write_data(tmp_path / "data", rng)
    config = make_config(data, tmp_path / "x", drafter=OWN | {"weighting": weighting})
    arms = drafter.default_arms(config)
    assert arms[0] == "recipe" and "both" not in arms and {"data", "own"} <= set(arms)
    assert {"decay", "flat"} - set(arms) == {weighting} - {"dpace"}


@pytest.mark.slow
def test_two_arms_and_answers_that_are_made_once(tmp_path, rng, capsys):
    data = write_data(tmp_path / "data", rng)
    data["heldout"] = [str(tmp_path / "data/heldout.npy")]
    made = make_config(data, tmp_path / "target", run={"steps": 60, "save_every": 60})
    target = str(train("target", made).checkpoint)
    run = {"steps": 999, "eval_every": 0, "eval_rows": 8, "out": ""}
    config = make_config(data, "", run=run, drafter=OWN)
    (tmp_path / "recipe.toml").write_text(to_toml(config))
    (tmp_path / "prompts.jsonl").write_text('{"text": "abx = ba"}\n{"text": "cdba cd"}\n')
    runs = tmp_path / "runs"
    arguments = ["bench", "drafter", str(runs), "--recipe", str(tmp_path / "recipe.toml")]
    arguments += ["--target", target, "--prompts", str(tmp_path / "prompts.jsonl"), "--count", "2"]
    arguments += ["--max-tokens", "9", "--contexts", "6", "12", "--steps", "20"]
    assert cli.main([*arguments, "--arms", "recipe", "--json"]) == 0
    (first,) = json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]
    assert first["arm"] == "recipe" and first["steps"] == 20
    assert set(first["acceptance"]["by_context"]) == {"6", "12"}
    assert 1 <= first["acceptance"]["by_temperature"]["0"]["acceptance_length"] <= 4
    # The arm uses the probe's answers, and has made none.
    assert (runs / "probe/data/own.npy").exists() and not (runs / "recipe/data/own.npy").exists()
    stamp = (runs / "recipe.json").stat().st_mtime_ns
    late = [*arguments, "--arms", "recipe", "adamw", "--until", "1e-9"]
    assert cli.main(late) == 0 and "the time is up" in capsys.readouterr().err
    assert cli.main([*arguments, "--arms", "recipe", "adamw"]) == 0
    out = capsys.readouterr().out
    arms = json.loads(out.splitlines()[-1])["arms"]
    assert [arm["arm"] for arm in arms] == ["recipe", "adamw"]
    assert (runs / "recipe.json").stat().st_mtime_ns == stamp
    assert arms[1]["recipe"]["optimizer"]["name"] == "adamw"
    assert len({arm["tokens"] for arm in arms}) == 1 and "Tokens a round by context" in out
    assert 50 <= drafter.steps_for(
        drafter.configuration(tmp_path / "recipe.toml", [], target, runs / "probe"), 1.0
    )

    # Answers of other settings, or of another target, are not used.
    other = drafter.configuration(
        tmp_path / "recipe.toml",
        [f"drafter.own_from={runs / 'probe'}", "drafter.greedy=0.9", "run.steps=2"],
        target,
        tmp_path / "other",
    )
    with pytest.raises(MimoError, match="greedy: 0.33, now 0.9"):
        train("drafter", other)
    wrong = drafter.configuration(
        tmp_path / "recipe.toml",
        [f"drafter.own_from={runs / 'probe'}", "run.steps=2"],
        str(tmp_path / "target"),
        tmp_path / "wrong",
    )
    with pytest.raises(MimoError, match="has answers of the target"):
        train("drafter", wrong)
