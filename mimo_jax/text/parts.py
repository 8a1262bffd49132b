"""Text in which control tokens and what people wrote cannot be taken for one another.

A rendered conversation is a list of parts: control tokens, and stretches of text. Only the parts
that a format or a template itself put there are control tokens, so that "<|im_end|>" in a
message's content is encoded as the ten characters that it is.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mimo_jax.text.tokenizer import Tokenizer


class Part(NamedTuple):
    """A control token by its text, or a stretch of text."""

    text: str
    control: bool = False


def merge(parts: Iterable[Part]) -> list[Part]:
    """The same without empty parts, and with neighbouring stretches of text as one."""
    merged: list[Part] = []
    for part in parts:
        if not part.control and merged and not merged[-1].control:
            merged[-1] = Part(merged[-1].text + part.text)
        elif part.text:
            merged.append(part)
    return merged


def split(text: str, controls: Iterable[str]) -> list[Part]:
    """The parts of a text in which every control token that is spelled is one."""
    longest_first = sorted(controls, key=len, reverse=True)
    if not longest_first:
        return merge([Part(text)])
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return merge(Part(piece, index % 2 == 1) for index, piece in enumerate(pieces))


def encode(parts: Iterable[Part], tokenizer: Tokenizer) -> list[int]:
    """Token ids of parts.

    Control tokens that the tokenizer lacks are text; text never becomes a control token.
    """
    known = (Part(p.text, p.control and p.text in tokenizer.control_ids) for p in parts)
    ids: list[int] = []
    for part in merge(known):
        if part.control:
            ids.append(tokenizer.control_ids[part.text])
        else:
            ids += tokenizer.encode_literal(part.text)
    return ids


def decode(ids: Sequence[int], tokenizer: Tokenizer) -> list[Part]:
    """The parts that token ids spell; bytes that are not UTF-8 become U+FFFD.

    Ids of a padded vocabulary that the tokenizer lacks are left out.
    """
    names = {id: text for text, id in tokenizer.control_ids.items()}
    parts: list[Part] = []
    run: list[int] = []
    for id in [*ids, None]:
        if id is not None and id not in names:
            if id < tokenizer.vocab_size:
                run.append(id)
            continue
        parts.append(Part(tokenizer.decode(run)))
        run = []
        if id is not None:
            parts.append(Part(names[id], True))
    return merge(parts)


def remainder(held: Sequence[Part], wanted: Sequence[Part]) -> list[Part] | None:
    """What must follow the held parts to make the wanted ones; None if they do not begin so.

    Both must be merged.
    """
    if not held:
        return list(wanted)
    *before, last = held
    if len(wanted) < len(held) or list(wanted[: len(before)]) != before:
        return None
    match = wanted[len(before)]
    if match == last:
        return list(wanted[len(held) :])
    if last.control or match.control or not match.text.startswith(last.text):
        return None
    return [Part(match.text[len(last.text) :]), *wanted[len(held) :]]
