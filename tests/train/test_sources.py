"""What is trained on: files to tokens and rows, chats' answers, and batches from a position."""

import json

import numpy as np
import pytest
from tiny_checkpoint import write_tokenizer

from mimo_jax.errors import MimoError
from mimo_jax.train import sources
from mimo_jax.train.corpus import Document, write_archive
from mimo_jax.train.loader import Loader
from mimo_jax.train.sources import Tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_files(folder, tokenizer):
    """A file of every kind; the texts in order."""
    (folder / "a.txt").write_text("abx = ba\0cdy")
    write_archive(folder / "b.txt.xz", [Document("p", "f", text) for text in ("kx", "ly grüße")])
    lines = [json.dumps({"text": "one\ntwo"}), "", json.dumps({"text": "three"})]
    (folder / "c.jsonl").write_text("\n".join(lines))
    np.save(folder / "d.npy", np.array([5, 299, 4]))
    return ["abx = ba", "cdy", "kx", "ly grüße", "one\ntwo", "three"]


def test_every_kind_of_file(tokenizer, tmp_path, monkeypatch):
    texts = write_files(tmp_path, tokenizer)
    paths = sources.find_files([str(tmp_path / "*")])
    expected = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.end_of_text_id]]
    for together in (1000, 2):
        monkeypatch.setattr(sources, "TOGETHER", together)
        tokens = sources.tokenise(paths, tokenizer)
        assert tokens.ids.dtype == np.uint16 and tokens.trained.all()
        assert tokens.ids.tolist() == [*expected, 5, 299, 4]
    assert list(sources.texts_of(paths)) == texts
    assert sources.pack(texts, tokenizer).ids.tolist() == expected
    assert len(sources.tokenise([], tokenizer).ids) == 0


def test_a_chats_loss_is_on_its_answers(tokenizer):
    turns = [("system", "ab"), ("user", "abx = ba"), ("assistant", "cd<|im_end|>"), ("user", "k"),
             ("assistant", "ly")]  # fmt: skip
    ids, trained = sources.encode_chat(chat(*turns)["messages"], tokenizer)
    end = tokenizer.special_ids["<|im_end|>"]
    said = [tokenizer.encode("cd<|im_end|>"), tokenizer.encode("ly")]
    assert [i for i, t in zip(ids, trained, strict=True) if t] == [*said[0], end, *said[1], end]
    # What is written in a message is text, never a mark of a turn.
    assert ids.count(end) == len(turns) and ids[-1] == tokenizer.end_of_text_id
    text = "".join(f"{role}\n{content}\n" for role, content in turns)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"words": "x"}', r"c.jsonl, line 2 has the keys \['words'\]"),
        ('{"messages": [{"role": "user"}]}', "it must have a text, or messages"),
        ('{"text": 3}', "it must have a text"),
        ("[1]", "line 2 holds a list"),
        ('{"text": "x"', "line 2 is not valid JSON"),
    ],
)
def test_lines_that_are_no_records(tokenizer, tmp_path, line, words):
    (tmp_path / "c.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(MimoError, match=words):
        sources.tokenise([tmp_path / "c.jsonl"], tokenizer)


def test_files_that_cannot_be_used(tokenizer, tmp_path):
    with pytest.raises(MimoError, match="none.txt does not exist"):
        sources.find_files([str(tmp_path / "none.txt")])
    with pytest.raises(MimoError, match=r"is a folder: name its files, such as '.*/\*.txt'"):
        sources.find_files([str(tmp_path)])
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(MimoError, match="a.txt is not UTF-8 text"):
        sources.tokenise([tmp_path / "a.txt"], tokenizer)
    for ids, words in (
        (np.zeros((2, 3), int), r"int64\[2, 3\]: it must be whole numbers"),
        (np.zeros(3), "float64"),
        (np.array([0, 300]), "has ids 0 to 300; the vocabulary has 0 to 299"),
        (np.array([-1, 3]), "has ids -1 to 3"),
    ):
        np.save(tmp_path / "d.npy", ids)
        with pytest.raises(MimoError, match=words):
            sources.tokenise([tmp_path / "d.npy"], tokenizer)
    (tmp_path / "d.npy").write_bytes(b"no array")
    with pytest.raises(MimoError, match="is not a .npy file"):
        sources.tokenise([tmp_path / "d.npy"], tokenizer)


def test_rows_keep_what_is_predicted(rng):
    trained = rng.random(1000) < 0.06
    trained[13:26] = False
    tokens = Tokens(np.arange(1000).astype(np.uint16), trained)
    rows = tokens.rows(13)
    kept = [n for n in range(1000 // 13) if trained[13 * n + 1 : 13 * n + 13].any()]
    assert len(rows) == len(kept) < 1000 // 13 and 1 not in kept
    for index, number in enumerate(kept):
        row = rows[index]
        assert row["tokens"].tolist() == list(range(13 * number, 13 * number + 13))
        assert row["trained"].tolist() == trained[13 * number : 13 * number + 13].tolist()


def rows_of(count: int, length: int):
    ids = np.repeat(np.arange(count), length).astype(np.uint16)
    return Tokens(ids, np.ones(len(ids), bool)).rows(length)


@pytest.mark.parametrize(("rows", "batch"), [(17, 3), (8, 4), (5, 5), (2, 1)])
def test_an_epoch_has_every_row_once(rows, batch):
    loader = Loader([(rows_of(rows, 3), batch)], seed=7)
    seen = np.concatenate([next(loader)["tokens"][:, 0] for _ in range(4 * rows)])
    epochs = seen[: len(seen) // rows * rows].reshape(-1, rows)
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs.tolist())
    if rows > 5:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_batches_depend_on_seed_and_position_alone(rng):
    def loader(seed=5):
        return Loader([(rows_of(101, 7), 4), (rows_of(53, 11), 2)], seed)

    first, batches, positions = loader(), [], []
    for _ in range(60):
        positions.append(json.loads(json.dumps(first.position)))
        batches.append(next(first))
    assert [b["tokens"].shape for b in batches[:4]] == [(4, 7), (2, 11)] * 2
    again = loader()
    for step in rng.permutation(60)[:20].tolist():
        again.position = positions[step]
        assert (next(again)["tokens"] == batches[step]["tokens"]).all()
    other = loader(6)
    assert any((next(other)["tokens"] != batch["tokens"]).any() for batch in batches[:10])


def test_too_few_rows_for_a_batch():
    with pytest.raises(MimoError, match="make 7 rows of 13 tokens, a batch needs 8"):
        Loader([(rows_of(7, 13), 8)], seed=0)
