"""Byte-level BPE: text to token ids and back, decoding in pieces, and training a vocabulary.

A thin cover of the `tokenizers` library, for our own `tokenizer.json` and for those of the MiMo
checkpoints. Decoding goes through a table of each token's bytes, so that whole and piecewise
decoding agree on any ids, those that do not make UTF-8 included.
"""

import codecs
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mimo_jax.errors import MimoError

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|mask|>")
"""Ids 0 to 3 of a vocabulary that `train_tokenizer` makes, in this order."""

PYTHON_PIECES = (
    r"\n+[ \t]*"  # a line's end with the next one's indentation
    r"|[^\s\w]?[^\W\d]+"  # a name with the one sign before it: .append (self _private
    r"| ?[^\W\d]+"
    r"|\d"
    r"| ?[^\s\w]+"
    r"|[ \t]+(?=\S)|\s+"
)
"""What a token may span, a regular expression. Digits stand alone."""


class Tokenizer:
    """Text to ids and back.

    Attributes:
      special_ids: the id of each special token by its text.
      control_ids: likewise, with those that the vocabulary was extended by and that count as text:
        in the MiMo tokenizers <think>, <tool_call> and others.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """Covers a byte-level tokenizer of the `tokenizers` library.

        Raises:
          MimoError: if it is not byte-level.
        """
        if "ByteLevel" not in repr(backend.decoder):
            raise MimoError(
                f"The tokenizer's decoder is {backend.decoder!r}; a byte-level one is needed, such "
                "as the MiMo checkpoints have or `mimo_jax.text.tokenizer.train_tokenizer` makes."
            )
        # A copy, as the backend's flag for special tokens in text is a state of the whole object.
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self.special_ids = {t.content: id for id, t in added.items() if t.special}
        self.control_ids = {t.content: id for id, t in added.items()}
        self._bytes = _bytes_of_tokens(backend)
        self._spelled = list(self._bytes)
        for text, id in self.control_ids.items():
            self._spelled[id] = text.encode()

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json`.

        Raises:
          MimoError: if there is none, or if it cannot be read.
        """
        path = Path(path)
        if not path.is_file():
            raise MimoError(f"No tokenizer at {path}: a checkpoint's folder has a tokenizer.json.")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except MimoError:
            raise
        except Exception as error:  # The library raises bare Exceptions.
            raise MimoError(
                f"{path} is not a tokenizer that the tokenizers library reads ({error}); "
                "copy it anew."
            ) from None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self._bytes)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: of <|endoftext|> and <|im_end|>, those that there are."""
        return tuple(
            self.special_ids[t] for t in (END_OF_TEXT, "<|im_end|>") if t in self.special_ids
        )

    @property
    def end_of_text_id(self) -> int:
        """The id that stands between documents."""
        return self._special(END_OF_TEXT)

    @property
    def mask_id(self) -> int:
        """The id of a position that the drafter is to fill."""
        return self._special("<|mask|>")

    def _special(self, text: str) -> int:
        if text not in self.special_ids:
            raise MimoError(f"The tokenizer has no {text}; it has {sorted(self.special_ids)}.")
        return self.special_ids[text]

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """The text's ids.

        Args:
          text: any text.
          specials: whether special tokens spelled in the text become their ids, as in a chat
            template; otherwise they are text like any other.
        """
        backend = self._backend if specials else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def encode_literal(self, text: str) -> list[int]:
        """The text's ids, none of them in `control_ids`, whatever is spelled in the text."""
        return self._literal.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """The tokenizer without the tokens of `control_ids`; made when first needed."""
        parts = json.loads(self._backend.to_str())
        parts |= {"added_tokens": [], "post_processor": None}
        # Vocabularies that we train hold them as words too.
        vocabulary = parts["model"]["vocab"]
        for text in self.control_ids:
            vocabulary.pop(text, None)
        return tokenizers.Tokenizer.from_str(json.dumps(parts))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The ids' text, special tokens left out; bytes that are not UTF-8 become U+FFFD.

        Raises:
          MimoError: if an id is outside of the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], controls: bool = False) -> bytes:
        """The ids' bytes.

        Args:
          ids: of tokens.
          controls: whether special tokens are spelled out, instead of left out.

        Raises:
          MimoError: if an id is outside of the vocabulary.
        """
        table = self._spelled if controls else self._bytes
        return b"".join(_entry(table, id) for id in ids)


class Detokenizer:
    """Decodes ids as they come; the pieces together are the text of all ids."""

    def __init__(self, tokenizer: Tokenizer, controls: bool = False):
        """Starts at the beginning of a text, with special tokens spelled out or left out."""
        self._tokenizer, self._controls = tokenizer, controls
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; the bytes of an unfinished character are kept back."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids, self._controls))

    def finish(self) -> str:
        """What was kept back: "" or U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _entry(table: list[bytes], id: int) -> bytes:
    if not 0 <= id < len(table):
        raise MimoError(f"Token id {id} is not in the vocabulary: 0 to {len(table) - 1}.")
    return table[id]


def train_tokenizer(texts: Iterator[str], vocab_size: int = 3072) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE for Python source.

    Args:
      texts: what to count pairs in.
      vocab_size: tokens in all: 4 special ones (ids 0 to 3), 256 bytes and merges.

    Raises:
      MimoError: if the texts have not enough different pairs for so many tokens.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(tokenizers.Regex(PYTHON_PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise MimoError(
            f"The texts gave a vocabulary of {backend.get_vocab_size()} tokens, not {vocab_size}: "
            "train on more text or ask for fewer."
        )
    return backend


def _bytes_of_tokens(backend: tokenizers.Tokenizer) -> list[bytes]:
    """Each id's bytes; none for special tokens and for ids that no token has."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = backend.get_added_tokens_decoder()
    size = 1 + max([*vocabulary.values(), *added])
    table = [b""] * size
    byte_of = _byte_of_character()
    for token, id in vocabulary.items():
        table[id] = bytes(byte_of[character] for character in token if character in byte_of)
    for id, token in added.items():
        table[id] = b"" if token.special else token.content.encode()
    return table


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Bytes that print in Latin-1 stand for themselves; the others, in order, are U+0100 and on.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(b): b for b in printing} | {chr(0x100 + i): b for i, b in enumerate(others)}
