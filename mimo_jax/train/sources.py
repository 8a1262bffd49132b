"""What is trained on: text, chats and token files, tokenised once into arrays that rows are cut of.

Kinds, by how a file's name ends: `.jsonl` has an object a line, {"text": ...} or {"messages":
[{"role": ..., "content": ...}]}; `.npy` has token ids, one-dimensional; `.txt.xz` is an archive of
`mimo_jax.train.corpus`; everything else is UTF-8 text, a document a file. In a chat the loss is on
what the assistant says; everywhere else on every token.
"""

import dataclasses
import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Shaped

from mimo_jax.checkpoint.manifest import write_atomically
from mimo_jax.errors import MimoError
from mimo_jax.json_files import parse_json
from mimo_jax.text.tokenizer import Tokenizer
from mimo_jax.train.corpus import SEPARATOR, read_archive

TURN, END = "<|im_start|>", "<|im_end|>"
ANSWERS = "assistant"
TOGETHER = 1000
"""Documents that are tokenised at once."""

Chat = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Documents one after another, each ended by <|endoftext|>.

    Attributes:
      ids: uint16 or, for larger vocabularies, uint32, [n].
      trained: whether each is to be predicted, [n].
    """

    ids: Shaped[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]

    def rows(self, length: int) -> "Rows":
        """Rows of that many tokens."""
        return Rows(self, length)


class Rows:
    """Tokens cut into rows, read by index: {"tokens": int32 [t], "trained": bool [t]}.

    What does not fill the last row is left out, and rows in which nothing is to be predicted.
    """

    def __init__(self, tokens: Tokens, length: int):
        self.length, count = length, len(tokens.ids) // length
        self._ids = tokens.ids[: count * length].reshape(count, length)
        self._trained = tokens.trained[: count * length].reshape(count, length)
        # A row's first token is given, not predicted.
        self._kept = np.flatnonzero(self._trained[:, 1:].any(axis=1))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        place = self._kept[index]
        return {"tokens": self._ids[place].astype(np.int32), "trained": self._trained[place]}

    def table(self) -> Int32[np.ndarray, "n t"]:
        """All rows."""
        return self._ids[self._kept].astype(np.int32)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that names and patterns stand for, each pattern's in order.

    Raises:
      MimoError: for one that stands for none, or a folder.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        paths = paths or [Path(pattern)]
        for path in paths:
            if path.is_dir() and len(paths) == 1:
                raise MimoError(f"{path} is a folder: name its files, such as '{path}/*.txt'.")
            if not path.exists():
                raise MimoError(f"{path} does not exist: data are named from where mimo is run.")
        found |= dict.fromkeys(path for path in paths if path.is_file())
    return list(found)


def read_documents(path: Path) -> Iterator[str | Chat]:
    """A file's documents: texts and chats.

    Raises:
      MimoError: if it is no text, or a line of JSONL is neither a text nor a chat.
    """
    if path.name.endswith(".xz"):
        yield from read_archive(path)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MimoError(f"{path} is not UTF-8 text ({error}): convert it first.") from None
    except OSError as error:
        raise MimoError(f"{path} cannot be read: {error.strerror}.") from None
    if path.suffix != ".jsonl":
        yield from (part for part in text.split(SEPARATOR) if part)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _record(parse_json(line.encode(), f"{path}, line {number}"), path, number)


def _record(record: dict[str, Any], path: Path, number: int) -> str | Chat:
    if isinstance(record.get("text"), str):
        return record["text"]
    messages = record.get("messages")
    if isinstance(messages, list) and all(
        isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
        for m in messages
    ):
        return messages
    raise MimoError(
        f"{path}, line {number} has the keys {sorted(record)}: it must have a text, or messages "
        "with role and content."
    )


def texts_of(paths: Iterable[Path]) -> Iterator[str]:
    """All text in the files, chats' contents included: what a tokenizer is trained on."""
    for path in paths:
        if path.suffix != ".npy":
            for document in read_documents(path):
                texts = (
                    [document] if isinstance(document, str) else [m["content"] for m in document]
                )
                yield from texts


def tokenise(paths: Sequence[Path], tokenizer: Tokenizer) -> Tokens:
    """All files' documents as tokens, one after another.

    Raises:
      MimoError: for a file that cannot be read, ids outside of the vocabulary, or a chat whose
        tokenizer lacks the tokens that mark turns.
    """
    dtype = _id_dtype(tokenizer)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for path in paths:
        if path.suffix == ".npy":
            parts.append(_read_ids(path, tokenizer.vocab_size, dtype))
            continue
        parts += _parts(read_documents(path), tokenizer, dtype)
    return _joined(parts, dtype)


def pack(documents: Iterable[str | Chat], tokenizer: Tokenizer) -> Tokens:
    """Documents as tokens, one after another.

    Raises:
      MimoError: as `tokenise`.
    """
    dtype = _id_dtype(tokenizer)
    return _joined(_parts(documents, tokenizer, dtype), dtype)


