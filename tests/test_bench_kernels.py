"""`mimo bench kernels` without a GPU: the order of its jobs; a stuck one loses only itself."""

import importlib.util
import json
import sys

import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from mimo_jax.bench import kernel_cases, kernel_jobs, kernels  # noqa: E402
from mimo_jax.bench.kernel_lines import read_stamps  # noqa: E402
from mimo_jax.bench.roofline import points, roofline, time_line  # noqa: E402
from mimo_jax.errors import MimoError  # noqa: E402

WORKER = """
import json, os, sys, time
jobs, first, path, seed = json.loads(sys.argv[1])
with open(path, "a") as out:
    def say(**fields):
        out.write(json.dumps(fields) + "\\n")
        out.flush()
    for number in range(first, len(jobs)):
        say(begins=number)
        if jobs[number]["do"] == "hang":
            out.write('{"job": ')
            out.flush()
            time.sleep(600)
        if jobs[number]["do"] == "crash":
            os._exit(7)
        say(job=number, result={"number": number})
"""


@pytest.mark.parametrize("bad", ["hang", "crash"])
def test_a_job_that_never_ends_loses_itself_only(bad, tmp_path, monkeypatch):
    jobs = [{"job": "time", "do": do} for do in ("run", bad, "run")]

    def command(*arguments):
        return [sys.executable, "-c", WORKER, json.dumps([str_of(a) for a in arguments])]

    monkeypatch.setattr(kernels, "_command", command)
    results = kernels.supervise(jobs, tmp_path / "out.jsonl", 1, limit_s=5.0)
    assert [result.get("number") for _, result in results] == [0, None, 2]
    words = "silent for 5 s" if bad == "hang" else "exit code 7"
    assert [result.get("error") for _, result in results] == [None, words, None]


def test_a_launch_that_was_lost_is_not_tried_again_and_after_two_nor_is_its_family():
    check = {"job": "check", "launches": ["two", "one", "one-sum"]}
    timed = {"job": "time", "launch": "one-sum"}
    assert kernels._without(check, ["one"])["launches"] == ["two", "one-sum"]
    assert kernels._without(timed, ["one"]) == timed
    assert kernels._without(timed, ["one", "one-list"]) == {"job": "skip"}
    assert kernels._without(check, ["one", "one-list"])["launches"] == ["two"]
    assert kernels._without({"job": "read"}, ["one", "one-list"]) == {"job": "read"}


def str_of(argument):
    return argument if isinstance(argument, list | int) else str(argument)


def test_safe_jobs_come_first():
    names = list(kernel_cases.LAUNCHES)
    jobs = kernel_cases.jobs_for(True, True, True, names, ["pro-tp8", "pro", "flash-tp8", "nano"])
    assert jobs[0] == {"job": "read"} and jobs[-1]["job"] == "ragged"
    assert all(json.loads(json.dumps(job)) for job in jobs)
    one = [
        any(n.startswith("one") for n in job.get("launches", [job.get("launch", "")]))
        for job in jobs
        if job["job"] in ("check", "time", "line")
    ]
    assert one == sorted(one) and one[-1] and not one[0]
    # Each launch is checked before it is timed.
    for name in names:
        checked = next(i for i, j in enumerate(jobs) if name in j.get("launches", ()))
        timed = next(i for i, j in enumerate(jobs) if j.get("launch") == name)
        assert checked < timed


def test_results_are_sorted_by_kind():
    jobs = [
        ({"job": "read"}, {"read_GB/s": 4000.0}),
        ({"job": "time"}, {"us": 1.0, "GB/s": 3000.0}),
        ({"job": "time"}, {"error": "silent for 60 s"}),
        ({"job": "check"}, {"same_bits": True}),
    ]
    found = kernels.collect(jobs)
    assert found["times"] == [{"us": 1.0, "GB/s": 3000.0, "share": 0.75}, jobs[2][1]]
    assert found["checks"] == [{"same_bits": True}] and found["read_GB/s"] == 4000.0


def test_a_variant_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(MimoError, match="three unknown; known: two, "):
        kernels.named("two,three", kernel_cases.LAUNCHES, "--variants")


def test_a_time_line_counts_from_the_first_block_that_begins():
    """By clocks of 2 GHz that have wrapped, beside a time that goes by steps of 100 ns."""
    since = np.zeros((3, 5, 6), np.int64)
    since[:, 3] = np.arange(0, 6000, 1000)
    since[:, 4, 0] = -10
    since[:, 0, 2] = 2990
    begins = np.array([1000, 1100, 1200])[:, None, None]
    stamps = np.stack([(begins + since) // 100 * 100, (2 * since - 77) % 2**32], -1)
    found = read_stamps(stamps)
    assert found["GHz"] == 2
    assert found["events"]["finisher: begins"] == dict(first=0.0, median=100.0, last=200.0)
    assert found["blocks"]["finisher: gate/up done"] == [1000, 1100, 1200]
    assert found["blocks"]["producer: begins"] == [-10, 90, 190]
    assert found["blocks"]["consumer: down done"] == [2990, 3090, 3190]


def test_what_a_call_costs_has_no_part_in_a_layers_time(monkeypatch):
    """A call of 20 ms, and half a millisecond a layer, two to an iteration."""
    now = 0.0

    def run(repeats):
        nonlocal now
        now += 20e-3 + 2 * 0.5e-3 * repeats

    monkeypatch.setattr(kernel_jobs.time, "perf_counter", lambda: now)
    assert kernel_jobs.seconds_each(run, count=2) == pytest.approx(0.5e-3)


def test_points_of_the_roofline():
    base = {"shape": "pro", "t": 8, "slots": 59.0, "us": 50.0, "GB/s": 3000.0}
    times = [
        {**base, "launch": "one"},
        {**base, "launch": "one", "hooks": "stream"},
        {"shape": "pro", "launch": "one", "t": 1, "error": "silent"},
        {**base, "variant": {"ctas": "128"}},
        {**base, "t": 1, "variant": {"t": "1", "profile": "True"}},
    ]
    first, last = points({"times": times})
    assert (first["launch"], first["MB"]) == ("one", 150.0)
    assert (last["launch"], last["t"]) == ("two", 1)
    with pytest.raises(MimoError, match="no timing"):
        points({"times": times[1:3]})


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_figures_hold_every_point_and_block():
    row = {"shape": "pro", "launch": "one", "t": 8, "slots": 59.0, "us": 50.0, "GB/s": 3000.0}
    figure = roofline({"times": [row, {**row, "launch": "two"}], "read_GB/s": 4000.0})
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]
    blocks = {"finisher: begins": [0, 100], "consumer: down done": [900, 1000]}
    figure = time_line({"shape": "pro", "t": 8, "launch": "one", "blocks": blocks})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(blocks)
