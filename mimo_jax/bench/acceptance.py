"""Acceptance lengths of finished answers: measured, without repetition, and of prompt lookup."""

from collections.abc import Sequence

import numpy as np

REPEATED = 16
"""Tokens of a span that counts as repeated when it has been there before."""
_BEFORE, _AFTER = 4, 3
"""Tokens before a round's first, and from it on, that are the same elsewhere if it copies."""


def repeated_tokens(tokens: Sequence[int], prompt: int, span: int = REPEATED) -> np.ndarray:
    """Which answer tokens lie in a span that occurred earlier, in the prompt or in the answer.

    Args:
      tokens: prompt and answer.
      prompt: tokens of the prompt.
      span: its length.

    Returns:
      bool [len(tokens) - prompt].
    """
    seen: set[tuple[int, ...]] = set()
    repeated = np.zeros(len(tokens), bool)
    for end in range(span, len(tokens) + 1):
        window = tuple(tokens[end - span : end])
        if window in seen:
            repeated[end - span : end] = True
        seen.add(window)
    return repeated[prompt:]


def acceptance(rounds: Sequence[Sequence[int]], keep: Sequence[np.ndarray] | None = None) -> float:
    """Tokens a round, over several answers.

    Without some of its tokens a round counts in part: a token of a round of n is 1/n of it.

    Args:
      rounds: for each answer, the round that emitted each token.
      keep: for each answer, which tokens count; all by default.
    """
    kept = spent = 0.0
    for index, numbers in enumerate(rounds):
        numbers = np.asarray(numbers)
        counts = np.bincount(numbers)[numbers]
        mask = np.ones(len(numbers), bool) if keep is None else keep[index]
        kept += mask.sum()
        spent += (1 / counts[mask]).sum()
    return kept / spent if spent else float("nan")


def rounds_by_source(
    tokens: Sequence[int], prompt: int, rounds: Sequence[int], reach: int | None
) -> dict[str, list[int]]:
    """Tokens of each round, by where the text that it continues stood before.

    A round copies if the four tokens before it and the three from its first on occurred together
    earlier. With fewer left in the answer it cannot be told, and the round is left out.

    Args:
      tokens: prompt and answer.
      prompt: tokens of the prompt.
      rounds: the round that emitted each token of the answer.
      reach: how many tokens back the drafter sees; None: all.

    Returns:
      "near": of rounds that copy from within reach, the four tokens included; "far": of those that
      copy from beyond it alone; "new": of all others.
    """
    spans: dict[tuple[int, ...], int] = {}
    found: dict[str, list[int]] = {"near": [], "far": [], "new": []}
    indexed = 0
    starts = [i for i, number in enumerate(rounds) if i == 0 or rounds[i - 1] != number]
    for start, stop in zip(starts, [*starts[1:], len(rounds)], strict=True):
        place = prompt + start
        # Spans whose last token stands before the round.
        for end in range(max(indexed, _BEFORE + _AFTER), place + 1):
            spans[tuple(tokens[end - _BEFORE - _AFTER : end])] = end - _AFTER
        indexed = place + 1
        if place + _AFTER > len(tokens):
            continue
        there = spans.get(tuple(tokens[max(0, place - _BEFORE) : place + _AFTER]))
        far = there is not None and reach is not None and place - there + _BEFORE > reach
        found["new" if there is None else "far" if far else "near"].append(stop - start)
    return found


def prompt_lookup_rounds(
    tokens: Sequence[int], prompt: int, block: int, longest: int = 3
) -> list[int]:
    """The rounds that a prompt-lookup drafter would have taken for the same answer.

    It drafts what followed the newest earlier occurrence of the last n tokens, for the largest n
    up to `longest` that occurred. The answer is the target's whatever the drafter, so that
    replaying it gives the drafter's acceptance exactly.

    Args:
      tokens: prompt and answer.
      prompt: tokens of the prompt.
      block: rows of a verified block: up to block - 1 drafts.
      longest: n-gram to begin with.

    Returns:
      the round of each answer token.
    """
    last: dict[tuple[int, ...], int] = {}
    indexed = 0
    rounds: list[int] = []
    number, length = 0, prompt
    while length < len(tokens):
        # Index n-grams that end strictly before the newest token.
        for end in range(indexed + 1, length):
            for n in range(1, longest + 1):
                if end >= n:
                    last[tuple(tokens[end - n : end])] = end
        indexed = max(indexed, length - 1)
        drafts: Sequence[int] = ()
        for n in range(longest, 0, -1):
            place = last.get(tuple(tokens[length - n : length])) if length >= n else None
            if place is not None:
                drafts = tokens[place : min(place + block - 1, length)]
                break
        accepted = 0
        while accepted < len(drafts) and length + accepted < len(tokens):
            if drafts[accepted] != tokens[length + accepted]:
                break
            accepted += 1
        emitted = min(accepted + 1, len(tokens) - length)
        rounds += [number] * emitted
        length += emitted
        number += 1
    return rounds
