"""The corpus: what is accepted, copies, budgets, and no 13-gram shared with held-out text."""

import dataclasses
import json
import re
import sys
import zipfile

import numpy as np
import pytest

from mimo_jax.errors import MimoError
from mimo_jax.train import corpus
from mimo_jax.train.corpus import Document, Hasher

WORDS = [f"{a}{b}" for a in ("get", "set_", "is", "Make", "_n", "x9") for b in ("", "er", "_all")]


def random_source(rng: np.random.Generator, lines: int) -> str:
    """Lines of some words and signs."""
    return "".join(
        "    " * rng.integers(0, 3)
        + " + ".join(rng.choice(WORDS, rng.choice([1, 2, 3, 5, 17])))
        + "\n"
        for _ in range(lines)
    )


def grams_of(text: str) -> set[tuple[str, ...]]:
    """The oracle: all runs of 13 words as tuples."""
    words = re.findall(r"[A-Za-z0-9_]+", text)
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def test_grams_are_hashed_apart(rng):
    hasher = Hasher()
    text = random_source(rng, 300)
    hashes = hasher(text)
    assert len(set(hashes.tolist())) == len(grams_of(text))
    assert (Hasher()(text) == hashes).all()
    assert len(hasher("one two three")) == 0
    assert hasher("a b c d e f g h i j k l m") == hasher("a, b(c)\n d=e+f; g h i-j 'k' l\tm!")
    assert hasher("a b c d e f g h i j k l m") != hasher("b a c d e f g h i j k l m")


def pieces_left(text: str, heldout: str) -> list[str]:
    """The oracle: what is between the lines that a run shared with held-out text touches."""
    lines = text.splitlines(keepends=True)
    words = [(w, n) for n, line in enumerate(lines) for w in re.findall(r"[A-Za-z0-9_]+", line)]
    known, touched = grams_of(heldout), set()
    for start in range(len(words) - 12):
        run = words[start : start + 13]
        if tuple(word for word, _ in run) in known:
            touched |= {number for _, number in run}
    pieces = [""]
    for number, line in enumerate(lines):
        pieces = [*pieces, ""] if number in touched else [*pieces[:-1], pieces[-1] + line]
    return [piece for piece in pieces if len(piece) >= corpus.MIN_DOCUMENT]


@pytest.mark.parametrize("repeat", range(20))
def test_no_run_of_13_words_is_shared_with_heldout_text(repeat, rng):
    heldout = random_source(rng, 47)
    mine = random_source(rng, 211).splitlines(keepends=True)
    borrowed = heldout.splitlines(keepends=True)[7:29]
    # Anywhere, but two in the middle: something is left on both sides.
    places = [*rng.integers(0, 211, 1).tolist(), *rng.integers(60, 151, 2).tolist()]
    for place in sorted(places, reverse=True):
        mine[place:place] = borrowed[: rng.integers(13, 22)]
    text = "".join(mine)
    assert grams_of(text) & grams_of(heldout)
    hasher = Hasher()
    known = np.unique(hasher(heldout))
    pieces = corpus.cut_overlaps(Document("p", "f.py", text), known, hasher)
    assert len(pieces) > 1
    assert [piece.text for piece in pieces] == pieces_left(text, heldout)
    assert not any(grams_of(piece.text) & grams_of(heldout) for piece in pieces)


def test_a_text_without_overlap_stays_and_a_copy_goes(rng):
    heldout, hasher = random_source(rng, 53), Hasher()
    known = np.unique(hasher(heldout))
    own = Document("p", "own.py", "\n".join(f"word{n} = other{n}" for n in range(60)) + "\n")
    assert corpus.cut_overlaps(own, known, hasher) == [own]
    assert corpus.cut_overlaps(Document("p", "copy.py", heldout), known, hasher) == []
    assert corpus.cut_overlaps(own, np.zeros(0, np.uint64), hasher) == [own]


def test_copies_and_near_copies_go(rng):
    text = random_source(rng, 400)
    lines = text.splitlines(keepends=True)
    changed = "".join(line for n, line in enumerate(lines) if n % 97)
    first, other = Document("a", "1.py", text), Document("c", "3.py", random_source(rng, 390))
    same = dataclasses.replace(first, package="b")
    near = Document("b", "2.py", changed)
    assert corpus.drop_copies([first, same, near, other]) == [first, near, other]
    assert corpus.drop_near_copies([first, near, other], Hasher()) == [first, other]


def test_the_budget_limits_the_largest_packages_alike(rng):
    sizes = {"small": 300, "medium": 1900, "large": 9100, "huge": 30700}
    documents = [
        Document(package, f"{package}/{n}.py", "x" * 100)
        for package, size in sizes.items()
        for n in range(size // 100)
    ]
    kept = corpus.limit_packages(documents, 8200)
    count = {name: 100 * sum(d.package == name for d in kept) for name in sizes}
    assert count == {"small": 300, "medium": 1900, "large": 3000, "huge": 3000}
    assert [d for d in documents if d in set(kept)] == kept
    assert corpus.limit_packages(documents, 10**9) == documents
    shuffled = [documents[i] for i in rng.permutation(len(documents))]
    assert set(corpus.limit_packages(shuffled, 8200)) == set(kept)


BODY = "def value():\n" + "".join(f"    call_number_{chr(97 + n)}(argument)\n" for n in range(20))
LICENCE = "#!/usr/bin/python\n# Copyright 2020 Someone\n#\n# All rights reserved.\n\n"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (BODY, BODY),
        (LICENCE + BODY, BODY),
        ("# What this file is for.\n" + BODY, "# What this file is for.\n" + BODY),
        (BODY.replace("\n", " \r\n") + "\n\n", BODY),
        ("\ufeff" + BODY, BODY),
        ("short = True\n", None),
        (BODY + "\0\n", None),
        (BODY + "x = '" + "a" * 500 + "'\n", None),
        ("# Generated by a tool.\n" + BODY, None),
        (BODY + "".join(f"    {n}{n}{n},\n" for n in range(1000, 1099)), None),
        (BODY + "# 漢字漢字漢字漢字漢字漢字漢字漢字漢字\n", None),
    ],
)
def test_what_is_accepted(text, clean):
    assert corpus.clean(text.encode()) == clean


