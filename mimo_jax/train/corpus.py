"""Builds the training corpus: Python source of the standard library and of pinned packages.

    python -m mimo_jax.train.corpus --out .corpus

The packages of `corpus_sources` are downloaded as wheels with pip, read as archives and never
installed. Written to the folder: `train.txt.xz` and `heldout.txt.xz` (documents joined by a zero
byte, which none contains), `heldout_files.json` (where its documents come from) and `manifest.json`
(versions, licences, hashes, sizes). The same wheels and the same Python give the same bytes.

Steps: whole files are chosen by path, size and look; their licence headers go; exact copies go;
each package is limited to one size, found so that all reach the budget; near copies go; and what
shares 13 consecutive words with the held-out packages is cut out, so that no document of the
training text has a run of 13 words that one of the held-out text has.
"""

import argparse
import dataclasses
import email.parser
import hashlib
import json
import lzma
import platform
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt64

from mimo_jax.errors import MimoError
from mimo_jax.train.corpus_sources import (
    ALLOWED_LICENCES,
    HELD_OUT,
    REFUSED_LICENCES,
    TRAINING,
)

SEPARATOR = "\0"
WHEEL_PYTHON = "3.13"
"""Wheels are taken for this Python: they are only read, and some have none for 3.11 any more."""

MAX_FILE = 200_000
MAX_LINE = 500
MAX_DIGITS = 0.12
MAX_FOREIGN = 0.05
MIN_DOCUMENT = 200
NGRAM = 13
NEAR_COPY = 0.5
"""A file is a near copy when at least this share of its sampled 13-grams was seen before."""
MAX_OVERLAP = 0.3
"""A file that shares more than this share of its lines with held-out text is dropped whole."""

