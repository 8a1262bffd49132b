"""The loop that every training shares: steps, measurements, checkpoints, resuming, stopping."""

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoint.manifest import write_atomically
from mimo_jax.errors import MimoError
from mimo_jax.train.config import TrainConfig, differences, to_toml
from mimo_jax.train.loader import Loader
from mimo_jax.train.metrics import Console, Guard, Log, measure_peak
from mimo_jax.train.placing import Placing
from mimo_jax.train.sources import same_data
from mimo_jax.train.start import DATA, RECIPE, TOKENIZER, read_recipe
from mimo_jax.train.steps import Steps


@dataclasses.dataclass
class Task:
    """What is trained; the loop knows nothing else of it.

    Attributes:
      kind: "target", "qat" or "drafter".
      init: makes the first state, on the devices.
      abstract: the state's shapes with their shardings.
      step: `step(state, batch, number) -> (state, metrics)`, the state donated; number counts from
        0.
      loader: of the batches.
      learning_rate: by step.
      flops: of a step.
      evaluate: measures a state: a record for the JSONL; None measures nothing.
      finish: writes the finished model; returns its folder.
    """

    kind: str
    init: Callable[[], Any]
    abstract: Any
    step: Callable[[Any, Any, int], tuple[Any, dict]]
    loader: Loader
    learning_rate: Callable[[int], Any]
    flops: float
    evaluate: Callable[[Any], dict[str, Any]] | None
    finish: Callable[[Any], Path]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: the last one done.
      checkpoint: the finished model's folder; None if the run was only paused (run.stop_at).
      metrics: of the last step.
      evaluation: the last one, or {}.
      seconds: that this start took.
    """

    step: int
    checkpoint: Path | None
    metrics: dict[str, Any]
    evaluation: dict[str, Any]
    seconds: float


def open_run(config: TrainConfig, kind: str) -> Path:
    """Makes a run's folder, or checks that it is this run's; before its first checkpoint it is new.

    Args:
      config: of the run.
      kind: "target", "qat" or "drafter".

    Raises:
      MimoError: if the folder cannot be written, is something else's, or holds a run of other
        settings; they are named.
    """
    if not config.run.out:
        raise MimoError("run.out is empty: name the run's folder, --out DIR.")
    out = Path(config.run.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / RECIPE).exists() and Steps(out).newest is not None:
            _check_same(out, config, kind)
            return out
        if any(out.iterdir()) and not (out / RECIPE).exists():
            raise MimoError(f"{out} holds other files, and no run: choose a new folder.")
        shutil.rmtree(out / DATA, ignore_errors=True)
        (out / TOKENIZER).unlink(missing_ok=True)
        recipe = f"# mimo train {kind}\n{to_toml(config)}"
        write_atomically(out / RECIPE, recipe.encode())
    except OSError as error:
        raise MimoError(
            f"run.out={config.run.out} cannot be written ({error.strerror}): choose another folder."
        ) from None
    return out


def _check_same(out: Path, config: TrainConfig, kind: str) -> None:
    first = (out / RECIPE).read_text().splitlines()[0]
    if first != f"# mimo train {kind}":
        raise MimoError(f"{out} holds a run of `{first[2:]}`: choose another --out.")
    changed = differences(read_recipe(out), config)
    if changed:
        raise MimoError(
            f"{out} holds a run with other settings ({'; '.join(changed)}): go on with the same "
            "ones, or choose another --out."
        )


def run(task: Task, config: TrainConfig, placing: Placing, dtype: Any) -> Result:
    """Trains from where the run's folder stands to its end, or to `run.stop_at`.

    Args:
      task: what to train.
      config: of the run; its folder is open.
      placing: of the devices.
      dtype: of computing, for the share of the peak.

    Raises:
      MimoError: if the loss is not finite or leaps, or a checkpoint cannot be written; each says
        what the last good checkpoint is.
    """
    section, out = config.run, Path(config.run.out)
    steps = Steps(out, section.keep)
    steps.clean()
    state, first = _begin(task, config, out, steps)
    last = min(section.stop_at or section.steps, section.steps)
    log = Log(out, first, section.tensorboard)
    peak = 1e12 * section.peak_tflops or measure_peak(dtype)
    console = Console(section.steps, first, task.flops, peak * placing.devices, section.log_every)
    loop = _Loop(task, config, placing, steps, log, console, first)
    try:
        state = loop.go(state, first, last)
        checkpoint = _finish(task, state, out) if last == section.steps else None
    finally:
        steps.close()
        log.close()
    return Result(last, checkpoint, loop.metrics, loop.evaluation, loop.seconds)


def _begin(task: Task, config: TrainConfig, out: Path, steps: Steps) -> tuple[Any, int]:
    """The newest state of the run, or of the one that it forks, or a first one."""
    source = steps
    if steps.newest is None and config.run.fork:
        source = Steps(config.run.fork)
        if source.newest is None:
            raise MimoError(f"run.fork={config.run.fork} holds no checkpoint to go on from.")
        if not same_data(Path(config.run.fork) / DATA, out / DATA):
            raise MimoError(
                f"run.fork={config.run.fork} was trained on other data.files or another tokenizer: "
                "its position in them means nothing here."
            )
    if source.newest is None:
        return task.init(), 0
    number = source.newest
    state, position = source.restore(task.abstract, number)
    task.loader.position = position
    print(f"Going on from step {number} of {source.folder.parent}.", file=sys.stderr, flush=True)
    return state, number


def _finish(task: Task, state: Any, out: Path) -> Path:
    try:
        return task.finish(state)
    except OSError as error:
        raise MimoError(
            f"The finished model could not be written to {out} ({error.strerror}): make room, and "
            "run the same command again."
        ) from None


class _Loop:
    """The steps themselves. Metrics are read one step late, so that devices never wait for it."""

    def __init__(self, task, config, placing, steps, log, console, first):
        self.task, self.section, self.placing = task, config.run, placing
        self.steps, self.log, self.console = steps, log, console
        self.guard = Guard(config.run.spike)
        self.rates = _rates(task.learning_rate, config.run.steps)
        self.metrics: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.start = time.perf_counter()
        self.pending: tuple[int, int, dict] | None = None
        # Two to an interval: while one is being written, a kill costs what came after the other.
        self.interval = max(1, config.run.save_every // 2)
        self.saved: int | None = first if steps.newest == first else None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def go(self, state: Any, first: int, last: int) -> Any:
        """Steps `first` to `last`, and the checkpoint of the last one."""
        for number in range(first, last):
            batch = self.placing.batch(next(self.task.loader))
            tokens = batch["tokens"].size
            state, metrics = self.task.step(state, batch, number)
            self.read()
            self.pending = number + 1, tokens, metrics
            done = number + 1
            if done % self.interval == 0 or done == last:
                self.save(done, state)
            if self.task.evaluate and self._measured(done, last):
                self.read()
                self.evaluation = self.task.evaluate(state)
                self.log(done, self.evaluation)
                print(_words(done, self.evaluation), file=sys.stderr, flush=True)
        self.read()
        if self.saved != last:
            self.save(last, state)
        self.steps.wait()
        return state

    def _measured(self, done: int, last: int) -> bool:
        every = self.section.eval_every
        return done == last or (every > 0 and done % every == 0)

    def read(self) -> None:
        """Takes in the metrics of the step before: log, line, and whether to stop."""
        if self.pending is None:
            return
        step, tokens, metrics = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values["lr"] = float(self.rates[step - 1])
        self.guard.check(step, values["loss"], values["grad_norm"], self.whole)
        speed = self.console(step, tokens, values)
        self.metrics = values | speed
        self.log(step, values | {"tokens": tokens, "seconds": round(self.seconds, 3)} | speed)

    def whole(self) -> int | None:
        """The newest checkpoint, once what is being written is whole."""
        self.steps.wait()
        return self.steps.newest

    def save(self, step: int, state: Any) -> None:
        """Begins a checkpoint; what is not finite is never saved."""
        self.read()
        if self.saved == step:
            return
        self.steps.save(step, state, self.task.loader.position)
        if self.section.save_every == 1:
            self.steps.wait()
        self.saved = step


def _rates(learning_rate: Callable[[int], Any], steps: int) -> np.ndarray:
    """The learning rate of each step, at once: asked one by one, they would wait for the step."""
    with jax.numpy_dtype_promotion("standard"):
        rates = jax.jit(jax.vmap(learning_rate))(jnp.arange(steps, dtype=jnp.int32))
    return np.asarray(rates)


def _words(step: int, evaluation: dict[str, Any]) -> str:
    numbers = {k: v for k, v in evaluation.items() if isinstance(v, int | float)}
    return f"step {step} | " + ", ".join(
        f"{k.replace('_', ' ')} {v:.4f}" for k, v in numbers.items()
    )


def compute_dtype(name: str) -> Any:
    """The dtype of computing: of "auto", float32 on CPUs and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
