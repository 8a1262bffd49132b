"""Plots of runs and results: what is drawn is what was recorded."""

import json

import numpy as np
import pytest

from mimo_jax import plots
from mimo_jax.errors import MimoError

pytest.importorskip("matplotlib")


def write_run(folder, records):
    folder.mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "lo')
    return folder


def lines(figure):
    return {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}


def test_losses_of_runs(tmp_path, rng):
    losses = rng.random((2, 30))
    runs = {
        name: write_run(tmp_path / name, [{"step": n + 1, "loss": v} for n, v in enumerate(some)])
        for name, some in zip("ab", losses, strict=True)
    }
    drawn = lines(plots.loss_curve(runs, window=5))
    for name, some in zip("ab", losses, strict=True):
        expected = [some[n : n + 5].mean() for n in range(26)]
        assert np.allclose(drawn[name], np.column_stack([np.arange(5, 31), expected]))
    measured = write_run(tmp_path / "c", [{"step": 1, "loss": 2.0, "bits_per_byte": 1.5}])
    assert lines(plots.loss_curve(measured))["c, held-out bits per byte"].tolist() == [[1, 1.5]]
    with pytest.raises(MimoError, match="has no loss"):
        plots.loss_curve(write_run(tmp_path / "d", [{"step": 1}]))
    with pytest.raises(MimoError, match="does not exist"):
        plots.loss_curve(tmp_path / "none")


def test_acceptance_by_position(tmp_path, rng):
    shares = {name: rng.random(7).tolist() for name in ("64", "1024")}
    groups = {name: {"by_position": some} for name, some in shares.items()}
    result = {"acceptance": {"by_domain": {}, "by_context": groups}}
    (tmp_path / "eval.json").write_text(f"a table\n{json.dumps(result)}\n")
    for given in (result, tmp_path / "eval.json"):
        drawn = lines(plots.acceptance_by_position(given))
        assert {name: xy[:, 1].tolist() for name, xy in drawn.items()} == shares
    with pytest.raises(MimoError, match=r"it has \['by_context'\]"):
        plots.acceptance_by_position(result, "by_domain")
    run = write_run(tmp_path / "run", [{"step": 5, "right_by_slot": [0.5, 0.4]}])
    assert lines(plots.acceptance_by_position(run))["step 5"].tolist() == [[1, 0.5], [2, 0.2]]
    with pytest.raises(MimoError, match="no held-out acceptance"):
        plots.acceptance_by_position(write_run(tmp_path / "other", [{"step": 1}]))


def test_errors_of_layers(tmp_path, rng):
    names = [f"layers.{n}.ffn.experts.{m}" for n in (1, 10) for m in ("gate_up", "down")]
    errors = rng.random((3, 4))
    records = [
        {"step": n, "qat_error": dict(zip(names, row, strict=True))} for n, row in enumerate(errors)
    ]
    drawn = lines(plots.qat_error(write_run(tmp_path / "run", records)))
    labels = ["1 gate_up", "1 down", "10 gate_up", "10 down"]
    assert np.allclose([drawn[label][:, 1] for label in labels], errors.T)
    with pytest.raises(MimoError, match="no qat_error"):
        plots.qat_error(write_run(tmp_path / "other", [{"step": 1, "loss": 2.0}]))
