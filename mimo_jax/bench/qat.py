"""What MXFP4 costs after training and with it: bf16, MXFP4 after training, QAT, over several seeds.

    mimo bench qat runs/arms --recipe checkpoints/mimo-nano.toml --seeds 0 1 2
    mimo bench qat runs/arms

For each seed a plateau is trained that both arms share; from its last step, at `qat.begin` of the
recipe's schedule, one run goes on without the rounding and one with it: the same tokens in the same
order, and equally many. The first run is then measured as it is and with MXFP4 experts by both
rules, the second as it ends; nothing is measured on the way. What is finished already is not done
again; without --seeds the table is made of what there is. The last line of stdout is one JSON
object.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mimo_jax.bench.card import environment, print_json, print_table
from mimo_jax.checkpoint.manifest import write_atomically
from mimo_jax.errors import MimoError
from mimo_jax.quant.mxfp4 import RULES
from mimo_jax.train.config import TrainConfig, load_config, to_dict
from mimo_jax.train.metrics import read_metrics
from mimo_jax.train.start import CHECKPOINT
from mimo_jax.train.steps import Steps
from mimo_jax.train.tasks import train

ARMS = ("bf16", *RULES, "qat")
"""What is measured of a seed: dense, MXFP4 after training by each rule, MXFP4-aware training."""
WORDS = {
    "bf16": "bf16",
    "floor": "MXFP4 after training, floor rule",
    "mse": "MXFP4 after training, least-error rule",
    "qat": "MXFP4-aware training",
}
PLATEAU = "plateau"
LAST = 100
"""Steps whose mean loss is a run's training loss."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo bench qat`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("runs", type=Path, metavar="DIR", help="the seeds' runs and results")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="to train and measure")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="a TOML file of settings, as mimo train's"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="any setting"
    )
    parser.add_argument("--rows", type=int, default=128, help="heldout rows (default 128)")
    parser.add_argument(
        "--until", type=float, default=0.0, metavar="S",
        help="begin no run that is expected to end later than after S seconds (default 0: never)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")


def main(options: argparse.Namespace) -> int:
    """Trains and measures what is missing, and prints the table and the line of JSON."""
    if options.seeds and options.recipe is None:
        raise MimoError("--seeds is given without --recipe: name the settings to train with.")
    late = _deadline(options.until)
    for seed in options.seeds:
        if not run_seed(options.runs, seed, options.recipe, options.set, options.rows, late):
            print(f"Seed {seed} is not finished: the time is up.", file=sys.stderr)
            break
    result = {"benchmark": "qat", **environment(), **summarise(read_seeds(options.runs))}
    if not options.json:
        _print_tables(result)
    print_json(result)
    return 0


def _deadline(seconds: float) -> Callable[[float], bool]:
    """Whether something that takes so long would end too late."""
    start = time.monotonic()
    return lambda needed: bool(seconds) and time.monotonic() - start + needed > seconds


def configurations(
    recipe: Path, overrides: Sequence[str], folder: Path, seed: int
) -> dict[str, TrainConfig]:
    """The settings of a seed's three runs: plateau, bf16, qat; without held-out text.

    Args:
      recipe: of `mimo train`.
      overrides: of its settings.
      folder: of the seed.
      seed: of the first weights and of the data's order.

    Raises:
      MimoError: if `qat.begin` leaves no step for one of them.
    """
    config = load_config(recipe, [*overrides, f"run.seed={seed}", f"data.seed={seed}"])
    begin = round(config.qat.begin * config.run.steps)
    if not 0 < begin < config.run.steps:
        raise MimoError(
            f"qat.begin={config.qat.begin} is not allowed here: of run.steps={config.run.steps} "
            "some must come before the arms part, and some after."
        )

    def changed(name: str, **run: Any) -> TrainConfig:
        section = dataclasses.replace(config.run, out=str(folder / name), **run)
        data = dataclasses.replace(config.data, heldout=())
        return dataclasses.replace(config, run=section, data=data)

    fork = {"fork": str(folder / PLATEAU)}
    return {
        PLATEAU: changed(PLATEAU, stop_at=begin),
        "bf16": changed("bf16", **fork),
        "qat": changed("qat", **fork),
    }


def run_seed(
    runs: Path,
    seed: int,
    recipe: Path,
    overrides: Sequence[str],
    rows: int,
    late: Callable[[float], bool],
) -> bool:
    """Trains and measures a seed, as far as that is not done; whether it is finished."""
    done = runs / f"seed-{seed}.json"
    if done.exists():
        return True
    heldout = load_config(recipe, overrides).data.heldout
    if not heldout:
        raise MimoError("data.heldout is empty: name the text to measure the arms on.")
    configs = configurations(recipe, overrides, runs / f"seed-{seed}", seed)
    trained = {}
    for name, config in configs.items():
        folder = Path(config.run.out)
        if not finished(config):
            if late(_expected(runs, config, name)):
                return False
            train("qat" if name == "qat" else "target", config)
        trained[name] = training_figures(folder)
    # Dense and packed checkpoints of the same length; the programs are the runs' own.
    measured = measure(configs, heldout, rows)
    record = {
        "seed": seed,
        **environment(),
        "recipe": to_dict(configs["qat"]),
        "heldout": list(heldout),
        "arms": measured,
        "training": trained,
    }
    write_atomically(done, (json.dumps(record, indent=1) + "\n").encode())
    return True