_LEFT_OUT = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|_vendored|extern(als?)?|_externals?|third_?party|_?bundled"
    r"|site-packages|blib2to3|lib2to3|pgen2|locale|idle_test)/|(^|/)(test_[^/]*|[^/]*_test|tests|conftest)\.py$"
)
_GENERATED = re.compile(
    r"generated (by|from|file|code|automatic)|auto-?generated|do not (edit|modify)", re.IGNORECASE
)
_LICENCE_WORDS = re.compile(r"copyright|licen[sc]e|SPDX|all rights reserved", re.IGNORECASE)
_WORD = re.compile(r"\w+", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Document:
    """A Python file: the package it comes from, its path there and its text."""

    package: str
    path: str
    text: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from: one pinned package or the standard library."""

    name: str
    version: str
    licence: str
    sha256: str | None


def download(pins: list[str], folder: Path) -> None:
    """Downloads the wheels of `name==version` pins that the folder lacks, without dependencies.

    Raises:
      MimoError: if pip cannot get one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [pin for pin in pins if find_wheel(pin, folder) is None]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", WHEEL_PYTHON, "--dest", str(folder)]
    for start in range(0, len(missing), 8):
        chosen = missing[start : start + 8]
        if subprocess.run([*command, *chosen]).returncode:
            raise MimoError(
                f"pip could not download one of {chosen} (its words are above). Check the network, "
                "or change the pin in mimo_jax/train/corpus_sources.py."
            )


def find_wheel(pin: str, folder: Path) -> Path | None:
    """The folder's wheel of a pin, if there."""
    name, version = pin.split("==")
    stem = f"{re.sub(r'[-_.]+', '_', name)}-{version}-".lower()
    found = [p for p in sorted(folder.glob("*.whl")) if p.name.lower().startswith(stem)]
    return found[0] if found else None


def read_wheel(pin: str, folder: Path) -> tuple[Source, list[Document]]:
    """Reads a downloaded wheel's metadata and its acceptable Python files.

    Raises:
      MimoError: if it is not there, or if its licence is not one of the permissive ones.
    """
    path = find_wheel(pin, folder)
    if path is None:
        raise MimoError(f"No wheel of {pin} in {folder}: run without --offline to download it.")
    name, version = pin.split("==")
    with zipfile.ZipFile(path) as archive:
        files = sorted(i.filename for i in archive.infolist() if i.file_size <= MAX_FILE)
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        licence = read_licence(archive.read(metadata).decode("utf-8", "replace"))
        check_licence(pin, licence)
        contents = ((n, archive.read(n)) for n in files if n.endswith(".py"))
        documents = list(_accept(name, contents))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Source(name, version, licence, digest), documents


def read_licence(metadata: str) -> str:
    """The licence that a package's metadata names: expression, else classifiers, else free text."""
    fields = email.parser.HeaderParser().parsestr(metadata)
    if fields.get("License-Expression"):
        return fields["License-Expression"]
    classifiers = [c for c in fields.get_all("Classifier", []) if c.startswith("License ::")]
    if classifiers:
        return "; ".join(c.split(" :: ")[-1] for c in classifiers)
    return (fields.get("License") or "").strip().split("\n")[0]


def check_licence(pin: str, licence: str) -> None:
    """Refuses a package whose licence is not permissive.

    Raises:
      MimoError: if the licence names none of the allowed ones or one of the refused ones.
    """
    allowed = re.search(ALLOWED_LICENCES, licence, re.IGNORECASE)
    refused = re.search(REFUSED_LICENCES, licence, re.IGNORECASE)
    if refused or not allowed:
        raise MimoError(
            f"{pin} has the licence {licence!r}; the corpus takes {ALLOWED_LICENCES} and never "
            f"{REFUSED_LICENCES}. Remove it from mimo_jax/train/corpus_sources.py."
        )


def read_standard_library() -> tuple[Source, list[Document]]:
    """Reads the acceptable files of the standard library of the Python that runs."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in root.rglob("*.py") if p.stat().st_size <= MAX_FILE)
    contents = ((p.relative_to(root).as_posix(), p.read_bytes()) for p in paths)
    source = Source("cpython", platform.python_version(), "PSF-2.0", None)
    return source, list(_accept("cpython", contents))


def _accept(package: str, files: Iterable[tuple[str, bytes]]) -> Iterator[Document]:
    """Documents of the files that look like source someone wrote."""
    for path, data in files:
        if _LEFT_OUT.search(path):
            continue
        text = clean(data)
        if text is not None:
            yield Document(package, path, text)


def clean(data: bytes) -> str | None:
    """A file's text without its licence header, or None for one that is not to be trained on.

    Refused: not UTF-8, with a zero byte, generated, a line over 500 characters, more than 12%
    digits or 5% bytes beyond ASCII (tables), under 200 characters.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    lines = [line.rstrip() for line in strip_header(text).splitlines()]
    text = "\n".join(lines).strip("\n") + "\n"
    if SEPARATOR in text or len(text) < MIN_DOCUMENT or len(max(lines, key=len)) > MAX_LINE:
        return None
    if _GENERATED.search(text[:1000]):
        return None
    visible = len(text) - text.count(" ") - text.count("\n")
    digits = sum(text.count(d) for d in "0123456789")
    foreign = len(text.encode()) - len(text)
    if digits > MAX_DIGITS * visible or foreign > MAX_FOREIGN * visible:
        return None
    return text


def strip_header(text: str) -> str:
    """Removes the comments that a file begins with when they speak of copyright or a licence."""
    lines = text.splitlines(keepends=True)
    end = 0
    while end < len(lines) and (lines[end].startswith("#") or not lines[end].strip()):
        end += 1
    return "".join(lines[end:]) if _LICENCE_WORDS.search("".join(lines[:end])) else text


class Hasher:
    """Hashes runs of 13 consecutive words; a word is a longest run of [A-Za-z0-9_]."""

    def __init__(self):
        self._words: dict[str, int] = {}

    def __call__(self, text: str) -> UInt64[np.ndarray, " grams"]:
        """A 64-bit hash of each run of 13 words, in order; none for a shorter text."""
        words = _WORD.findall(text)
        if len(words) < NGRAM:
            return np.zeros(0, np.uint64)
        codes = np.fromiter(map(self._code, words), np.uint64, len(words))
        grams = np.zeros(len(codes) - NGRAM + 1, np.uint64)
        for offset in range(NGRAM):
            # Unsigned arithmetic wraps around: a polynomial modulo 2^64 over random codes.
            grams = grams * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(grams)]
        return grams ^ (grams >> np.uint64(29))

    def _code(self, word: str) -> int:
        code = self._words.get(word)
        if code is None:
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            code = self._words[word] = int.from_bytes(digest, "little")
        return code


