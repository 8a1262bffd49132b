"""Benchmark of sums over the GPUs of one host, inside a captured loop: by mail, and by XLA.

    mimo bench sums --check --time

The jobs run in a process of its own that is ended when it falls silent, or when the time is up:
GPUs that wait for each other can wait for ever.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mimo_jax.bench import kernels
from mimo_jax.bench.card import environment, print_json, print_table
from mimo_jax.errors import MimoError
from pallas_kernels.choice import kernel_absence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo bench sums`."""
    parser.add_argument("--check", action="store_true", help="bits, and 10,000 sums with delays")
    parser.add_argument("--time", action="store_true", help="microseconds a sum")
    parser.add_argument("--gpus", default="", help="how many, comma-separated (default: 2, 4, 8)")
    parser.add_argument("--limit-s", type=float, default=30.0, help="silence that ends a job")
    parser.add_argument("--total-s", type=int, default=150, help="after which all ends")
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    parser.add_argument("--out", type=Path, help="also write each result here as it comes")


def main(options: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table and its JSON line."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
    jobs = _jobs(options)
    late = False
    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder) / "results.jsonl"
        path.unlink(missing_ok=True)
        try:
            with _within(options.total_s):
                kernels.supervise(jobs, path, seed, options.limit_s)
        except TimeoutError as error:
            late = True
            print(error, file=sys.stderr)
        results = read(path)
    found = {"check": [], "time": []}
    for number, result in results:
        found[jobs[number]["job"].removeprefix("sums-")].append(result)
    result = {"benchmark": "sums", **_machine(), "seed": seed, "time_was_up": late, **found}
    show(result)
    print_json(result)
    failed = late or any("error" in row for row in found["check"])
    return 1 if failed else 0


def _jobs(options) -> list[dict[str, Any]]:
    """What was asked for, for the GPUs that are there."""
    import jax

    present = jax.local_device_count() if jax.default_backend() == "gpu" else 0
    reason = kernel_absence()
    if reason is None and present < 2:
        reason = f"{present} GPUs are here; a sum over devices needs two."
    if reason:
        raise MimoError(f"Sums over GPUs cannot be measured here: {reason}")
    counts = [int(n) for n in options.gpus.split(",") if n]
    if wrong := [n for n in counts if not 2 <= n <= min(8, present)]:
        raise MimoError(f"--gpus {wrong}: 2 to {min(8, present)} can be had.")
    from mimo_jax.bench import sums_jobs

    return sums_jobs.jobs(options.check, options.time, counts or None)


def _machine() -> dict[str, Any]:
    """Hardware and versions, and how the GPUs are linked."""
    links = subprocess.run(
        ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=False
    )
    return {**environment(), "links": links.stdout.splitlines()[:9]}


@contextlib.contextmanager
def _within(seconds: int):
    """Raises TimeoutError in its block when the time is up; leaves no alarm behind."""
    before = signal.signal(signal.SIGALRM, _over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _over(*_):
    raise TimeoutError("The time is up; what has been measured follows.")


def read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Results by the numbers of their jobs; a process that was ended may have left half a line."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "result" in fields:
            found.append((fields["job"], fields["result"]))
    return found


def show(result: dict[str, Any]) -> None:
    """Prints tables of checks and times."""
    columns = ("devices", "way", "same_bits", "exchanges", "s", "error")
    rows = [[row.get(k, "") for k in columns] for row in result["check"]]
    if rows:
        print_table("Checks", columns, rows)
    columns = ("shape", "devices", "way", "us", "error")
    rows = [[row.get(k, "") for k in columns] for row in result["time"]]
    if rows:
        print_table("Sums in a loop", columns, rows)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(_parser)
    sys.exit(main(_parser.parse_args()))
