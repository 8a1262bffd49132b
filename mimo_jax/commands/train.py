"""Trains a target, a target that lives with MXFP4 (qat), or a drafter; goes on where it stopped."""

import argparse
import dataclasses
import json
from pathlib import Path

from mimo_jax.train.config import load_config, to_toml

EPILOG = """\
examples:
  mimo train target --recipe checkpoints/toy.toml --data book.txt --out runs/toy
  mimo train qat --set model.start=runs/toy --data book.txt --out runs/toy-qat
  mimo train drafter --recipe checkpoints/toy.toml --target runs/toy --data book.txt \\
    --out runs/toy-drafter

The run's folder gets recipe.toml (all settings), metrics.jsonl, steps/ (checkpoints to go on from)
and, at the end, checkpoint/, which mimo generate --model opens. The same command goes on with a run
that was interrupted. --show prints all settings.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo train`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "kind", choices=("target", "qat", "drafter"), help="pre-train, train for MXFP4, draft"
    )
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="a TOML file of settings")
    parser.add_argument(
        "--data", action="append", metavar="FILE", help="to train on (data.files); may be repeated"
    )
    parser.add_argument(
        "--heldout", action="append", metavar="FILE", help="to measure on (data.heldout); likewise"
    )
    parser.add_argument("--out", metavar="DIR", help="the run's folder (run.out)")
    parser.add_argument(
        "--target", metavar="DIR", help="drafter: a checkpoint's or a run's folder (model.start)"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="divide over N (run.devices)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="any setting"
    )
    parser.add_argument("--show", action="store_true", help="print the settings, and do no more")


def main(options: argparse.Namespace) -> int:
    """Runs the training; prints how it ended as one line of JSON."""
    config = load_config(options.recipe, options.set)
    data = {"files": options.data, "heldout": options.heldout}
    run = {"out": options.out, "devices": options.devices}
    config = dataclasses.replace(
        config,
        data=_given(config.data, {name: value and tuple(value) for name, value in data.items()}),
        run=_given(config.run, run),
    )
    if options.target is not None:
        # A recipe for target and drafter has the target's shapes, which its checkpoint brings too.
        model = dataclasses.replace(config.model, start=options.target, preset="", shape={})
        config = dataclasses.replace(config, model=model)
    if options.show:
        print(to_toml(config), end="")
        return 0
    from mimo_jax.train.tasks import train

    result = train(options.kind, config)
    record = dataclasses.asdict(result)
    record["checkpoint"] = result.checkpoint and str(result.checkpoint)
    print(json.dumps(record))
    return 0


def _given(section, values):
    """A section with the values that were given on the command line."""
    return dataclasses.replace(section, **{k: v for k, v in values.items() if v is not None})
