"""What a model is worth: bits per byte of held-out text, and acceptance on prompts."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mimo_jax.bench.acceptance import (
    acceptance,
    prompt_lookup_rounds,
    repeated_tokens,
    rounds_by_source,
)
from mimo_jax.checkpoint import store
from mimo_jax.errors import MimoError
from mimo_jax.model.mimo import MiMo
from mimo_jax.sharding import make_mesh
from mimo_jax.text.tokenizer import Tokenizer
from mimo_jax.train.placing import Placing
from mimo_jax.train.pretrain import Recipe, make_evaluate
from mimo_jax.train.run import compute_dtype
from mimo_jax.train.sources import Rows, find_files, tokenise
from mimo_jax.train.tasks import batches_of, summarise

SAMPLED = {"top_p": 0.95, "seed": 0}
"""With every temperature but 0."""


def text_quality(
    folder: Path,
    files: Sequence[str],
    *,
    rows: int,
    length: int,
    devices: int,
    rule: str | None = None,
) -> dict[str, Any]:
    """Bits per byte, bits per token and accuracy of the next token on held-out text.

    Rows of `length` tokens, each from its second token on; no choice of an expert is dropped.

    Args:
      folder: of the checkpoint.
      files: of text, as `mimo train` takes them.
      rows: to measure, at most.
      length: tokens of a row; at most the model's context.
      devices: to divide the rows and the experts over.
      rule: makes MXFP4 of experts that are stored otherwise, with shared exponents so chosen.

    Raises:
      MimoError: if a file cannot be read, there is not one row, or the experts to make MXFP4 of are
        stored so already.
    """
    checkpoint = store.open_checkpoint(folder)
    if rule is not None and checkpoint.packed:
        raise MimoError(
            f"{folder} stores its experts in MXFP4 already: measure it as it is, or a checkpoint "
            "whose experts are dense."
        )
    tokenizer = Tokenizer.from_file(checkpoint.tokenizer)
    length = min(length, checkpoint.config.max_position_embeddings)
    table = tokenise(find_files(files), tokenizer).rows(length)
    if not len(table):
        raise MimoError(f"{', '.join(files)} have not one row of {length} tokens: use more text.")
    batch = devices * max(1, 4096 // (length * devices))
    placing = Placing(make_mesh(devices), batch)
    dtype = compute_dtype("auto")
    model = nnx.eval_shape(lambda: MiMo(checkpoint.config, nnx.Rngs(0), packed=False, dtype=dtype))
    graph, abstract = nnx.split(model)
    params, _ = store.load(checkpoint, (abstract, None), (placing.params(abstract), None))
    evaluate = make_evaluate(graph, Recipe(rule=rule, dtype=dtype, chunk=256))
    count = min(rows, len(table))
    sums = [
        jax.device_get(evaluate(params, given))
        for given in batches_of(table, count, batch, placing)
    ]
    size = _bytes(table, count, tokenizer)
    tokens = int(sum(float(s["tokens"]) for s in sums))
    return summarise(sums, size) | {"rows": count, "tokens": tokens, "bytes": size}


def _bytes(rows: Rows, count: int, tokenizer: Tokenizer) -> int:
    chosen = [rows[index] for index in range(count)]
    ids = [row["tokens"][1:][row["trained"][1:]] for row in chosen]
    return len(tokenizer.decode_bytes(np.concatenate(ids).tolist()))


def read_prompts(files: Sequence[str], count: int) -> list[dict[str, str]]:
    """Prompts with their domains, the domains taking turns.

    Args:
      files: JSONL with {"text": ..., "domain": ...} a line. Without a domain it is the first folder
        of "file", if there is one, else the name of the prompts' own file.
      count: of all, at most.

    Raises:
      MimoError: for a line without a text, or files without one.
    """
    queues: dict[str, list[str]] = {}
    for path in find_files(files):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                text, own = record["text"], str(record.get("file", path.stem)).split("/")[0]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise MimoError(f"{path}, line {number} is no object with a text.") from None
            queues.setdefault(str(record.get("domain", own)), []).append(text)
    prompts: list[dict[str, str]] = []
    while len(prompts) < count and any(queues.values()):
        for domain, texts in queues.items():
            if texts and len(prompts) < count:
                prompts.append({"domain": domain, "text": texts.pop(0)})
    if not prompts:
        raise MimoError(f"{', '.join(files)} hold no prompt.")
    return prompts


def cut_prompts(
    files: Sequence[str], tokenizer: Tokenizer, contexts: Sequence[int], count: int
) -> dict[int, list[list[int]]]:
    """For each context of c tokens, the c tokens before each of some places in the text.

    The places are evenly spread and the same for all contexts, so that these differ in nothing but
    how much of the text is known.

    Raises:
      MimoError: if the files have not as many tokens as the longest.
    """
    ids, longest = tokenise(find_files(files), tokenizer).ids, max(contexts)
    if len(ids) < longest:
        raise MimoError(
            f"The text has {len(ids)} tokens, a context of {longest} is asked for: use more text "
            "or a smaller one."
        )
    places = np.unique(np.linspace(longest, len(ids), count).astype(np.int64))
    return {c: [ids[place - c : place].tolist() for place in places] for c in contexts}


def answer_all(
    engine: Any, prompts: Sequence[list[int]], max_tokens: int, temperature: float
) -> list[Any]:
    """Answers, one after another; none ends early."""
    noise = SAMPLED if temperature else {}
    done = []
    for index, prompt in enumerate(prompts):
        output = engine.generate(
            prompt, max_tokens=max_tokens, temperature=temperature, ignore_eos=True, **noise
        )
        done.append(output)
        print(f"\r{index + 1}/{len(prompts)} answers", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return done


def measure(
    prompts: Sequence[Sequence[int]], outputs: Sequence[Any], block: int, reach: int | None
) -> dict[str, Any]:
    """Acceptance over several answers.

    Args:
      prompts: token ids.
      outputs: of `Engine.generate`.
      block: of the drafter.
      reach: tokens back that it sees; None: all.

    Returns:
      `acceptance_length`, tokens of a round, 1 to block, also `without_repeats`: without tokens
      inside 16-grams that were there before; the same of a `prompt_lookup` drafter that would have
      had these answers to draft; the `histogram` of rounds by the tokens that they emitted, from 0
      on; `by_position`: the share of rounds that accepted draft 1, 2, ...; `by_source`: share and
      acceptance length of rounds that copy from "near", from "far" beyond the drafter's reach, or
      nothing ("new").
    """
    texts = [(len(p), [*p, *o.tokens]) for p, o in zip(prompts, outputs, strict=True)]
    fresh = [~repeated_tokens(tokens, prompt) for prompt, tokens in texts]
    rounds = [output.rounds for output in outputs]
    lookup = [prompt_lookup_rounds(tokens, prompt, block) for prompt, tokens in texts]
    histogram = np.sum([output.stats.acceptance_histogram for output in outputs], axis=0)
    emitted_more = histogram[::-1].cumsum()[::-1]
    sources: dict[str, list[int]] = {}
    for (prompt, tokens), numbers in zip(texts, rounds, strict=True):
        for name, lengths in rounds_by_source(tokens, prompt, numbers, reach).items():
            sources.setdefault(name, []).extend(lengths)
    return {
        "answers": len(outputs),
        "tokens": sum(len(output.tokens) for output in outputs),
        "rounds": int(histogram.sum()),
        "acceptance_length": acceptance(rounds),
        "without_repeats": acceptance(rounds, fresh),
        "prompt_lookup": acceptance(lookup),
        "prompt_lookup_without_repeats": acceptance(lookup, fresh),
        "repeated_share": 1 - sum(f.sum() for f in fresh) / max(1, sum(map(len, fresh))),
        "histogram": histogram.tolist(),
        "by_position": (emitted_more[2:] / max(1, emitted_more[0])).tolist(),
        "by_source": {
            name: {
                "share": len(lengths) / max(1, sum(map(len, sources.values()))),
                "acceptance_length": sum(lengths) / len(lengths) if lengths else None,
            }
            for name, lengths in sources.items()
        },
    }


def acceptance_report(
    engine: Any,
    prompts: Sequence[dict[str, str]],
    texts: Sequence[str],
    *,
    max_tokens: int,
    temperatures: Sequence[float],
    contexts: Sequence[int],
    count: int,
) -> dict[str, Any]:
    """Acceptance on prompts by temperature and by domain, and on cut text by context length.

    Args:
      engine: with a drafter.
      prompts: of `read_prompts`; by domain, greedy, or at the first temperature.
      texts: files that contexts are cut out of.
      max_tokens: of an answer.
      temperatures: 0 is greedy.
      contexts: lengths of prompts, in tokens.
      count: prompts of each length.
    """
    report: dict[str, Any] = {"by_temperature": {}, "by_domain": {}, "by_context": {}}
    ids = [engine.tokenizer.encode(prompt["text"]) for prompt in prompts]
    drafts = engine.block, engine.drafter.reach
    for number, temperature in enumerate(temperatures if ids else ()):
        outputs = answer_all(engine, ids, max_tokens, temperature)
        report["by_temperature"][f"{temperature:g}"] = measure(ids, outputs, *drafts)
        for domain in dict.fromkeys(p["domain"] for p in prompts) if number == 0 else ():
            here = [index for index, prompt in enumerate(prompts) if prompt["domain"] == domain]
            report["by_domain"][domain] = measure(
                [ids[i] for i in here], [outputs[i] for i in here], *drafts
            )
    cut = cut_prompts(texts, engine.tokenizer, contexts, count) if texts and contexts else {}
    for context, pieces in cut.items():
        outputs = answer_all(engine, pieces, max_tokens, temperatures[0])
        report["by_context"][str(context)] = measure(pieces, outputs, *drafts)
    return report
