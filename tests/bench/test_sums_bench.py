"""The benchmark of sums: its jobs and results without GPUs, its check on virtual devices."""

import argparse
import json
import signal

import jax
import numpy as np
import pytest

from mimo_jax.bench import sums, sums_jobs
from mimo_jax.errors import MimoError
from mimo_jax.sharding import make_mesh


def options(**changes):
    parser = argparse.ArgumentParser()
    sums.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args([])) | changes)


def test_the_check_is_right_on_virtual_devices(rng):
    mesh = make_mesh(4)
    assert sums_jobs.same_bits(rng, mesh) >= 6
    sums_jobs.exact_rounds(rng, mesh, 7, d=16)


def test_the_check_finds_one_wrong_number(rng, monkeypatch):
    right = sums_jobs.expected

    def wrong(x, rounds):
        found = right(x, rounds)
        found[1, 3, 2] += 1
        return found

    monkeypatch.setattr(sums_jobs, "expected", wrong)
    with pytest.raises(AssertionError):
        sums_jobs.exact_rounds(rng, make_mesh(2), 3, d=16)


def test_jobs_are_plain_and_the_riskiest_are_last():
    jobs = sums_jobs.jobs(True, True, [2, 4])
    assert json.loads(json.dumps(jobs)) == jobs
    assert [job["job"] for job in jobs[:4]] == ["sums-check"] * 4
    assert [job["way"] for job in jobs[:2]] == ["mail-host", "mail"]
    assert [job["way"] for job in jobs[-4:]] == ["nccl"] * 4
    assert {job["way"] for job in jobs} == set(sums_jobs.OPTIONS)


def test_a_time_is_measured(rng):
    job = {"job": "sums-time", "devices": 2, "shape": "nano", "way": "psum"}
    (result,) = sums_jobs.do(rng, job, {})
    assert result["way"] == "psum" and np.isfinite(result["us"])


def test_half_a_line_is_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"begins": 0}\n{"job": 0, "result": {"us": 3}}\n{"job": 1, "resu')
    assert sums.read(path) == [(0, {"us": 3})]
    assert sums.read(tmp_path / "none") == []


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="here are GPUs")
def test_without_gpus_it_says_why():
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(MimoError, match="cannot be measured here"):
        sums.main(options(check=True))
    assert signal.getsignal(signal.SIGALRM) is handler, "an alarm is left: it ends what runs next"


def test_a_failing_benchmark_leaves_no_alarm(monkeypatch):
    def fails(*_):
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 7
        raise MimoError("no job could be begun")

    monkeypatch.setattr(sums, "_jobs", lambda _: [])
    monkeypatch.setattr(sums.kernels, "supervise", fails)
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(MimoError, match="no job"):
        sums.main(options(total_s=7))
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
