"""Held-out prompts and text of mimo-nano, and samples for its tokenizer."""

import json
import pathlib

import pytest

from mimo_jax.errors import MimoError
from mimo_jax.text.tokenizer import Tokenizer
from mimo_jax.train import data
from mimo_jax.train.sources import tokenise

SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "checkpoints/mimo-nano"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(SHIPPED / "tokenizer.json")


def function(name: str, lines: int) -> str:
    """A function of some lines, no two alike."""
    body = "".join(f"    {name}_{n} = compute(first, {n}) + 'grüße'\n" for n in range(lines))
    return f"def {name}(first):\n{body}    return {name}_0\n\n\n"


def test_prompts_start_at_definitions_and_have_256_tokens(tokenizer):
    both = [function(name, 40) + function(f"{name}_b", 40) for name in "abcde"]
    texts = [text.replace("'grüße'", "first") for text in both]
    texts.append("x = 1\n" * 500)
    files = [f"{package}/{n}.py" for n, package in enumerate("ppqqrs")]
    records = data.choose_prompts(texts, files, tokenizer, 7, seed=3)
    for record in records:
        assert len(tokenizer.encode(record["text"])) == 256
        text = texts[files.index(record["file"])]
        rest = "".join(text.splitlines(keepends=True)[record["line"] - 1 :])
        assert rest.startswith(record["text"])
        assert record["text"].startswith("def ")
    names = [record["file"] for record in records]
    # One from each file before a second one of any, and the packages take turns.
    assert set(names[:5]) == set(files[:5])
    assert {name[0] for name in names[:3]} == set("pqr")
    assert len({(record["file"], record["line"]) for record in records}) == 7
    with pytest.raises(MimoError, match="Only 10 of 11 prompts"):
        data.choose_prompts(texts, files, tokenizer, 11, seed=3)


def test_the_shipped_prompts(tokenizer):
    lines = (SHIPPED / "heldout_prompts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) >= 120
    assert len({record["file"] for record in records}) == len(records)
    assert {len(tokenizer.encode(record["text"])) for record in records} == {256}


def test_the_shipped_heldout_text(tokenizer):
    figures = json.loads((SHIPPED / "corpus.json").read_text())["shipped"]
    tokens = tokenise([SHIPPED / "heldout.txt.xz"], tokenizer)
    assert len(tokens.ids) == figures["heldout_tokens"]
    assert len(tokenizer.decode_bytes(tokens.ids.tolist())) == figures["heldout_bytes"]


def test_a_sample_is_whole_texts(rng):
    texts = [str(n) * int(rng.integers(1, 50)) for n in range(100)]
    sample = data.sample_texts(texts, 700, seed=1)
    assert set(sample) <= set(texts)
    assert 700 <= sum(map(len, sample)) < 700 + 200
    assert data.sample_texts(texts, 700, seed=1) == sample
    assert data.sample_texts(texts, 10**9, seed=1) != texts
