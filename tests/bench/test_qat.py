"""`mimo bench qat`: its arithmetic, and three arms of a tiny model from start to end."""

import json

import numpy as np
import pytest

from mimo_jax import cli
from mimo_jax.bench import qat
from mimo_jax.errors import MimoError
from mimo_jax.train.config import to_toml
from tests.train.tiny_run import make_config, write_data

ARMS = ("bf16", "floor", "mse", "qat")


def write_seeds(folder, bits):
    """Results of seeds with these bits per byte, by arm."""
    for seed, values in enumerate(bits):
        arms = {
            a: {"bits_per_byte": x, "accuracy": 1 / x} for a, x in zip(ARMS, values, strict=True)
        }
        record = {"seed": seed, "arms": arms, "training": {}, "recipe": {"run": {"steps": 3}}}
        (folder / f"seed-{seed}.json").write_text(json.dumps(record))


def test_gaps_and_what_is_closed(tmp_path, rng, capsys):
    bits = rng.uniform(1, 2, (3, 1)) + [0, 0.4, 0.2, 0.05] + rng.uniform(0, 0.01, (3, 4))
    write_seeds(tmp_path, bits.tolist())
    assert cli.main(["bench", "qat", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    bf16, floor, mse, aware = bits.T
    assert found["seeds"] == [0, 1, 2]
    assert np.isclose(found["bits_per_byte"]["floor"]["mean"], floor.mean())
    assert np.isclose(found["bits_per_byte"]["qat"]["deviation"], aware.std(ddof=1))
    assert np.isclose(found["accuracy"]["mse"]["most"], (1 / mse).max())
    assert np.allclose(found["gap"]["floor"]["values"], floor - bf16)
    assert np.allclose(found["closed"]["mse"]["values"], 1 - (aware - bf16) / (mse - bf16))
    share = 1 - (aware - bf16).mean() / (floor - bf16).mean()
    assert np.isclose(found["closed"]["floor"]["of_means"], share)
    assert "MXFP4-aware training" in out and f"{floor.mean():.4f}" in out
    # One seed has no deviation.
    (tmp_path / "seed-1.json").unlink()
    (tmp_path / "seed-2.json").unlink()
    assert cli.main(["bench", "qat", str(tmp_path), "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["bits_per_byte"]["bf16"]["deviation"] == 0 and one["seeds"] == [0]


def test_wrong_usage(tmp_path, capsys):
    with pytest.raises(MimoError, match="holds no result of a seed"):
        qat.read_seeds(tmp_path)
    assert cli.main(["bench", "qat", str(tmp_path), "--seeds", "1"]) == 1
    assert "--seeds is given without --recipe" in capsys.readouterr().err
    (tmp_path / "recipe.toml").write_text("[qat]\nbegin = 0.0\n")
    with pytest.raises(MimoError, match="qat.begin=0.0 is not allowed here"):
        qat.configurations(tmp_path / "recipe.toml", [], tmp_path, 0)


@pytest.mark.slow
def test_three_arms_of_two_seeds(tmp_path, rng, capsys):
    data = write_data(tmp_path / "data", rng)
    data["heldout"] = [str(tmp_path / "data/heldout.npy")]
    run = {"steps": 12, "eval_every": 0, "eval_rows": 8, "out": ""}
    config = make_config(data, "", run=run, qat={"begin": 0.5, "rule": "mse"})
    (tmp_path / "recipe.toml").write_text(to_toml(config))
    arguments = ["bench", "qat", str(tmp_path / "runs"), "--recipe", str(tmp_path / "recipe.toml")]
    arguments += ["--rows", "8", "--json", "--seeds"]
    assert cli.main([*arguments, "3"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["seeds"] == [3] and first["training"][0]["plateau"]["steps"] == 6
    # A seed that is finished is left as it is; the time is up before the second one.
    stamp = (tmp_path / "runs/seed-3.json").stat().st_mtime_ns
    assert cli.main([*arguments, "3", "4", "--until", "1e-6"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["seeds"] == [3]
    assert cli.main([*arguments, "3", "4"]) == 0
    both = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert both["seeds"] == [3, 4] and (tmp_path / "runs/seed-3.json").stat().st_mtime_ns == stamp
    bits = both["bits_per_byte"]
    # Of both seeds: float32 sums over 144 tokens of two arms are equal once in a while.
    assert len({tuple(bits[arm]["values"]) for arm in ARMS}) == 4
    assert bits["bf16"]["values"][0] != bits["bf16"]["values"][1]
    for seed in both["training"]:
        # The same number of tokens for both arms, from the same step.
        assert seed["bf16"]["tokens"] == seed["qat"]["tokens"] == seed["plateau"]["tokens"]
        assert 0.01 < seed["qat"]["qat_error_mean"] < 0.5