def drop_copies(documents: Iterable[Document]) -> list[Document]:
    """Keeps the first of documents with the same text."""
    return list({document.text: document for document in reversed(list(documents))}.values())[::-1]


def limit_packages(documents: list[Document], budget: int) -> list[Document]:
    """Limits each package to one size, so that all together reach the budget.

    Args:
      documents: of all packages.
      budget: characters wanted in all.

    Returns:
      The documents kept, in the order given; of a limited package those whose path hashes lowest.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.package] = sizes.get(document.package, 0) + len(document.text)
    limit, left = 0, budget
    for rank, size in enumerate(sorted(sizes.values())):
        limit = left // (len(sizes) - rank)
        if size > limit:
            break
        limit, left = size, left - size
    used = dict.fromkeys(sizes, 0)
    kept = set()
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.path.encode()).digest()):
        if used[document.package] + len(document.text) <= limit:
            used[document.package] += len(document.text)
            kept.add((document.package, document.path))
    return [document for document in documents if (document.package, document.path) in kept]


def drop_near_copies(documents: Iterable[Document], hasher: Hasher) -> list[Document]:
    """Keeps documents of which most 13-grams were not in documents before them.

    One 13-gram in 32, chosen by its hash, stands for all; documents with fewer than 8 stay.
    """
    seen: set[int] = set()
    kept = []
    for document in documents:
        grams = hasher(document.text)
        sample = set(grams[grams % np.uint64(32) == 0].tolist())
        if len(sample) >= 8 and len(sample & seen) >= NEAR_COPY * len(sample):
            continue
        seen |= sample
        kept.append(document)
    return kept


def cut_overlaps(
    document: Document, heldout: UInt64[np.ndarray, " grams"], hasher: Hasher
) -> list[Document]:
    """Cuts out of a document the lines that share 13 consecutive words with held-out text.

    Args:
      document: a training document.
      heldout: the sorted hashes of all 13-grams of the held-out text.
      hasher: the one that made them.

    Returns:
      The pieces between those lines, each a document of its own (joined they would form new runs),
      those under 200 characters left out; none when over 30% of the lines overlap.
    """
    shared = _contains(heldout, hasher(document.text))
    if not shared.any():
        return [document]
    lines = document.text.splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    words = np.array([match.start() for match in _WORD.finditer(document.text)])
    first = np.searchsorted(ends, words[np.flatnonzero(shared)], side="right")
    last = np.searchsorted(ends, words[np.flatnonzero(shared) + NGRAM - 1], side="right")
    overlaps = np.zeros(len(lines), bool)
    for begin, end in zip(first, last, strict=True):
        overlaps[begin : end + 1] = True
    if overlaps.mean() > MAX_OVERLAP:
        return []
    pieces = "".join(
        SEPARATOR if gone else line for line, gone in zip(lines, overlaps, strict=True)
    ).split(SEPARATOR)
    pieces = [piece.strip("\n") + "\n" for piece in pieces]
    return [
        dataclasses.replace(document, text=piece) for piece in pieces if len(piece) >= MIN_DOCUMENT
    ]


def _contains(
    sorted_values: UInt64[np.ndarray, " values"], wanted: UInt64[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Which of the wanted values are among the sorted ones."""
    if not len(sorted_values):
        return np.zeros(len(wanted), bool)
    places = np.searchsorted(sorted_values, wanted).clip(max=len(sorted_values) - 1)
    return sorted_values[places] == wanted


def write_archive(path: Path, documents: list[Document]) -> None:
    """Writes documents joined by zero bytes, compressed with xz and a window of 64 MiB."""
    text = SEPARATOR.join(document.text for document in documents)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26}]
    path.write_bytes(lzma.compress(text.encode(), filters=filters))


