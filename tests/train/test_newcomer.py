"""What a newcomer does: a toy and its drafter on a text file of their own, in three commands."""

import json
import os
import pathlib
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from mimo_jax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALLER = ["run.steps=60", "run.save_every=30", "data.vocabulary=512", "data.length=128"]


def mimo(*arguments, folder):
    """Runs the command in a fresh process on one CPU device; its stdout."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-W", "error", "-m", "mimo_jax", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_commands(tmp_path):
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "ast.py", "inspect.py", "typing.py", "zipfile.py")
    sources = [library / name for name in names if (library / name).exists()]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    (tmp_path / "book.txt").write_text(text)
    recipe = ["--recipe", ROOT / "checkpoints/toy.toml", "--data", "book.txt"]
    recipe += [word for setting in SMALLER for word in ("--set", setting)]
    first = json.loads(mimo("train", "target", *recipe, "--out", "toy", folder=tmp_path))
    assert first["checkpoint"] == "toy/checkpoint" and first["step"] == 60
    drafting = [*recipe, "--target", "toy", "--out", "drafter", "--set", "drafter.answers=both"]
    drafting += ["--set", "drafter.own_rows=32", "--set", "drafter.own_length=128"]
    second = json.loads(mimo("train", "drafter", *drafting, folder=tmp_path))
    assert second["step"] == 60
    acceptance = [r["acceptance"] for r in read_metrics(tmp_path / "drafter")]
    assert np.mean(acceptance[-10:]) > np.mean(acceptance[:10]) + 0.15, acceptance
    measured = ["--text", "book.txt", "--rows", "4", "--count", "4", "--max-tokens", "32"]
    out = mimo("eval", "--model", "drafter", *measured, folder=tmp_path)
    result = json.loads(out.splitlines()[-1])
    assert result["text"]["bits_per_byte"] < 8
    assert result["acceptance"]["by_context"]["64"]["acceptance_length"] > 1.1
    # Running a finished command again takes no step more.
    again = json.loads(mimo("train", "drafter", *drafting, folder=tmp_path))
    assert again["step"] == 60 and len(read_metrics(tmp_path / "drafter")) == 60
