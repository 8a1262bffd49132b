"""The benchmark of prefill: its counts by hand, its integration, the command; the GPU's jobs."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax import cli
from mimo_jax.bench import prefill
from mimo_jax.bench.rank_run import shorten
from mimo_jax.decode.kernel_weights import kernel_plan
from mimo_jax.decode.program import make_plan
from mimo_jax.decode.rank import rank_plan
from mimo_jax.errors import MimoError
from mimo_jax.planning.sizes import abstract_mesh
from mimo_jax.presets import preset
from mimo_jax.sharding import make_mesh


def test_flops_of_the_large_model_by_hand():
    config, _ = shorten(preset("mimo-v2.6-pro"), None, 2)
    whole = make_plan(config, None, abstract_mesh(8), fp8=True, dtype=prefill.DTYPE)
    plan = rank_plan(kernel_plan(whole), make_mesh(1))
    work = prefill.work_of(config, plan, 8)
    attention = (16 * 192 + 192 + 128) * 6144 + 6144 * 16 * 128
    dense = 3 * 2048 * 6144
    sparse = 384 * 6144 + 8 * 3 * 256 * 6144
    assert work.weights(3) == 2 * 3 * (2 * attention + dense + sparse)
    pattern = config.hybrid_layer_pattern[:2]
    assert sorted(pattern) == [0, 1]
    seen = sum(range(101, 301)) + 28 * 100 + sum(min(p, 128) for p in range(129, 301)) - 28 * 100
    seen += sum(range(101, 129))
    assert work.attention(100, 200) == 2 * 16 * (192 + 128) * seen


def test_places_lie_in_the_prompt_and_end_with_it():
    assert prefill.places(1024, 2048, 6) == [0]
    found = prefill.places(1 << 18, 2048, 6)
    assert found[0] == 0 and found[-1] == (1 << 18) - 2048 and len(found) == 6
    assert all(start % 2048 == 0 for start in found)


def test_linear_times_are_integrated_exactly(rng):
    chunk, base, slope = 32, 3.0, 0.25
    timed = [
        {"start": start, "ms": base + slope * start} for start in prefill.places(5000, chunk, 4)
    ]
    for prompt in (2, 33, 34, *rng.integers(40, 5000, 5)):
        starts = range(0, int(prompt) - 1, chunk)
        wanted = sum(base + slope * start for start in starts) / 1e3
        assert np.isclose(prefill.integrate(timed, int(prompt), chunk), wanted)


@pytest.mark.slow
def test_the_command_on_the_small_model(capsys):
    arguments = (
        "bench prefill --model mimo-nano --ranks 2 --layers 2 --prompts 20,90 --chunk 32 "
        "--places 3 --repeats 1 --no-kernel --json"
    )
    assert cli.main(arguments.split()) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "prefill" and result["layers"] == 2 and result["chunk"] == 32
    measured, integrated = result["measured"], result["integrated"]
    assert [row["start"] for row in measured["chunks"]] == [0, 32, 64]
    assert [row["prompt"] for row in measured["prompts"]] == [20, 90]
    assert [row["chunks"] for row in integrated["prompts"]] == [1, 3]
    total = sum(row["ms"] for row in measured["chunks"]) / 1e3
    assert np.isclose(integrated["prompts"][1]["seconds"], total)
    for row in (*measured["chunks"], *measured["prompts"], *integrated["prompts"]):
        work = row["attention_TFLOP"] + row["weights_TFLOP"]
        took = row["ms"] / 1e3 if "ms" in row else row["seconds"]
        assert np.isclose(row["TFLOP/s"], work / took)
        assert np.isclose(row["share"], row["TFLOP/s"] / result["peak_TFLOP/s"])


def test_a_prompt_of_one_token_is_refused():
    with pytest.raises(MimoError, match="1 leaves nothing"):
        prefill.prompts_of(argparse.Namespace(prompts="40,1"))


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernels need jax >= 0.11.2")
def test_jobs_of_a_gpu(rng):
    """Shapes that exist, FLOPs by hand, inputs whose hidden rows are NaN."""
    from mimo_jax.bench import prefill_jobs as jobs

    found = jobs.jobs(True, True)
    assert {job["job"] for job in found} == {"prefill-check", "prefill-time"}
    assert {job["way"] for job in found if "way" in job} == {*jobs.LAUNCHES, "blocks", "xla"}
    shape = jobs.SHAPES["nano-window"]
    assert jobs.flops(shape, 3, 126) == 2 * 8 * (48 + 32) * (127 + 128 + 128)
    q, keys, values, start, live, first, sink = jobs.inputs(rng, shape, 64, 300, 60)
    assert int(first[0]) == 128 and keys.shape == (1, 4, 256, 48)
    hidden = np.isnan(np.asarray(values, np.float32)).all(axis=(0, 1, 3))
    assert hidden.tolist() == [p < 173 or p >= 360 for p in range(128, 384)]
    for way in ("blocks", "xla", "none"):
        out = jobs.layers((q, *map(jnp.nan_to_num, (keys, values)), start, live, first, sink),
                          way, shape.window, 2)  # fmt: skip
        assert out.shape == q.shape and np.isfinite(np.asarray(out, np.float32)).all()
