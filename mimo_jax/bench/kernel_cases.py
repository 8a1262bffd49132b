"""What `mimo bench kernels` runs: ways to launch the expert kernel, checks and timings, in order.

From safe to risky: what has run on a GPU before what has not, one launch (whose thread blocks wait
for each other) after two.
"""

import dataclasses
from typing import Any

from pallas_kernels.expert_ffn.mosaic_gpu import Launch

ONE = Launch(fused=True, own_list=True, own_sum=True)
LAUNCHES = {
    "two": Launch(),
    "two-used": Launch(release="used"),
    "two-late": Launch(release="late"),
    "two-none": Launch(release="none"),
    "two-3": Launch(stages=3),
    "two-wait": Launch(ahead=False),
    "one": Launch(fused=True),
    "one-list": Launch(fused=True, own_list=True),
    "one-sum": ONE,
    "one-sum-used": dataclasses.replace(ONE, release="used"),
    "one-sum-late": dataclasses.replace(ONE, release="late"),
    "one-sum-3": dataclasses.replace(ONE, stages=3),
    "one-sum-5": dataclasses.replace(ONE, stages=5),
    "one-sum-wait": dataclasses.replace(ONE, ahead=False),
}
"""Variants by name. "two-none" gives stages back too early and is for timing only."""
FIRST = ("two", "two-used", "two-late")
SECOND = ("one", "one-list", "one-sum", "one-sum-used", "one-sum-late")

Job = dict[str, Any]


def checks(names) -> list[Job]:
    """Correctness: each launch on the shapes whose bits once moved, and on the others once."""
    jobs = []
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
        few = [n for n in names if t <= 16 or not n.startswith("one")]
        if few:
            job = dict(shape=shape, t=t, experts=experts, scales=scales, launches=few)
            jobs.append({"job": "check", **job})
    return jobs


def times(names, shapes) -> list[Job]:
    """Timings of launches: all on the shape in question, the first and last on the others."""
    jobs = []
    blocks = ((8, 59), (1, None), (2, None), (4, None), (16, None))
    for name in names if "pro-tp8" in shapes else ():
        for t, active in blocks:
            if t in (1, 8) or name in ("two", "two-used", "one-sum", "one-sum-used"):
                jobs.append(dict(shape="pro-tp8", t=t, active=active, launch=name))
        if name in ("two", "one-sum"):
            jobs.append(dict(shape="pro-tp8", t=8, active=None, zipf=1.0, launch=name))
            jobs.append(dict(shape="pro-tp8", t=8, active=59, hooks="stream", launch=name))
            jobs.append(dict(shape="pro-tp8", t=1, active=None, hooks="stream", launch=name))
    for name in names:
        if name in ("two", "two-used", "one-sum", "one-sum-used"):
            more = [("pro", 8, 59), ("pro", 1, None), ("flash-tp8", 8, None), ("nano", 8, None)]
            for shape, t, active in more:
                if shape in shapes:
                    jobs.append(dict(shape=shape, t=t, active=active, launch=name))
    if "two" in names and "pro-tp8" in shapes:
        for t in (64, 256, 1024, 2048):
            jobs.append(dict(shape="pro-tp8", t=t, active=None, launch="two"))
    if "two" in names and "pro" in shapes:
        jobs.append(dict(shape="pro", t=8, active=59, launch="two-3"))
    return [{"job": "time", **job} for job in jobs]


def jobs_for(check: bool, time: bool, prefill: bool, names, shapes) -> list[Job]:
    """All that was asked for, in the order in which it runs."""
    jobs: list[Job] = [{"job": "read"}] if time else []
    early = [n for n in names if not n.startswith("one")]
    late = [n for n in names if n.startswith("one")]
    for some in (early, late):
        sound = [n for n in some if n in (*FIRST, *SECOND)]
        jobs += checks(sound) if check else []
        jobs += times(some, shapes) if time else []
        if time and some is early:
            jobs += [{"job": "list", "shape": "pro-tp8", "t": t} for t in (1, 8, 16)]
            jobs += [{"job": "xla", "shape": "pro-tp8", "t": 8}]
        if time and any(n.startswith("one-sum") for n in some):
            jobs += [{"job": "line", "shape": "pro-tp8", "t": t, "active": a, "launch": "one-sum"}
                     for t, a in ((8, 59), (1, None))]  # fmt: skip
    if prefill:
        jobs += [{"job": "ragged", "shape": "pro-tp8", "t": t} for t in (64, 256, 1024, 2048)]
    return jobs
