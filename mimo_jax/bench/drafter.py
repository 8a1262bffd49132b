"""Ways to train a drafter, at equal budgets: optimiser, answers, weights of the loss.

    mimo bench drafter runs/table --target runs/qat --seconds 60
      --recipe checkpoints/mimo-nano-drafter.toml --prompts prompts.jsonl

A short first run measures how many steps fit into the seconds, and has the target write the answers
that all others use; then each arm is trained for so many steps, and its acceptance measured on
held-out prompts beside a prompt-lookup drafter's. What is finished already is not done again;
without --target the table is made of what there is. The last line of stdout is one JSON object.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mimo_jax
from mimo_jax.bench.card import environment, print_json, print_table
from mimo_jax.bench.evaluate import acceptance_report, read_prompts
from mimo_jax.checkpoint.manifest import write_atomically
from mimo_jax.errors import MimoError
from mimo_jax.train.config import TrainConfig, load_config, to_dict
from mimo_jax.train.metrics import read_metrics
from mimo_jax.train.start import CHECKPOINT
from mimo_jax.train.tasks import train

ARMS = {
    "recipe": [],
    "adamw": ["optimizer.name=adamw"],
    "data": ["drafter.answers=data"],
    "own": ["drafter.answers=own"],
    "both": ["drafter.answers=both"],
    "decay": ["drafter.weighting=decay"],
    "flat": ["drafter.weighting=flat"],
    "dpace": ["drafter.weighting=dpace"],
    "near": ["drafter.far=0.0"],
}
"""Arms by name: what each sets beside the recipe."""
DEFAULT = ("recipe", "adamw", "data", "own", "both", "decay", "flat")
PROBE = "probe"
PROBED = 60
"""Steps of the first run."""
COLUMNS = (
    "acceptance_length",
    "without_repeats",
    "prompt_lookup",
    "prompt_lookup_without_repeats",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo bench drafter`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = __doc__
    parser.add_argument("runs", type=Path, metavar="DIR", help="the arms' runs and results")
    parser.add_argument("--target", metavar="DIR", help="a checkpoint's or a run's folder")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="a TOML file of settings")
    parser.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS),
        help=f"default: the recipe, and of {', '.join(DEFAULT[1:])} those that differ from it",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of training, for each arm (default 60)"
    )
    parser.add_argument("--steps", type=int, help="of each arm, instead of --seconds")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="any setting"
    )
    parser.add_argument("--prompts", nargs="+", default=[], metavar="FILE", help="as mimo eval's")
    parser.add_argument("--count", type=int, default=100, help="prompts (default 100)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (default 256)")
    parser.add_argument(
        "--contexts", nargs="*", type=int, default=[], metavar="N", help="as mimo eval's"
    )
    parser.add_argument("--experts", default="auto", help="auto, packed or dequantized")
    parser.add_argument(
        "--until", type=float, default=0.0, metavar="S",
        help="begin no arm that is expected to end later than after S seconds (default 0: never)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")


def main(options: argparse.Namespace) -> int:
    """Trains and measures what is missing, and prints the table and the line of JSON."""
    if options.target is not None:
        if options.recipe is None or not options.prompts:
            raise MimoError("--target is given without --recipe or --prompts: name both.")
        run_arms(options)
    records = read_arms(options.runs)
    result = {"benchmark": "drafter", **environment(), "arms": records}
    if not options.json:
        _print_tables(records)
    print_json(result)
    return 0


def run_arms(options: argparse.Namespace) -> None:
    """Trains and measures the arms that are not finished, as long as there is time."""
    start = time.monotonic()
    base = configuration(options.recipe, options.set, options.target, options.runs / PROBE)
    steps = options.steps or steps_for(base, options.seconds)
    own = base.drafter.own_from
    if not own and base.drafter.answers != "data":
        _probe(base)
        own = base.run.out
    spent = [0.0]
    for name in options.arms or default_arms(base):
        done = options.runs / f"{name}.json"
        if done.exists():
            continue
        begin = time.monotonic()
        if options.until and begin - start + max(spent) > options.until:
            print(f"{name} and what follows is not done: the time is up.", file=sys.stderr)
            return
        sets = [*options.set, *ARMS[name], f"run.steps={steps}"]
        config = configuration(options.recipe, sets, options.target, options.runs / name)
        if own and config.drafter.answers != "data":
            drafter = dataclasses.replace(config.drafter, own_from=own)
            config = dataclasses.replace(config, drafter=drafter)
        record = run_arm(name, config, options)
        write_atomically(done, (json.dumps(record, indent=1) + "\n").encode())
        spent.append(time.monotonic() - begin)


def default_arms(base: TrainConfig) -> list[str]:
    """The recipe, and what differs from it."""
    fields = to_dict(base)

    def changes(setting: str) -> bool:
        name, wanted = setting.split("=")
        section, field = name.split(".")
        return str(fields[section][field]) != wanted

    return [name for name in DEFAULT if not ARMS[name] or any(map(changes, ARMS[name]))]


def configuration(recipe: Path, overrides: Sequence[str], target: str, out: Path) -> TrainConfig:
    """The settings of one run on a target."""
    config = load_config(recipe, [*overrides, f"run.out={out}"])
    model = dataclasses.replace(config.model, start=target, preset="", shape={})
    return dataclasses.replace(config, model=model)


def _probe(config: TrainConfig) -> None:
    """The short first run, if it has not been: speed, and the target's own answers."""
    run = dataclasses.replace(
        config.run, steps=PROBED, stop_at=PROBED // 2, eval_every=0, save_every=PROBED
    )
    records = Path(config.run.out) / "metrics.jsonl"
    if not records.exists() or len(read_metrics(records)) < PROBED // 2:
        train("drafter", dataclasses.replace(config, run=run))


