"""Benchmark of the expert kernel on a GPU: correctness, times of launches and shapes, XLA beside.

The jobs run in a process of their own, which writes a line for each result. A job that crashes, or
says nothing for too long (thread blocks that wait for each other can wait for ever), loses itself
and no other: the next ones go to a new process.
"""

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mimo_jax.bench.card import environment, print_json, print_table
from mimo_jax.bench.kernel_cases import LAUNCHES, Job, jobs_for, launches_of
from mimo_jax.errors import MimoError
from pallas_kernels.choice import kernel_absence
from pallas_kernels.expert_ffn.shapes import SHAPES

_START_S = 60.0
OTHERS: dict[str, str] = {
    "attention": "mimo_jax.bench.attention_jobs",
    "linear": "mimo_jax.bench.linear_jobs",
    "router": "mimo_jax.bench.router_jobs",
    "prefill": "mimo_jax.bench.prefill_jobs",
    "sums": "mimo_jax.bench.sums_jobs",
}
"""Other kernels and the modules of their jobs, whose names begin with the kernel's."""
_KINDS = {
    "check": "checks",
    "time": "times",
    "line": "time_lines",
    "list": "lists",
    "xla": "xla",
    "ragged": "ragged",
}


def work(jobs: list[Job], first: int, path: Path, seed: int) -> None:
    """The process that runs jobs from `first` on: a line when one begins, one for each result."""
    import numpy as np

    held: dict[str, Any] = {}
    for number in range(first, len(jobs)):
        job, start = jobs[number], time.monotonic()
        _say(path, begins=number)
        rng = np.random.default_rng([seed, number])
        try:
            for result in _module(job).do(rng, job, held):
                took = round(time.monotonic() - start, 1)
                _say(path, job=number, result={**result, "took_s": took})
        except Exception as error:  # a variant may not compile; the others still count
            known = {k: v for k, v in job.items() if k != "job"}
            _say(path, job=number, result={**known, "error": repr(error)[:400]})


def _module(job: Job):
    """The module that does a job."""
    kernel = job["job"].split("-")[0]
    return importlib.import_module(OTHERS.get(kernel, "mimo_jax.bench.kernel_jobs"))


def supervise(jobs: list[Job], path: Path, seed: int, limit_s: float) -> list[tuple[Job, dict]]:
    """Runs the jobs in processes that it ends when they fall silent; returns all results.

    A launch that was lost once is not tried again; after two, nor is any of its family.
    """
    first, lost, left = 0, [], list(jobs)
    while first < len(jobs):
        with subprocess.Popen(_command(left, first, path, seed), stdout=sys.stderr) as process:
            try:
                silent = _wait(process, path, limit_s)
            finally:
                process.kill()
        lines = _lines(path)
        reached = max([first, *(line["begins"] for line in lines if "begins" in line)])
        if not silent and process.returncode == 0:
            break
        why = f"silent for {limit_s:.0f} s" if silent else f"exit code {process.returncode}"
        known = {k: v for k, v in jobs[reached].items() if k not in ("job", "launches")}
        done = [line["result"].get("launch") for line in lines if line.get("job") == reached]
        lost += [name for name in launches_of(jobs[reached]) if name not in done][:1]
        _say(path, job=reached, result={**known, "launch": lost[-1:], "error": why})
        first = reached + 1
        left = [_without(job, lost) for job in jobs]
    return [(jobs[line["job"]], line["result"]) for line in _lines(path) if "job" in line]


def _without(job: Job, lost: list[str]) -> Job:
    """The job without launches that were lost; nothing to do if it has no other."""
    families = [name.split("-")[0] for name in lost]
    names = launches_of(job)
    kept = [n for n in names if n not in lost and families.count(n.split("-")[0]) < 2]
    if names and not kept:
        return {"job": "skip"}
    return {**job, "launches": kept} if "launches" in job else job


def _command(jobs, first, path, seed) -> list[str]:
    arguments = json.dumps([jobs, first, str(path), seed])
    return [sys.executable, "-m", "mimo_jax.bench.kernels", "--work", arguments]


def _wait(process: subprocess.Popen, path: Path, limit_s: float) -> bool:
    """Waits for the end of a process; True if the file has not grown for too long before that.

    Until its first line it has longer: JAX and the GPU must start.
    """
    size, since, shown = _size(path), time.monotonic(), len(_lines(path))
    patience = limit_s + _START_S
    while process.poll() is None:
        time.sleep(0.2)
        now = _size(path)
        if now != size:
            size, since, patience = now, time.monotonic(), limit_s
            shown = _show(path, shown)
        elif time.monotonic() - since > patience:
            return True
    _show(path, shown)
    return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _say(path: Path, **fields) -> None:
    """Adds a line; a process that was killed may have left half of one before it."""
    with path.open("a") as out:
        out.write("\n" + json.dumps(fields) + "\n")


