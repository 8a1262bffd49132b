"""A run's measurements: JSONL, one console line a step, TensorBoard; and when to stop."""

import collections
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimo_jax.errors import MimoError

FILE = "metrics.jsonl"
RECENT = 50
"""Losses whose median a spike is measured by."""


class Log:
    """Appends records to a run's metrics.jsonl, and keeps it in step with its checkpoints.

    Args:
      folder: of the run.
      step: that the run goes on from: records of later ones, which a killed run wrote, are dropped.
      tensorboard: write event files too.

    Raises:
      MimoError: if TensorBoard is asked for and its writer is not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        path = folder / FILE
        kept = [r for r in read_metrics(path) if r["step"] <= step] if path.exists() else []
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = _board(folder) if tensorboard else None

    def __call__(self, step: int, values: dict[str, Any]) -> None:
        """Writes a record of a step."""
        print(json.dumps({"step": step, **values}), file=self._file, flush=True)
        for name, value in values.items() if self._board else ():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board:
            self._board.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out.

    Raises:
      MimoError: if there is none, or another line is not JSON.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise MimoError(f"{path} does not exist: give a run's folder or its {FILE}.") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise MimoError(f"{path}, line {number} is not JSON.") from None
    return records


class Guard:
    """Stops a run whose loss is not finite or leaps.

    Args:
      spike: how many times the median of the recent losses a loss may be; 0 is any.
    """

    def __init__(self, spike: float):
        self._spike = spike
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)

    def check(
        self, step: int, loss: float, grad_norm: float, newest: Callable[[], int | None]
    ) -> None:
        """Looks at a step.

        Args:
          step: its number.
          loss: of it.
          grad_norm: of its gradient.
          newest: gives the newest whole checkpoint's step, or None.

        Raises:
          MimoError: naming the step and the checkpoint.
        """
        words = None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            words = f"the loss is {loss} and its gradient's norm {grad_norm}"
        elif self._spike and len(self._recent) == RECENT:
            usual = statistics.median(self._recent)
            if loss > self._spike * usual:
                words = f"the loss leapt to {loss:.4g}, recently it was {usual:.4g} (run.spike)"
        self._recent.append(loss)
        if words:
            safe = newest()
            last = "no checkpoint was written" if safe is None else f"the last is of step {safe}"
            raise MimoError(
                f"Stopped at step {step}: {words}; of good checkpoints {last}. The same command "
                "goes on from it; try a lower optimizer.lr or optimizer.clip in a new run."
            )


class Console:
    """One line a step on stderr: what is learnt, how fast, how long yet.

    Args:
      steps: of the whole run.
      done: steps before this start.
      flops: floating-point operations of a step.
      peak: operations a second of all devices.
      every: steps between lines.
    """

    def __init__(self, steps: int, done: int, flops: float, peak: float, every: int):
        self._steps, self._done, self._flops, self._peak = steps, done, flops, peak
        self._every = every
        self._begun: float | None = None
        self._seen: collections.deque[tuple[float, int]] = collections.deque(maxlen=21)

    def __call__(self, step: int, tokens: int, values: dict[str, float]) -> dict[str, float]:
        """Prints a step; returns what was measured of its speed."""
        now = time.perf_counter()
        self._begun = now if self._begun is None else self._begun
        self._seen.append((now, step))
        speed: dict[str, float] = {}
        # The first steps after a start are read together, once the program is compiled.
        if len(self._seen) > 2:
            (since, first), (until, last) = self._seen[0], self._seen[-1]
            second = (until - since) / (last - first)
            speed = {"step_s": second, "tokens_per_second": tokens / second}
            speed["peak_share"] = self._flops / second / self._peak
        if step % self._every == 0 or step == self._steps:
            print(self._line(step, values, speed), file=sys.stderr, flush=True)
        return speed

    def _line(self, step: int, values: dict[str, float], speed: dict[str, float]) -> str:
        parts = [
            f"step {step}/{self._steps} {step / self._steps:.0%}",
            f"loss {values['loss']:.4f}",
        ]
        if "acceptance" in values:
            parts.append(f"acceptance {values['acceptance']:.2f}")
        parts.append(f"lr {values['lr']:.1e}")
        if speed:
            left = (self._steps - step) * speed["step_s"]
            parts.append(f"{_short(speed['tokens_per_second'])} tokens/s")
            parts.append(f"{speed['peak_share']:.1%} of peak")
            parts.append(f"{_clock(left)} left")
        return " | ".join(parts)


def measure_peak(dtype: Any, seconds: float = 0.05) -> float:
    """Operations a second that one device reaches in a product of square matrices.

    Args:
      dtype: of the matrices.
      seconds: to spend, about; two passes more are for compiling and for choosing the size.
    """
    import jax
    import jax.numpy as jnp

    size = 512 if jax.default_backend() == "cpu" else 8192

    @jax.jit
    def product(x):
        return jnp.einsum("ij,jk->ik", x, x, preferred_element_type=jnp.float32).astype(x.dtype)

    def timed(count: int) -> float:
        x = jnp.full((size, size), 1e-3, dtype)
        start = time.perf_counter()
        for _ in range(count):
            x = product(x)
        jax.block_until_ready(x)
        return time.perf_counter() - start

    timed(1)
    once = timed(1)
    count = max(2, min(200, round(seconds / once)))
    best = min(timed(count) / count for _ in range(3))
    return 2 * size**3 / best


def _board(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:
        raise MimoError(
            "run.tensorboard needs tensorboardX: pip install 'mimo-jax[tensorboard]', or leave it "
            f"out; {FILE} has the same figures."
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))


def _short(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