def finished(config: TrainConfig) -> bool:
    """Whether a run has come to its end, or to where it pauses."""
    folder, stop = Path(config.run.out), config.run.stop_at
    if stop:
        return Steps(folder).newest == stop
    return (folder / CHECKPOINT / "manifest.json").exists()


def _expected(runs: Path, config: TrainConfig, name: str) -> float:
    """Seconds that a run will take, by another seed's; 0 if there is none."""
    known = [
        record["training"][name]["seconds"]
        for record in read_seeds(runs, allow_none=True)
        if record["recipe"]["run"]["steps"] == config.run.steps
    ]
    return max(known, default=0.0)


def training_figures(folder: Path) -> dict[str, Any]:
    """A run's own records: steps, tokens, seconds, speed and training loss at its end."""
    records = [r for r in read_metrics(folder) if "loss" in r]
    speeds = [r for r in records if "tokens_per_second" in r]
    figures = {
        "steps": len(records),
        "tokens": sum(r["tokens"] for r in records),
        "seconds": records[-1]["seconds"],
        "loss": statistics.fmean(r["loss"] for r in records[-LAST:]),
    }
    for name in ("tokens_per_second", "peak_share"):
        if speeds:
            figures[name] = statistics.median(r[name] for r in speeds)
    errors = [r["qat_error_mean"] for r in read_metrics(folder) if "qat_error_mean" in r]
    return figures | ({"qat_error_mean": errors[-1]} if errors else {})


def measure(
    configs: dict[str, TrainConfig], heldout: Sequence[str], rows: int
) -> dict[str, dict[str, Any]]:
    """Bits per byte and accuracy of the arms on held-out text."""
    from mimo_jax.bench.evaluate import text_quality

    config = configs["qat"]
    devices = config.run.devices or 1
    how = {"rows": rows, "length": config.data.length, "devices": devices}
    places = {
        arm: ("qat" if arm == "qat" else "bf16", arm if arm in RULES else None) for arm in ARMS
    }
    return {
        arm: text_quality(Path(configs[run].run.out) / CHECKPOINT, heldout, rule=rule, **how)
        for arm, (run, rule) in places.items()
    }


def read_seeds(runs: Path, allow_none: bool = False) -> list[dict[str, Any]]:
    """The results of all seeds that are finished, in order.

    Raises:
      MimoError: if there is none, and that is not allowed.
    """
    paths = sorted(runs.glob("seed-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    if not paths and not allow_none:
        raise MimoError(
            f"{runs} holds no result of a seed: train some, --seeds 0 1 2 --recipe FILE."
        )
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Arms, gaps and what QAT closes of them, over seeds.

    A gap is what MXFP4 after training has more than bf16 of equal length, in bits per byte; QAT
    closes the share of it that it stays below. Shares are of each seed, and of the mean gap.

    Args:
      records: of `read_seeds`.
    """
    bits = {arm: [r["arms"][arm]["bits_per_byte"] for r in records] for arm in ARMS}
    right = {arm: [r["arms"][arm]["accuracy"] for r in records] for arm in ARMS}
    gaps = {rule: [b - a for a, b in zip(bits["bf16"], bits[rule], strict=True)] for rule in RULES}
    below = {rule: [b - a for a, b in zip(bits["qat"], bits[rule], strict=True)] for rule in RULES}
    closed = {
        rule: spread([x / gap for x, gap in zip(below[rule], gaps[rule], strict=True)])
        | {"of_means": statistics.fmean(below[rule]) / statistics.fmean(gaps[rule])}
        for rule in RULES
    }
    return {
        "seeds": [r["seed"] for r in records],
        "bits_per_byte": {arm: spread(values) for arm, values in bits.items()},
        "accuracy": {arm: spread(values) for arm, values in right.items()},
        "gap": {rule: spread(values) for rule, values in gaps.items()},
        "closed": closed,
        "training": [r["training"] for r in records],
        "recipe": records[0]["recipe"],
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (of a sample; 0 of one value), extremes, and the values."""
    return {
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
        "least": min(values),
        "most": max(values),
        "values": list(values),
    }


def _print_tables(result: dict[str, Any]) -> None:
    columns = ("", "mean", "deviation", "least", "most")

    def row(words: str, values: dict[str, Any], digits: int) -> tuple[str, ...]:
        return (words, *(f"{values[name]:.{digits}f}" for name in columns[1:]))

    count = len(result["seeds"])
    for name, digits in (("bits_per_byte", 4), ("accuracy", 4)):
        rows = [row(WORDS[arm], result[name][arm], digits) for arm in ARMS]
        title = f"Held-out {name.replace('_', ' ')}, {count} seed(s)"
        print_table(title, columns, rows)
    rows = [row(f"gap, {WORDS[rule]}", result["gap"][rule], 5) for rule in RULES]
    rows += [row(f"closed by QAT, {rule}", result["closed"][rule], 2) for rule in RULES]
    print_table("MXFP4 after training minus bf16, in bits per byte", columns, rows)
