"""Tokenizers for tests of conversations: one with the ids of the releases, and a small one."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mimo_jax.text.tokenizer import Tokenizer, train_tokenizer

WORDS = {
    "system": 8948,
    "\n": 198,
    "You": 2610,
    " are": 525,
    " Mi": 20740,
    "Mo": 25612,
    ",": 11,
    " a": 264,
    " helpful": 10950,
    " AI": 15235,
    " assistant": 17847,
    " engineered": 44936,
    " by": 553,
    " Xiaomi": 71449,
    ".": 13,
    "user": 872,
    "Hello": 9707,
    "assistant": 77091,
}
SPECIAL = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"}
MARKUP = {
    151657: "<tool_call>",
    151658: "</tool_call>",
    151665: "<tool_response>",
    151666: "</tool_response>",
    151667: "<think>",
    151668: "</think>",
}
BASE = 151643
"""Tokens before the added ones."""


def _characters(text: str) -> str:
    """A text in the characters that stand for its bytes."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[
        0
    ][0]


def mimo_ids() -> Tokenizer:
    """A byte-level tokenizer with the releases' ids for a few words, and for the added tokens."""
    vocabulary = {_characters(word): id for word, id in WORDS.items()}
    free = iter(sorted(set(range(BASE)) - set(WORDS.values())))
    others = {*pre_tokenizers.ByteLevel.alphabet(), _characters(" M")} - set(vocabulary)
    vocabulary |= {other: next(free) for other in sorted(others)}
    for id in free:
        vocabulary[f"unused {id}"] = id
    space = _characters(" ")
    merges = [(space, "M"), (f"{space}M", "i"), ("M", "o")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    words = pre_tokenizers.Split(tokenizers.Regex(r" ?\p{L}+|\n+|[^\s\p{L}]|\s"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    backend.decoder = decoders.ByteLevel()
    parts = json.loads(backend.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    named = SPECIAL | MARKUP
    parts["added_tokens"] = [
        {"id": id, "content": named.get(id, f"<|unused_{id}|>"), "special": id not in MARKUP}
        | flags
        for id in range(BASE, max(named) + 1)
    ]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parts)))


def small(*added: str) -> Tokenizer:
    """A trained tokenizer: special tokens are 0 to 3, markup and what is asked for come last."""
    words = ["system user assistant tool function parameter", "def add(a, b): return a + b  \n\n"]
    backend = train_tokenizer(iter(words), vocab_size=295)
    tokens = [*MARKUP.values(), *added]
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in tokens])
    return Tokenizer(backend)