def read_archive(path: Path) -> list[str]:
    """The texts of an archive's documents.

    Raises:
      MimoError: if the file is missing or is not an archive of `write_archive`.
    """
    try:
        return lzma.decompress(path.read_bytes()).decode().split(SEPARATOR)
    except FileNotFoundError:
        raise MimoError(
            f"No corpus at {path}: make one with "
            f"`python -m mimo_jax.train.corpus --out {path.parent}`."
        ) from None
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise MimoError(
            f"{path} is not a whole .xz file of UTF-8 text ({error}): make it anew."
        ) from None


def choose_pins(names: Sequence[str] | None) -> list[str]:
    """The pins of the training packages of these names; of all without names.

    Raises:
      MimoError: for a name that no pin has.
    """
    pins = {pin.split("==")[0]: pin for pin in TRAINING}
    unknown = [name for name in names or () if name not in pins]
    if unknown:
        raise MimoError(
            f"No training package {', '.join(unknown)}: choose of mimo_jax/train/corpus_sources.py."
        )
    return TRAINING if names is None else [pins[name] for name in names]


def build(out: Path, budget: int, offline: bool, names: Sequence[str] | None = None) -> dict:
    """Builds the corpus in a folder; see the module's words.

    Args:
      out: the folder; its `archives` keeps the wheels.
      budget: characters of training text before near copies and overlaps are removed.
      offline: use only wheels that are already there.
      names: of training packages, for a small corpus; all by default.

    Returns:
      The manifest.

    Raises:
      MimoError: for a name that is not known, or a wheel that is not to be had.
    """
    wheels, chosen = out / "archives", choose_pins(names)
    if not offline:
        download(HELD_OUT + chosen, wheels)
    hasher = Hasher()
    heldout_read = [read_wheel(pin, wheels) for pin in HELD_OUT]
    heldout = drop_copies(document for _, documents in heldout_read for document in documents)
    known = np.unique(np.concatenate([hasher(document.text) for document in heldout]))

    read = [read_standard_library(), *(read_wheel(pin, wheels) for pin in chosen)]
    counts = {}
    documents = [document for _, documents in read for document in documents]
    counts["accepted"] = _measure(documents)
    documents = drop_copies(documents)
    counts["without exact copies"] = _measure(documents)
    documents = limit_packages(documents, budget)
    counts["limited to the budget"] = _measure(documents)
    documents = drop_near_copies(documents, hasher)
    counts["without near copies"] = _measure(documents)
    documents = [piece for d in documents for piece in cut_overlaps(d, known, hasher)]
    counts["without held-out overlaps"] = _measure(documents)

    write_archive(out / "train.txt.xz", documents)
    write_archive(out / "heldout.txt.xz", heldout)
    files = [f"{document.package}/{document.path}" for document in heldout]
    (out / "heldout_files.json").write_text(json.dumps(files, indent=0) + "\n")
    manifest = {
        "python": platform.python_version(),
        "steps": counts,
        "training": _describe(read, documents),
        "heldout": _describe(heldout_read, heldout),
        "archives": {n: _fingerprint(out / n) for n in ("train.txt.xz", "heldout.txt.xz")},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _measure(documents: list[Document]) -> dict:
    """Documents and bytes."""
    return {"documents": len(documents), "bytes": sum(len(d.text.encode()) for d in documents)}


def _describe(read: list[tuple[Source, list[Document]]], kept: list[Document]) -> list[dict]:
    """For the manifest: each source with the documents and bytes that were kept of it."""
    of_package: dict[str, list[Document]] = {source.name: [] for source, _ in read}
    for document in kept:
        of_package[document.package].append(document)
    return [dataclasses.asdict(s) | _measure(of_package[s.name]) for s, _ in read]


def _fingerprint(path: Path) -> dict:
    """A file's size and hash."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def main() -> None:
    """Parses the options, builds, and prints what each step left."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".corpus"))
    parser.add_argument(
        "--budget", type=int, default=540_000_000, help="characters of training text"
    )
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument(
        "--packages", nargs="+", metavar="NAME", help="only these, of the training packages"
    )
    options = parser.parse_args()
    manifest = build(options.out, options.budget, options.offline, options.packages)
    print(json.dumps({key: manifest[key] for key in ("steps", "archives")}, indent=1))


if __name__ == "__main__":
    main()