def _lines(path: Path) -> list[dict]:
    """What whole lines say."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _show(path: Path, shown: int) -> int:
    lines = _lines(path)
    for line in lines[shown:]:
        if "result" in line:
            brief = {k: v for k, v in line["result"].items() if k not in ("events", "blocks")}
            print(brief, file=sys.stderr, flush=True)
    return len(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo bench kernels`."""
    parser.add_argument(
        "--only", default="expert", help=f"kernels: {', '.join(('expert', *OTHERS))}"
    )
    parser.add_argument("--check", action="store_true", help="compare with the float32 reference")
    parser.add_argument("--time", action="store_true", help="time launches and shapes")
    parser.add_argument("--prefill", action="store_true", help="time XLA's ragged_dot")
    parser.add_argument(
        "--variants", default=",".join(LAUNCHES), help="ways to launch, comma-separated"
    )
    parser.add_argument(
        "--shapes", default="pro-tp8,pro,flash-tp8,nano", help="comma-separated (--time)"
    )
    parser.add_argument("--out", type=Path, help="also write each result here as it comes")
    parser.add_argument(
        "--limit-s", type=float, default=45.0, help="silence after which a job is given up"
    )
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")


def collect(results: list[tuple[Job, dict]]) -> dict[str, Any]:
    """What the JSON line holds."""
    found: dict[str, Any] = {name: [] for name in _KINDS.values()}
    for job, result in results:
        if job["job"] == "read":
            found |= result
        else:
            kind = job["job"]
            found.setdefault(_KINDS.get(kind, kind), []).append(result)
    for row in found["times"]:
        if "GB/s" in row and "read_GB/s" in found:
            row["share"] = row["GB/s"] / found["read_GB/s"]
    return found


def named(text: str, known, what: str) -> list[str]:
    """The names in a comma-separated list.

    Raises:
      MimoError: on a name that is not known.
    """
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise MimoError(f"{what} {', '.join(unknown)} unknown; known: {', '.join(known)}.")
    return names


def main(options: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table and its JSON line."""
    names = named(options.variants, LAUNCHES, "--variants")
    shapes = named(options.shapes, SHAPES, "--shapes")
    # The jobs' processes need the GPU's memory for themselves.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    reason = kernel_absence()
    if reason is None and jax.default_backend() != "gpu":
        reason = f"jax's default platform is {jax.default_backend()}, not gpu."
    if reason:
        raise MimoError(f"The expert kernel cannot be measured here: {reason}")
    seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
    jobs = _jobs(options, names, shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder) / "results.jsonl"
        path.unlink(missing_ok=True)
        results = supervise(jobs, path, seed, options.limit_s)
    result = {"benchmark": "kernels", **environment(), "seed": seed, **collect(results)}
    show(result)
    print_json(result)
    return 0


def _jobs(options, names, shapes) -> list[Job]:
    """All jobs that were asked for; the bandwidth once, before all times."""
    kernels = named(options.only, ("expert", *OTHERS), "--only")
    jobs: list[Job] = []
    if "expert" in kernels:
        jobs += jobs_for(options.check, options.time, options.prefill, names, shapes)
    elif options.time:
        jobs.append({"job": "read"})
    for kernel in kernels:
        if kernel in OTHERS:
            jobs += importlib.import_module(OTHERS[kernel]).jobs(options.check, options.time)
    return jobs


def show(result: dict[str, Any]) -> None:
    """Prints tables of checks and times."""
    columns = ("shape", "launch", "t", "hooks", "slots", "device_us", "us", "GB/s", "share")
    rows = [[row.get(k, "") for k in columns] for row in result["times"]]
    if rows:
        print_table("Expert FFN", columns, rows)
    columns = ("shape", "launch", "t", "distance", "same_bits", "independent", "like_first")
    rows = [[row.get(k, "") for k in columns] for row in result["checks"]]
    if rows:
        print_table("Checks", columns, rows)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _parser.add_argument("--work", help=argparse.SUPPRESS)
    add_arguments(_parser)
    _options = _parser.parse_args()
    if _options.work:
        _jobs, _first, _path, _seed = json.loads(_options.work)
        work(_jobs, _first, Path(_path), _seed)
    else:
        main(_options)