def steps_for(config: TrainConfig, seconds: float) -> int:
    """Steps that fit into so many seconds, in fifties, by the probe's speed."""
    _probe(config)
    known = [r["step_s"] for r in read_metrics(config.run.out) if "step_s" in r]
    return max(50, int(seconds / statistics.median(known[len(known) // 2 :])) // 50 * 50)


def run_arm(name: str, config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Trains an arm and measures it."""
    train("drafter", config)
    folder = Path(config.run.out)
    records = [r for r in read_metrics(folder) if "loss" in r]
    heldout = [r for r in read_metrics(folder) if "heldout_acceptance" in r]
    times = [r["step_s"] for r in records if "step_s" in r]
    return {
        "arm": name,
        "sets": ARMS[name],
        "steps": len(records),
        "tokens": sum(r["tokens"] for r in records),
        "seconds": records[-1]["seconds"],
        "step_s": statistics.median(times) if times else None,
        "heldout": heldout[-1] if heldout else {},
        "acceptance": accept(folder / CHECKPOINT, config, options),
        "recipe": to_dict(config),
    }


def accept(folder: Path, config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Acceptance on the prompts, greedily, and by context length."""
    devices = config.run.devices or 1
    with mimo_jax.load(folder, devices=devices, experts=options.experts) as engine:
        return acceptance_report(
            engine,
            read_prompts(options.prompts, options.count),
            config.data.heldout,
            max_tokens=options.max_tokens,
            temperatures=[0.0],
            contexts=options.contexts,
            count=options.count,
        )


def read_arms(runs: Path) -> list[dict[str, Any]]:
    """The results of the arms that are finished.

    Raises:
      MimoError: if there is none.
    """
    paths = [runs / f"{name}.json" for name in ARMS]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    if not records:
        raise MimoError(
            f"{runs} holds no result of an arm: train some, --target DIR --recipe FILE."
        )
    return records


def _print_tables(records: Sequence[dict[str, Any]]) -> None:
    titles = ("arm", "steps", "tokens a round", "without repeats", "prompt lookup", "likewise")
    rows = [
        (r["arm"], r["steps"], *(r["acceptance"]["by_temperature"]["0"][c] for c in COLUMNS))
        for r in records
    ]
    print_table("Drafters, greedy, held-out prompts", titles, rows)
    contexts = list(dict.fromkeys(c for r in records for c in r["acceptance"]["by_context"]))
    if contexts:
        rows = [
            (
                r["arm"],
                *(r["acceptance"]["by_context"].get(c, {}).get(COLUMNS[0], "") for c in contexts),
            )
            for r in records
        ]
        print_table("Tokens a round by context", ("arm", *contexts), rows)
