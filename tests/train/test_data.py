"""Packed tokens, batches by step, held-out rows and prompts."""

import json
import pathlib

import numpy as np
import pytest

from mimo_jax.errors import MimoError
from mimo_jax.text.tokenizer import Tokenizer
from mimo_jax.train import data
from mimo_jax.train.corpus import Document, write_archive
from mimo_jax.train.data import Batches

SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "checkpoints/mimo-nano"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(SHIPPED / "tokenizer.json")


def function(name: str, lines: int) -> str:
    """A function of some lines, no two alike."""
    body = "".join(f"    {name}_{n} = compute(first, {n}) + 'grüße'\n" for n in range(lines))
    return f"def {name}(first):\n{body}    return {name}_0\n\n\n"


def test_texts_are_packed_one_after_another(tokenizer, tmp_path):
    texts = [function(name, n) for n, name in enumerate(("alpha", "beta", "gamma"))]
    tokens = data.pack(texts, tokenizer)
    assert tokens.dtype == np.uint16
    expected = [id for text in texts for id in [*tokenizer.encode(text), tokenizer.end_of_text_id]]
    assert tokens.tolist() == expected
    write_archive(tmp_path / "a.xz", [Document("p", "f", text) for text in texts])
    assert (data.load_tokens(tmp_path / "a.xz", tokenizer) == tokens).all()
    assert data.pack([], tokenizer).shape == (0,)


def test_many_texts_keep_their_order(tokenizer, monkeypatch):
    texts = [f"value_{n} = {n}\n" for n in range(23)]
    together = data.pack(texts, tokenizer)
    monkeypatch.setattr(data, "BATCH_OF_DOCUMENTS", 7)
    assert (data.pack(texts, tokenizer) == together).all()


@pytest.mark.parametrize(
    ("rows", "batch", "length"), [(17, 3, 5), (8, 4, 7), (5, 5, 11), (2, 1, 3)]
)
def test_an_epoch_has_every_row_once(rows, batch, length, rng):
    tokens = rng.integers(0, 3072, rows * length + length - 1).astype(np.uint16)
    tokens[: rows * length : length] = np.arange(rows)
    source = Batches(tokens, batch, length, seed=7)
    table = tokens[: rows * length].reshape(rows, length)
    assert source.batches_per_epoch == rows // batch
    for epoch in range(3):
        steps = range(epoch * (rows // batch), (epoch + 1) * (rows // batch))
        seen = np.concatenate([source.batch_at(step) for step in steps])
        assert seen.dtype == np.int32
        assert len(set(seen[:, 0].tolist())) == len(seen) == rows // batch * batch
        assert (table[seen[:, 0]] == seen).all()


def test_a_batch_depends_on_seed_and_step_alone(rng):
    tokens = rng.integers(0, 3072, 1009).astype(np.uint16)
    source = Batches(tokens, 3, 13, seed=5)
    in_order = [source.batch_at(step) for step in range(60)]
    again = Batches(tokens, 3, 13, seed=5)
    for step in rng.permutation(60).tolist():
        assert (again.batch_at(step) == in_order[step]).all()
    other = [Batches(tokens, 3, 13, seed=6).batch_at(step) for step in range(5)]
    assert any((a != b).any() for a, b in zip(in_order, other, strict=False))
    epoch = source.batches_per_epoch
    assert any((in_order[i] != in_order[epoch + i]).any() for i in range(5))


def test_too_few_tokens_for_a_batch():
    with pytest.raises(MimoError, match="100 tokens make 7 rows of 13, a batch needs 8"):
        Batches(np.zeros(100, np.uint16), 8, 13, seed=0)


def test_heldout_rows_count_the_bytes_that_are_predicted(tokenizer, tmp_path):
    texts = [function("alpha", 19), function("beta", 31)]
    write_archive(tmp_path / "heldout.txt.xz", [Document("p", "f", text) for text in texts])
    rows, size = data.heldout_rows(tmp_path / "heldout.txt.xz", tokenizer, 37)
    tokens = [id for text in texts for id in [*tokenizer.encode(text), tokenizer.end_of_text_id]]
    assert rows.shape == (len(tokens) // 37, 37)
    assert rows.ravel().tolist() == tokens[: rows.size]
    assert size == sum(len(tokenizer.decode_bytes(row[1:].tolist())) for row in rows)
    given = sum(len(tokenizer.decode_bytes([int(row[0])])) for row in rows)
    rest = len(tokenizer.decode_bytes(tokens[rows.size :]))
    assert size + given + rest == sum(len(text.encode()) for text in texts)


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
    tokens = data.load_tokens(SHIPPED / "heldout.txt.xz", tokenizer)
    assert len(tokens) == figures["heldout_tokens"]
    assert len(tokenizer.decode_bytes(tokens.tolist())) == figures["heldout_bytes"]


def test_a_sample_is_whole_texts(rng):
    texts = [str(n) * int(rng.integers(1, 50)) for n in range(100)]
    sample = data.sample_texts(texts, 700, seed=1)
    assert set(sample) <= set(texts)
    assert 700 <= sum(map(len, sample)) < 700 + 200
    assert data.sample_texts(texts, 700, seed=1) == sample
    assert data.sample_texts(texts, 10**9, seed=1) != texts
