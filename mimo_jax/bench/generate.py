"""Benchmark of generation: acceptance on held-out prompts, and speed with and without drafting."""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mimo_jax
from mimo_jax.bench.acceptance import acceptance, prompt_lookup_rounds, repeated_tokens
from mimo_jax.bench.card import environment, print_json, print_table
from mimo_jax.errors import MimoError

SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo bench generate`."""
    parser.add_argument("--model", default="checkpoints/mimo-nano", help="a checkpoint's directory")
    parser.add_argument(
        "--prompts", type=Path, help="JSONL with a text a line; the model's by default"
    )
    parser.add_argument("--count", type=int, default=100, help="prompts (default 100)")
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="tokens an answer (default 256)"
    )
    parser.add_argument("--devices", type=int, default=1, help="devices to divide the model over")
    parser.add_argument("--experts", default="auto", help="auto, packed or dequantized")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes over the prompts")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")


def read_prompts(path: Path, count: int) -> list[str]:
    """The first `count` prompts of a JSONL file.

    Raises:
      MimoError: if there are fewer, or one has no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise MimoError(f"{path} does not exist: give --prompts, a JSONL file of texts.") from None
    try:
        prompts = [json.loads(line)["text"] for line in lines[:count]]
    except (ValueError, KeyError, TypeError):
        raise MimoError(f"{path} has a line that is no object with a text.") from None
    if len(prompts) < count:
        raise MimoError(f"{path} has {len(prompts)} prompts, and --count={count}: give fewer.")
    return prompts


def answers(engine, prompts: Sequence[str], options: dict[str, Any]) -> list:
    """Answers prompts one by one, as a single user would meet them; no answer ends early."""
    done = []
    for index, prompt in enumerate(prompts):
        done.append(engine.generate(prompt, ignore_eos=True, **options))
        print(f"\r{index + 1}/{len(prompts)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return done


def acceptance_lengths(engine, prompts: Sequence[str], outputs: Sequence) -> dict[str, float]:
    """Tokens a round: of the drafter, of prompt lookup, and of both without repeated spans."""
    texts = [
        (len(prompt), [*prompt, *output.tokens])
        for prompt, output in zip(map(engine.tokenizer.encode, prompts), outputs, strict=True)
    ]
    fresh = [~repeated_tokens(tokens, prompt) for prompt, tokens in texts]
    rounds = [output.rounds for output in outputs]
    lookup = [prompt_lookup_rounds(tokens, prompt, engine.block) for prompt, tokens in texts]
    return {
        "dflash": acceptance(rounds),
        "dflash_without_repeats": acceptance(rounds, fresh),
        "prompt_lookup": acceptance(lookup),
        "prompt_lookup_without_repeats": acceptance(lookup, fresh),
        "repeated_share": 1 - sum(f.sum() for f in fresh) / sum(len(f) for f in fresh),
    }


def speed(
    engine, prompts: Sequence[str], options: dict[str, Any], repeats: int
) -> dict[str, float]:
    """Tokens a second over all prompts, prefill included: median and spread of timed passes."""
    answers(engine, prompts[:1], options)
    passes = []
    for _ in range(repeats):
        outputs = answers(engine, prompts, options)
        wall = sum(output.stats.wall_s for output in outputs)
        passes.append(sum(output.stats.tokens for output in outputs) / wall)
    return {
        "tokens_per_second": statistics.median(passes),
        "spread": (max(passes) - min(passes)) / statistics.median(passes),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark; returns what its JSON line holds."""
    path = options.prompts or Path(options.model) / "heldout_prompts.jsonl"
    prompts = read_prompts(path, options.count)
    common = {"devices": options.devices, "experts": options.experts}
    budget = {"max_tokens": options.max_tokens}
    engine = mimo_jax.load(options.model, **common)
    result: dict[str, Any] = {
        "benchmark": "generate",
        "model": str(options.model),
        "prompts": len(prompts),
        "max_tokens": options.max_tokens,
        "experts": engine.experts,
        "mesh": engine.devices,
        **environment(),
    }
    greedy = answers(engine, prompts, budget)
    result["greedy"] = acceptance_lengths(engine, prompts, greedy)
    result["compile_s"] = max(output.stats.compile_s for output in greedy)
    sampled = answers(engine, prompts, budget | SAMPLED)
    result["sampled"] = acceptance_lengths(engine, prompts, sampled)
    plain = answers(engine, prompts[:20], budget | {"speculative": False})
    same = sum(a.tokens == b.tokens for a, b in zip(plain, greedy, strict=False))
    result["identical_to_plain"] = f"{same}/{len(plain)}"
    timed = prompts[: max(1, len(prompts) // 5)]
    result["timed_prompts"] = len(timed)
    result["speed_dflash"] = speed(engine, timed, budget, options.repeats)
    result["speed_dflash_sampled"] = speed(engine, timed, budget | SAMPLED, options.repeats)
    engine.close()
    alone = mimo_jax.load(options.model, drafter=False, **common)
    result["speed_plain_width_1"] = speed(alone, timed, budget, options.repeats)
    alone.close()
    fast, slow = (result[f"speed_{k}"]["tokens_per_second"] for k in ("dflash", "plain_width_1"))
    result["speedup"] = fast / slow
    return result


def main(options: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables and its JSON line."""
    result = run(options)
    if not options.json:
        columns = ("tokens a round", "greedy", "temperature 1, top-p 0.95")
        rows = [
            (name, result["greedy"][name], result["sampled"][name]) for name in result["greedy"]
        ]
        print_table(f"Acceptance, {result['prompts']} prompts", columns, rows)
        speeds = [
            (name.removeprefix("speed_"), value["tokens_per_second"], value["spread"])
            for name, value in result.items()
            if name.startswith("speed_")
        ]
        title = f"Speed on {result['device']}, {result['timed_prompts']} prompts"
        print_table(title, ("", "tokens/s", "spread"), speeds)
    print_json(result)
    return 0
