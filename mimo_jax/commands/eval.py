"""Measures a model: bits per byte and accuracy on held-out text, its drafter's acceptance."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from mimo_jax.commands.model import DEFAULT_MODEL, at_least

EPILOG = """\
examples:
  mimo eval                                    # mimo-nano on its held-out text and prompts
  mimo eval --model runs/toy-drafter --text book.txt --count 8 --contexts 64 256
  mimo eval --model runs/bf16 --experts mxfp4 --rule mse    # MXFP4 after training
  mimo eval --prompts code.jsonl chat.jsonl --temperatures 0 0.7 1 --json > eval.json
"""

RULES = ("floor", "mse")
"""Those of mimo_jax.quant.mxfp4, which brings in JAX."""

COLUMNS = (
    ("acceptance_length", "tokens a round"),
    ("without_repeats", "without repeats"),
    ("prompt_lookup", "prompt lookup"),
    ("prompt_lookup_without_repeats", "likewise"),
)

SOURCES = ("near", "far", "new")
"""Rounds that copy what the drafter sees, what lies beyond it, and nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo eval`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, metavar="DIR",
        help=f"a checkpoint's or a run's folder (default {DEFAULT_MODEL})",
    )  # fmt: skip
    parser.add_argument(
        "--experts", choices=("stored", "mxfp4"), default="stored",
        help="as they are stored (default), or made MXFP4 here: on held-out text alone",
    )  # fmt: skip
    parser.add_argument(
        "--rule", choices=RULES,
        help="--experts mxfp4: how a block's shared exponent is chosen (default floor, OCP's)",
    )  # fmt: skip
    text = parser.add_argument_group("held-out text")
    text.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="default: the model's heldout.txt.xz"
    )
    text.add_argument(
        "--rows", type=at_least(1), default=128, help="rows of it, at most (default 128)"
    )
    text.add_argument(
        "--length", type=at_least(2), default=2048, help="tokens of a row, at most (default 2048)"
    )
    accept = parser.add_argument_group("acceptance")
    accept.add_argument(
        "--prompts", nargs="+", default=[], metavar="FILE",
        help="JSONL with a text, and a domain, a line; default: the model's heldout_prompts.jsonl",
    )  # fmt: skip
    accept.add_argument("--count", type=at_least(1), default=100, help="prompts (default 100)")
    accept.add_argument(
        "--max-tokens", type=at_least(1), default=256, help="of an answer (default 256)"
    )
    accept.add_argument(
        "--temperatures", nargs="+", type=float, default=[0.0], help="0, the default, is greedy"
    )
    accept.add_argument(
        "--contexts", nargs="*", type=at_least(1), default=[], metavar="N",
        help="also prompts of N tokens cut out of the text",
    )  # fmt: skip
    parser.add_argument("--devices", type=at_least(1), default=1, help="to divide over (default 1)")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")


def main(options: argparse.Namespace) -> int:
    """Measures, and prints tables and one line of JSON."""
    from mimo_jax.bench.card import environment, print_json

    result: dict[str, Any] = {"evaluation": str(options.model), **environment()}
    result |= measure(options)
    if not options.json:
        _print_tables(result)
    print_json(result)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for; a model without a drafter has no acceptance."""
    import mimo_jax
    from mimo_jax.bench.evaluate import acceptance_report, read_prompts, text_quality
    from mimo_jax.train.start import find_checkpoint

    if options.rule and options.experts != "mxfp4":
        options.usage_error(f"--rule {options.rule} is of use with --experts mxfp4 alone")
    folder = find_checkpoint(options.model)
    texts = options.text or _shipped(folder, "heldout.txt.xz")
    files = options.prompts or _shipped(folder, "heldout_prompts.jsonl")
    rule = (options.rule or RULES[0]) if options.experts == "mxfp4" else None
    result: dict[str, Any] = {"experts": options.experts} | ({"rule": rule} if rule else {})
    if texts:
        quality = {"rows": options.rows, "length": options.length, "devices": options.devices}
        result["text"] = text_quality(folder, texts, rule=rule, **quality)
    if rule is not None:
        print("With --experts mxfp4 acceptance is not measured.", file=sys.stderr)
        return result
    if not (folder / "drafter.json").exists():
        print(f"{folder} has no drafter: no acceptance to measure.", file=sys.stderr)
        return result
    with mimo_jax.load(folder, devices=options.devices) as engine:
        # Without prompts the text gives them.
        contexts = options.contexts or ([] if files else [64])
        result["acceptance"] = acceptance_report(
            engine,
            read_prompts(files, options.count) if files else [],
            texts,
            max_tokens=options.max_tokens,
            temperatures=options.temperatures,
            contexts=contexts,
            count=options.count,
        )
        result["drafter"] = dataclasses.asdict(engine.drafter)
    return result


def _shipped(folder: Path, name: str) -> list[str]:
    """A file that lies beside the model, if it does."""
    return [str(folder / name)] if (folder / name).exists() else []


def _print_tables(result: dict[str, Any]) -> None:
    from mimo_jax.bench.card import print_table

    if "text" in result:
        print_table("Held-out text", ("", "value"), list(result["text"].items()))
    for name, groups in result.get("acceptance", {}).items():
        if groups:
            words = name.replace("_", " ")
            rows = [(key, *(group[c] for c, _ in COLUMNS)) for key, group in groups.items()]
            print_table(f"Acceptance {words}", ("", *(title for _, title in COLUMNS)), rows)
            slots = max(len(group["by_position"]) for group in groups.values())
            shares = [(key, *group["by_position"]) for key, group in groups.items()]
            print_table(
                f"Share of rounds that accept draft k, {words}",
                ("", *map(str, range(1, slots + 1))),
                shares,
            )
            sources = [(key, *_source_cells(group["by_source"])) for key, group in groups.items()]
            titles = ("", *(f"{kind}, {what}" for kind in SOURCES for what in ("share", "tokens")))
            print_table(f"Rounds by where they copy from, {words}", titles, sources)


def _source_cells(sources: dict[str, dict[str, Any]]) -> list[Any]:
    """Share and acceptance length of each kind of round, in order."""
    cells = [sources[kind][name] for kind in SOURCES for name in ("share", "acceptance_length")]
    return ["" if cell is None else cell for cell in cells]
