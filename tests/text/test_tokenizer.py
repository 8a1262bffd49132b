"""The tokenizer: round trips, special tokens, decoding in pieces that never split a character."""

import json
import pathlib

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from mimo_jax.errors import MimoError
from mimo_jax.text.tokenizer import SPECIAL_TOKENS, Detokenizer, Tokenizer, train_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "checkpoints/mimo-nano/tokenizer.json"
TEXTS = [
    "def add(first, second):\n    return first + second\n\n\nclass Sum:\n    total = 12\n",
    "for name in names:\n        print(f'{name}: grüße, 漢字 🙂')\n",
]


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer.from_file(SHIPPED)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer(train_tokenizer(iter(TEXTS), vocab_size=311))


TOKENIZERS = {"shipped": Tokenizer.from_file(SHIPPED)}
TOKENIZERS["tiny"] = Tokenizer(train_tokenizer(iter(TEXTS), vocab_size=311))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
TEXT = st.one_of(TEXT, st.sampled_from(TEXTS), st.text("e\u0301ü漢🙂\n\t x(_<|>", max_size=40))


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """The ids in pieces, some of them empty, cut at the given places."""
    places = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in zip(places, places[1:], strict=False)]


def decode_in_pieces(tokenizer: Tokenizer, pieces: list[list[int]]) -> tuple[list[str], str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(piece) for piece in pieces], detokenizer.finish()


def test_the_shipped_vocabulary(shipped):
    assert shipped.vocab_size == 3072
    assert shipped.special_ids == {text: id for id, text in enumerate(SPECIAL_TOKENS)}
    assert shipped.eos_ids == (0, 2)
    assert (shipped.end_of_text_id, shipped.mask_id) == (0, 3)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT)
def test_any_text_comes_back(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT, cuts=st.lists(st.integers(0, 500), max_size=9))
def test_pieces_of_text_are_whole_characters(name, text, cuts):
    tokenizer = TOKENIZERS[name]
    pieces, rest = decode_in_pieces(tokenizer, split(tokenizer.encode(text), cuts))
    assert "".join(pieces) == text
    assert rest == ""


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data(), cuts=st.lists(st.integers(0, 500), max_size=9))
def test_pieces_of_any_ids_are_the_text_of_all(name, data, cuts):
    """Random bytes: broken, overlong and unfinished characters; the library is the oracle."""
    tokenizer = TOKENIZERS[name]
    ids = st.integers(0, tokenizer.vocab_size - 1)
    # The first tokens after the special ones are the single bytes.
    ids = data.draw(st.lists(st.one_of(ids, st.integers(4, 259)), max_size=30))
    pieces, rest = decode_in_pieces(tokenizer, split(ids, cuts))
    assert "".join(pieces) + rest == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == tokenizer._plain.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode_bytes(ids).decode("utf-8", "replace") == tokenizer.decode(ids)


def test_a_character_is_kept_back_until_it_is_whole(tiny):
    ids = [id for byte in "é🙂".encode() for id in _ids_of_byte(tiny, byte)]
    pieces, rest = decode_in_pieces(tiny, [[id] for id in ids])
    assert pieces == ["", "é", "", "", "", "🙂"]
    assert rest == ""
    pieces, rest = decode_in_pieces(tiny, [[id] for id in ids[:4]])
    assert (pieces, rest) == (["", "é", "", ""], "\ufffd")


def _ids_of_byte(tokenizer: Tokenizer, byte: int) -> list[int]:
    return [next(id for id in range(4, 260) if tokenizer.decode_bytes([id]) == bytes([byte]))]


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_special_tokens_in_text_are_text_unless_asked_for(special, shipped):
    text = f"a{special}b"
    id = shipped.special_ids[special]
    assert id not in shipped.encode(text)
    assert shipped.decode(shipped.encode(text)) == text
    assert shipped.encode(text, specials=True).count(id) == 1
    assert shipped.decode(shipped.encode(text, specials=True)) == "ab"


def test_digits_stand_alone_and_indentation_is_one_token(shipped):
    assert len(shipped.encode("20261123")) == 8
    assert len(shipped.encode("\n        ")) == 1
    # What follows a colon must not change how the prompt before it is read.
    prompt = shipped.encode("def fibonacci(n):")
    assert shipped.encode("def fibonacci(n):\n    return n")[: len(prompt)] == prompt


def test_training_is_repeatable():
    first, second = (train_tokenizer(iter(TEXTS), vocab_size=299) for _ in range(2))
    assert first.to_str() == second.to_str()


def test_too_little_text_for_a_vocabulary():
    with pytest.raises(MimoError, match="not 5000: train on more text"):
        train_tokenizer(iter(TEXTS), vocab_size=5000)


@pytest.mark.parametrize("id", [-1, 3072, 1 << 40])
def test_an_id_outside_of_the_vocabulary(id, shipped):
    with pytest.raises(MimoError, match=f"Token id {id} is not in the vocabulary: 0 to 3071"):
        shipped.decode([5, id])


def test_files_that_are_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(MimoError, match="No tokenizer at"):
        Tokenizer.from_file(path)
    whole = SHIPPED.read_text()
    for damaged in ("", "{}", whole[:-100], json.dumps({"version": "1.0"})):
        path.write_text(damaged)
        with pytest.raises(MimoError, match="copy it anew"):
            Tokenizer.from_file(path)
    tokenizers.Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(MimoError, match="byte-level"):
        Tokenizer.from_file(path)


def test_no_special_token_of_that_name():
    backend = train_tokenizer(iter(TEXTS), vocab_size=299)
    config = json.loads(backend.to_str())
    config["added_tokens"] = [t for t in config["added_tokens"] if t["content"] != "<|mask|>"]
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(config)))
    with pytest.raises(MimoError, match=r"no <\|mask\|>"):
        _ = tokenizer.mask_id
