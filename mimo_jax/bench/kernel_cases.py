"""What `mimo bench kernels` runs: ways to launch the expert kernel, checks and timings, in order.

From safe to risky: what has run on a GPU before what has not, one launch (whose thread blocks wait
for each other) after two.
"""

import dataclasses
from typing import Any

from pallas_kernels.expert_ffn.mosaic_gpu import Launch

ONE, TWO = Launch(), Launch(fused=False)
LAUNCHES: dict[str, Launch] = {
    "two": TWO,
    "two-list": dataclasses.replace(TWO, own_list=True),
    "two-3": dataclasses.replace(TWO, stages=3),
    "two-8": dataclasses.replace(TWO, stages=8),
    "two-wait": dataclasses.replace(TWO, ahead=False),
    "one": ONE,
    "one-3": dataclasses.replace(ONE, stages=3),
    "one-5": dataclasses.replace(ONE, stages=5),
    "one-run-1": dataclasses.replace(ONE, runs=1),
    "one-run-4": dataclasses.replace(ONE, runs=4),
}
SOUND = ("two", "one")
"""Checked on every shape; the others where bits once moved first."""

Job = dict[str, Any]


def launches_of(job: Job) -> list[str]:
    """Names of the launches that a job runs."""
    return job.get("launches", [job["launch"]] if "launch" in job else [])


def checks(names) -> list[Job]:
    """Correctness: on the shapes whose bits once moved, then on the others."""
    jobs: list[Job] = []
    for shape, t, experts, scales in (
        ("pro-tp8", 8, 24, (118, 122)),
        ("pro-tp8", 11, 24, (118, 122)),
        ("pro-tp8", 16, 160, (118, 122)),
        ("pro-tp8", 1, 24, (118, 122)),
        ("pro-tp8", 8, 24, (107, 138)),
        ("flash-tp8", 8, 24, (118, 122)),
        ("nano", 8, 24, (118, 122)),
        ("pro", 4, 24, (118, 122)),
        ("pro-tp8", 70, 24, (118, 122)),
    ):
        some = [n for n in names if n in SOUND and (t <= 16 or n.startswith("two"))]
        if not jobs:
            some += [n for n in names if n not in SOUND]
        if some:
            known = dict(shape=shape, t=t, experts=experts, scales=scales)
            jobs.append({"job": "check", **known, "launches": some})
    return jobs


def times(names, shapes) -> list[Job]:
    """Timings: all launches on the shape in question, the best on the others."""
    jobs: list[Job] = []

    def add(shape, launches, **job):
        for name in launches:
            if name in names and shape in shapes:
                jobs.append({"job": "time", "shape": shape, **job, "launch": name})

    add("pro-tp8", LAUNCHES, t=8, active=59)
    add("pro-tp8", (*SOUND, "two-list"), t=1)
    for t in (2, 4, 16):
        add("pro-tp8", SOUND, t=t)
    add("pro-tp8", SOUND, t=8, zipf=1.0)
    add("pro-tp8", SOUND, t=8, active=59, hooks="stream")
    add("pro-tp8", ("one",), t=1, hooks="stream")
    add("pro-tp8", ("two",), t=8, active=59, hooks="folded")
    add("pro", (*SOUND, "two-3"), t=8, active=59)
    add("pro", ("one",), t=8, active=59, hooks="stream")
    add("pro", SOUND, t=1)
    add("flash-tp8", SOUND, t=8)
    add("flash-tp8", SOUND, t=1)
    add("nano", SOUND, t=8)
    for t in (64, 256, 1024, 2048):
        add("pro-tp8", ("two",), t=t)
    return jobs


def jobs_for(check: bool, time: bool, prefill: bool, names, shapes) -> list[Job]:
    """All that was asked for, in the order in which it runs."""
    jobs: list[Job] = [{"job": "read"}] if time else []
    for some in (
        [n for n in names if not n.startswith("one")],
        [n for n in names if n.startswith("one")],
    ):
        jobs += checks(some) if check else []
        jobs += times(some, shapes) if time else []
        if time and "two" in some:
            jobs += [{"job": "list", "shape": "pro-tp8", "t": t} for t in (1, 8, 16)]
            jobs += [{"job": "xla", "shape": "pro-tp8", "t": 8}]
        if time and "one" in some:
            line = {"job": "line", "launch": "one"}
            jobs += [{**line, "shape": "pro-tp8", "t": 8, "active": 59}]
            jobs += [{**line, "shape": "pro-tp8", "t": 1}]
            jobs += [{**line, "shape": "pro", "t": 8, "active": 59}] if "pro" in shapes else []
    if prefill:
        jobs += [{"job": "ragged", "shape": "pro-tp8", "t": t} for t in (64, 256, 1024, 2048)]
    return jobs