def test_bytes_that_are_no_text_are_refused():
    assert corpus.clean(BODY.encode() + b"# \xff\n") is None


@pytest.mark.parametrize(
    ("path", "left_out"),
    [
        ("package/core.py", False),
        ("package/testament.py", False),
        ("package/latest.py", False),
        ("package/tests/helper.py", True),
        ("package/test_core.py", True),
        ("pip/_vendor/rich/box.py", True),
        ("package/vendored/requests.py", True),
        ("numpy/_core/conftest.py", True),
    ],
)
def test_which_paths_are_left_out(path, left_out):
    accepted = list(corpus._accept("package", [(path, BODY.encode())]))
    assert accepted == ([] if left_out else [Document("package", path, BODY)])


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: MIT\nLicense: other\n", "MIT"),
        ("Classifier: License :: OSI Approved :: BSD License\nLicense: x\n", "BSD License"),
        ("License: Apache 2.0\n        and more\n", "Apache 2.0"),
        ("Name: nothing\n", ""),
    ],
)
def test_licences_are_read_from_metadata(metadata, licence):
    assert (
        corpus.read_licence(f"Metadata-Version: 2.4\n{metadata}\ndescription: License: GPL")
        == licence
    )


@pytest.mark.parametrize("licence", ["MIT", "BSD-3-Clause", "Simplified BSD", "ISC License (ISCL)"])
def test_permissive_licences_are_taken(licence):
    corpus.check_licence("some==1", licence)


@pytest.mark.parametrize("licence", ["", "LGPLv3", "MIT AND GPL-2.0", "MPL-2.0", "Limited use"])
def test_other_licences_are_refused(licence):
    with pytest.raises(MimoError, match="some==1 has the licence"):
        corpus.check_licence("some==1", licence)


def make_wheel(folder, name: str, files: dict[str, str], licence: str = "MIT") -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.2-py3-none-any.whl", "w") as archive:
        metadata = f"Metadata-Version: 2.4\nName: {name}\nLicense-Expression: {licence}\n\n"
        archive.writestr(f"{name}-1.2.dist-info/METADATA", metadata)
        for path, text in files.items():
            archive.writestr(f"{name}/{path}", text)


def test_a_corpus_from_end_to_end(tmp_path, rng, monkeypatch):
    heldout = random_source(rng, 61)
    texts = [f"# {n} grüße\n" + random_source(rng, 83) for n in range(5)]
    wheels = tmp_path / "archives"
    make_wheel(wheels, "kept_out", {"a.py": heldout})
    make_wheel(wheels, "some_code", {f"{n}.py": text for n, text in enumerate(texts)})
    make_wheel(wheels, "thief", {"own.py": texts[0] + heldout[:400], "stolen.py": heldout})
    monkeypatch.setattr(corpus, "HELD_OUT", ["kept-out==1.2"])
    monkeypatch.setattr(corpus, "TRAINING", ["some_code==1.2", "thief==1.2"])
    library = corpus.Source("cpython", "3", "PSF-2.0", None), []
    monkeypatch.setattr(corpus, "read_standard_library", lambda: library)
    manifest = corpus.build(tmp_path, 10**6, offline=True)

    train = corpus.read_archive(tmp_path / "train.txt.xz")
    assert corpus.read_archive(tmp_path / "heldout.txt.xz") == [heldout.strip("\n") + "\n"]
    assert set(texts[1:]) <= set(train)
    assert not grams_of(heldout) & set.union(*map(grams_of, train))
    assert json.loads((tmp_path / "heldout_files.json").read_text()) == ["kept-out/kept_out/a.py"]
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    described = {source["name"]: source for source in manifest["training"]}
    assert described["some_code"]["documents"] == 5
    assert described["some_code"]["licence"] == "MIT"
    assert len(described["some_code"]["sha256"]) == 64
    first = (tmp_path / "train.txt.xz").read_bytes()
    corpus.build(tmp_path, 10**6, offline=True)
    assert (tmp_path / "train.txt.xz").read_bytes() == first


def test_wheels_that_are_missing_or_not_to_be_had(tmp_path, monkeypatch):
    with pytest.raises(MimoError, match="No wheel of some==1.2"):
        corpus.read_wheel("some==1.2", tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MimoError, match=r"could not download one of \['some==1.2'\]"):
        corpus.download(["some==1.2"], tmp_path)
    make_wheel(tmp_path, "some", {})
    corpus.download(["some==1.2"], tmp_path)


def test_archives_that_are_missing_or_damaged(tmp_path):
    path = tmp_path / "train.txt.xz"
    with pytest.raises(MimoError, match="No corpus at"):
        corpus.read_archive(path)
    corpus.write_archive(path, [Document("p", "f", BODY), Document("p", "g", LICENCE)])
    assert corpus.read_archive(path) == [BODY, LICENCE]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MimoError, match="not a whole .xz file"):
        corpus.read_archive(path)


def test_packages_are_chosen_by_name():
    assert corpus.choose_pins(None) == corpus.TRAINING
    assert corpus.choose_pins(["sympy", "black"]) == ["sympy==1.14.0", "black==26.10.1"]
    with pytest.raises(MimoError, match="No training package blak"):
        corpus.choose_pins(["black", "blak"])
