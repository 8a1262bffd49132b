"""`mimo bench train`: what is made of a trace, and a whole run of the smallest case."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mimo_jax import cli
from mimo_jax.bench.train import CASES, busiest, check_attention
from mimo_jax.train.pretrain import abstract_target


def test_the_busiest_kernels_of_a_step():
    events = [("a", 10.0), ("b", 300.0), ("a", 30.0), ("c", 5.0), ("a", 20.0), ("b", 35.0)]
    first, second = busiest(events, 2, steps=2)
    assert first == {"name": "b", "calls": 1.0, "ms": 0.1675, "share": 335 / 400}
    assert (second["name"], second["calls"]) == ("a", 1.5)
    assert busiest([], 3, 2) == []


def test_the_larger_case_has_a_billion_parameters():
    _, params = abstract_target(CASES["1b"].config)
    assert 0.95e9 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 1.05e9


@pytest.mark.slow
def test_kernels_and_blocks_are_as_far_from_float32():
    toy = CASES["toy"]
    recipe = dataclasses.replace(toy.recipe, attention="interpreted")
    found = check_attention(dataclasses.replace(toy, recipe=recipe, length=256))
    assert {name.partition(", ")[2] for name in found} == {"full", "window of 128"}
    for name, distance in found.items():
        assert 1e-4 < distance < 2e-2, name
        assert distance < 2 * found[name.replace("kernels", "blocks")]


@pytest.mark.slow
def test_the_command(capsys):
    arguments = ["bench", "train", "--cases", "toy", "--steps", "1", "--repeats", "2"]
    assert cli.main([*arguments, "--kernels", "3", "--peak", "2"]) == 0
    out = capsys.readouterr().out
    (row,) = json.loads(out.splitlines()[-1])["cases"]
    assert row["batch"] == 2 and row["length"] == 256 and row["rule"] == "mse"
    assert np.isclose(row["tokens_per_second"], 512 / row["step_s"])
    assert np.isclose(row["peak_share"], row["tflops"] / 2) and row["tflops"] > 0
    assert "Training steps" in out