def _id_dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _joined(parts: list[tuple[np.ndarray, np.ndarray]], dtype) -> Tokens:
    if not parts:
        return Tokens(np.zeros(0, dtype), np.zeros(0, bool))
    ids, trained = zip(*parts, strict=True)
    return Tokens(np.concatenate(ids), np.concatenate(trained))


def _parts(
    documents: Iterable[str | Chat], tokenizer: Tokenizer, dtype
) -> list[tuple[np.ndarray, np.ndarray]]:
    return [p for some in _batches(documents, TOGETHER) for p in _encode(some, tokenizer, dtype)]


def _encode(documents: list, tokenizer: Tokenizer, dtype) -> list[tuple[np.ndarray, np.ndarray]]:
    texts = [document for document in documents if isinstance(document, str)]
    encoded = iter(tokenizer.encode_batch(texts))
    parts = []
    for document in documents:
        if isinstance(document, str):
            ids = [*next(encoded), tokenizer.end_of_text_id]
            parts.append((np.array(ids, dtype), np.ones(len(ids), bool)))
        else:
            ids, trained = encode_chat(document, tokenizer)
            parts.append((np.array(ids, dtype), np.array(trained, bool)))
    return parts


def encode_chat(messages: Chat, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """A chat's tokens, and which are the assistant's words: its content and the end of its turn.

    Turns are written as <|im_start|>role, a line's end, the content, <|im_end|>, a line's end.

    Raises:
      MimoError: if the tokenizer lacks these tokens.
    """
    missing = [name for name in (TURN, END) if name not in tokenizer.special_ids]
    if missing:
        raise MimoError(
            f"The tokenizer has no {', '.join(missing)}, which mark the turns of a chat: use one "
            "that has, or write the chats as texts."
        )
    start, end = tokenizer.special_ids[TURN], tokenizer.special_ids[END]
    ids: list[int] = []
    trained: list[bool] = []
    for message in messages:
        head = [start, *tokenizer.encode(f"{message['role']}\n")]
        said = [*tokenizer.encode(message["content"]), end]
        tail = tokenizer.encode("\n")
        ids += [*head, *said, *tail]
        own = message["role"] == ANSWERS
        trained += [False] * len(head) + [own] * len(said) + [False] * len(tail)
    return [*ids, tokenizer.end_of_text_id], [*trained, False]


def _read_ids(path: Path, vocabulary: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise MimoError(f"{path} is not a .npy file of numbers ({error}).") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise MimoError(f"{path} is {ids.dtype}{list(ids.shape)}: it must be whole numbers, [n].")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise MimoError(
            f"{path} has ids {ids.min()} to {ids.max()}; the vocabulary has 0 to {vocabulary - 1}: "
            "use the tokenizer that made them."
        )
    return ids.astype(dtype), np.ones(len(ids), bool)


def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch: list = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def prepare(patterns: Sequence[str], tokenizer_file: Path, folder: Path, name: str) -> Tokens:
    """The files' tokens, kept in a folder so that a run that goes on has the same ones.

    Args:
      patterns: names of files.
      tokenizer_file: a tokenizer.json, the model's.
      folder: to keep them in.
      name: of what they are for.

    Raises:
      MimoError: as `tokenise`; or if the files are not those that the run began with.
    """
    paths = find_files(patterns)
    fingerprint = _fingerprint({str(p): p for p in paths} | {"tokenizer": tokenizer_file})
    kept = folder / f"{name}.json"
    if kept.exists():
        if _hashes(kept) != list(fingerprint.values()):
            raise MimoError(
                f"The files of data.{name} or the tokenizer have changed since the run began "
                f"({kept} has their hashes): start another run, or put them back."
            )
    else:
        tokens = tokenise(paths, Tokenizer.from_file(tokenizer_file))
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", tokens.ids)
        if not tokens.trained.all():
            np.save(folder / f"{name}-trained.npy", tokens.trained)
        write_atomically(kept, (json.dumps(fingerprint, indent=1) + "\n").encode())
    ids = np.load(folder / f"{name}.npy", mmap_mode="r")
    mask = folder / f"{name}-trained.npy"
    trained = np.load(mask, mmap_mode="r") if mask.exists() else np.broadcast_to(True, ids.shape)
    return Tokens(ids, trained)


def same_data(folder: Path, other: Path, name: str = "files") -> bool:
    """Whether two runs' folders of data were made of the same files with the same tokenizer."""
    paths = [place / f"{name}.json" for place in (folder, other)]
    return all(path.exists() for path in paths) and _hashes(paths[0]) == _hashes(paths[1])


def _fingerprint(paths: dict[str, Path]) -> dict[str, str]:
    hashes = {}
    for name, path in paths.items():
        with path.open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return hashes


def _hashes(kept: Path) -> list[str]:
    """What was hashed, wherever it lay then."""
    return list(json.loads(kept.read_text()).values())
