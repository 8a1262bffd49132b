"""The engine: answers, streams and sessions agree, statistics add up, bad input is explained."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoint import CONFIG, DRAFTER, checkpoint, write_checkpoint  # noqa: F401

import mimo_jax
from mimo_jax import plots
from mimo_jax.decode import batch
from mimo_jax.decode.batch import Decoding
from mimo_jax.errors import MimoError
from mimo_jax.sharding import Parallel

BLOCK = DRAFTER.block_size
SAMPLED = {"temperature": 1.0, "top_p": 0.97}


@pytest.fixture(scope="module")
def engine(checkpoint):  # noqa: F811
    with mimo_jax.load(checkpoint, devices=1, progress=False) as engine:
        yield engine


def random_prompt(rng, low=1, high=60) -> list[int]:
    return [int(t) for t in rng.integers(1, CONFIG.vocab_size, rng.integers(low, high))]


@pytest.fixture(scope="module")
def clear_prompt(engine):
    """A function of rng, low, high: a prompt whose greedy answer of 40 tokens is no close call.

    Programs of other shapes sum in another order. Where two tokens, or two experts, are nearly
    equal, that may choose the other one: of the prompts, one in twenty is drawn anew.
    """
    graph, params = engine._plan.graphs[0], engine._params[0]

    @jax.jit
    def leads(params, tokens):
        """By how much each choice of experts [layers, 1, t], and of a token [1, t], was made."""
        model, experts = nnx.merge(graph, params), []

        def feed_forward(ffn, x):
            if not hasattr(ffn, "router"):
                return ffn(x, Parallel())
            scores = ffn.router.scores(x[0]) + ffn.router.bias[...]
            best = jax.lax.top_k(scores, ffn.router.choices + 1)[0]
            experts.append(best[None, :, -2] - best[None, :, -1])
            return ffn(x, jnp.ones(x.shape[:2], bool), Parallel())

        h = model.embedding[...][tokens]
        for layer in model.layers:
            h = layer.sequence(h, feed_forward)
        first, second = jnp.unstack(jax.lax.top_k(model.logits(h), 2)[0], axis=-1)
        return jnp.stack(experts), first - second

    def draw(rng, low=1, high=60):
        while True:
            prompt = random_prompt(rng, low, high)
            answer = engine.generate(prompt, max_tokens=40, ignore_eos=True).tokens
            tokens, count = np.zeros((1, engine.max_len), np.int32), len(prompt) + len(answer)
            tokens[0, :count] = [*prompt, *answer]
            experts, lead = leads(params, tokens)
            chosen = lead[0, len(prompt) - 1 : count - 1]
            if experts[..., :count].min() > 1e-5 and chosen.min() > 1e-4:
                return prompt

    return draw


def check_stats(output, prompt_tokens, max_tokens):
    stats = output.stats
    counts = np.array(stats.acceptance_histogram)
    assert stats.prompt_tokens == prompt_tokens
    assert stats.tokens == len(output.tokens) + (output.finish_reason == "stop") <= max_tokens
    assert (counts * np.arange(len(counts))).sum() == stats.tokens
    assert counts.sum() == stats.rounds and counts[0] == 0
    assert stats.acceptance_length == stats.tokens / stats.rounds
    # The round of an end-of-sequence token is counted, although the token is not shown.
    emitted = np.bincount(output.rounds, minlength=stats.rounds)
    emitted[-1] += output.finish_reason == "stop"
    assert len(output.rounds) == len(output.tokens) and sorted(output.rounds) == [*output.rounds]
    assert (np.bincount(emitted, minlength=len(counts)) == counts).all()
    assert stats.tokens_per_second == stats.tokens / stats.wall_s > 0


def test_an_answer_and_its_statistics(engine):
    output = engine.generate("abx = bc", max_tokens=30, **SAMPLED, seed=3)
    assert isinstance(output, mimo_jax.Output) and str(output) == output.text
    assert output.finish_reason in ("stop", "length")
    check_stats(output, len(engine.tokenizer.encode("abx = bc")), 30)
    assert len(output.stats.acceptance_histogram) == BLOCK + 1
    assert output.text == engine.tokenizer.decode(t for t in output.tokens if t < 300)
    again = engine.generate("abx = bc", max_tokens=30, **SAMPLED, seed=3)
    assert again.tokens == output.tokens and again.stats.compile_s == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.text = ""
    for shown in (repr(engine), engine.summary(), str(output.stats)):
        assert "dequantized" in shown and len(shown) < 1000


def test_drafting_changes_no_token(engine, rng):
    """Also for fewer drafts; and what an earlier answer left in the caches is not seen."""
    for _ in range(6):
        prompt, seed = random_prompt(rng), int(rng.integers(2**32))
        options = {"max_tokens": int(rng.integers(1, 90)), "seed": seed}
        options["temperature"] = float(rng.choice([0.0, 0.7, 1.3]))
        plain = engine.generate(prompt, speculative=False, **options)
        assert plain.stats.acceptance_length == 1
        for max_draft in (None, 0, 2, BLOCK - 1):
            drafted = engine.generate(prompt, max_draft=max_draft, **options)
            assert (drafted.tokens, drafted.text) == (plain.tokens, plain.text)
            assert drafted.finish_reason == plain.finish_reason
            check_stats(drafted, len(prompt), options["max_tokens"])


def test_drafts_are_accepted_at_times(engine, rng):
    """Otherwise the comparisons of this file would compare plain decoding with itself."""
    agreed = 0
    for seed in range(500):  # One answer in five has none.
        output = engine.generate(random_prompt(rng), max_tokens=100, temperature=0.7, seed=seed)
        agreed += sum(output.stats.acceptance_histogram[2:])
        if agreed >= 5:
            break
    assert agreed >= 5


def test_a_stream_is_the_answer(engine, rng):
    """For every stop point and every size of piece."""
    prompt, seed = random_prompt(rng), int(rng.integers(2**32))
    whole = engine.generate(prompt, max_tokens=40, **SAMPLED, seed=seed, ignore_eos=True)
    for stop in range(1, 41):
        every = int(rng.integers(1, 12))
        options = {"max_tokens": stop, "seed": seed, "ignore_eos": True, **SAMPLED}
        pieces = list(engine.stream(prompt, every=every, **options))
        output = engine.generate(prompt, **options)
        assert output.tokens == whole.tokens[:stop]
        assert sum((p.tokens for p in pieces), ()) == output.tokens
        assert "".join(p.text for p in pieces) == output.text
        # A piece ends with the round in which it has enough tokens.
        assert all(every <= len(p.tokens) < every + engine.block for p in pieces[:-1])
        assert len(pieces[-1].tokens) < every + engine.block
        assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
        check_stats(output, len(prompt), stop)
        last = pieces[-1].stats
        assert (last.tokens, last.prompt_tokens) == (stop, len(prompt))
        assert last.acceptance_histogram == output.stats.acceptance_histogram


@pytest.mark.parametrize(("seconds", "most"), [(1e-9, BLOCK), (1e9, 60)])
def test_pieces_take_as_long_as_they_are_to(seconds, most, monkeypatch, engine):
    """The first is a round; then a round at a time, or all that is left at once."""
    monkeypatch.setattr(batch, "PIECE_S", seconds)
    options = dict(max_tokens=60, ignore_eos=True)
    first, *others = engine.stream("abc", **options)
    assert 1 <= len(first.tokens) <= BLOCK
    assert all(len(piece.tokens) <= most for piece in others)
    assert most == BLOCK or len(others) == 1
    joined = sum((piece.tokens for piece in others), first.tokens)
    assert joined == engine.generate("abc", **options).tokens


def test_a_stream_ends_where_the_answer_ends(engine, rng):
    """At an end-of-sequence token anywhere in a piece or block."""
    stopped = 0
    for seed in range(2000):  # One answer in eight ends by itself.
        if seed >= 30 and stopped >= 2:
            break
        prompt = random_prompt(rng)
        options = {"max_tokens": 60, "temperature": 1.5, "seed": seed}
        output = engine.generate(prompt, **options)
        pieces = list(engine.stream(prompt, every=int(rng.integers(1, 20)), **options))
        assert sum((p.tokens for p in pieces), ()) == output.tokens
        assert "".join(map(str, pieces)) == output.text
        assert pieces[-1].finish_reason == output.finish_reason
        assert 0 not in output.tokens
        stopped += output.finish_reason == "stop"
    assert stopped >= 2, "no answer ended by itself: the test shows nothing"


def test_a_stream_never_splits_a_character(engine):
    """Pieces decode to whole characters although tokens are single bytes of them."""

    class Spelling:
        """Stands for the program: emits the bytes of a given text."""

        def advance(self, limits):
            emitted = self.lengths[0] - self.starts[0]
            count = int(limits[0]) - self.lengths[0]
            self.tokens[0] += script[emitted : emitted + count]
            self.histogram, self.ttft_s = np.array([[0, int(limits[0])]]), 0.0
            self.rounds = np.zeros((1, engine.max_len), np.int32)

    text = "é世🎉a" * 5
    script = engine.tokenizer.encode(text)
    assert len(script) > len(text)
    original = Decoding.advance
    Decoding.advance = Spelling.advance
    try:
        for every in range(1, 9):
            pieces = list(engine.stream("a", every=every, max_tokens=len(script)))
            assert "".join(p.text for p in pieces) == text
            assert not any("\ufffd" in p.text for p in pieces)
        cut = list(engine.stream("a", every=3, max_tokens=len(script) - 2))
        assert "".join(p.text for p in cut).startswith(text[:-2])
    finally:
        Decoding.advance = original


def test_a_closed_stream_leaves_the_engine_usable(engine):
    expected = engine.generate("abc", max_tokens=20, **SAMPLED)
    stream = engine.stream("xyz", every=2, max_tokens=50, ignore_eos=True)
    next(stream)
    stream.close()
    assert engine.generate("abc", max_tokens=20, **SAMPLED).tokens == expected.tokens


def test_open_streams_do_not_meet(engine):
    options = {"max_tokens": 12, "ignore_eos": True, **SAMPLED}
    expected = [engine.generate(p, **options).tokens for p in ("abc", "xyz")]
    streams = [engine.stream(p, every=3, **options) for p in ("abc", "xyz")]
    seen = [(), ()]
    for pieces in zip(*streams, strict=True):
        seen = [tokens + piece.tokens for tokens, piece in zip(seen, pieces, strict=True)]
    assert seen == expected


def test_a_batch_is_its_prompts_apart(engine, clear_prompt, rng):
    prompts = [clear_prompt(rng, 2, 50), "abx", clear_prompt(rng, 2, 9)]
    together = engine.generate(prompts, max_tokens=25)
    assert [o.tokens for o in together] == [
        engine.generate(p, max_tokens=25).tokens for p in prompts
    ]
    twins = engine.generate(["abx"] * 3, max_tokens=25, **SAMPLED)
    assert twins[0].tokens == engine.generate("abx", max_tokens=25, **SAMPLED).tokens
    assert twins[0].tokens != twins[1].tokens


def test_long_prompts_go_in_by_chunks(engine, clear_prompt, rng, monkeypatch):
    """Many passes of a few rows give what one pass gives."""
    prompts = [clear_prompt(rng, 130, 136) for _ in range(3)]
    options = {"max_tokens": 20, "ignore_eos": True}
    whole = [engine.generate(prompt, **options).tokens for prompt in prompts]
    assert (1, 256) in engine._programs
    monkeypatch.setattr(batch, "CHUNKS", (7,))
    try:
        for prompt, right in zip(prompts, whole, strict=True):
            assert engine.generate(prompt, **options).tokens == right
            session = engine.session()
            session.send(prompt[:30], max_tokens=1)
            rest = session.send(prompt[30:], **options).tokens
            assert rest == engine.generate(list(session.tokens[:-20]), **options).tokens
            session.close()
    finally:
        del engine._programs[1, 7]


def test_the_caches_end_is_reported(engine, caplog):
    prompt = [5] * 170
    with caplog.at_level(logging.WARNING, "mimo_jax"):
        output = engine.generate(prompt, max_tokens=50, ignore_eos=True)
    assert output.finish_reason == "length" and len(output.tokens) == 176 - 170
    assert "The cache's end stopped an answer after 6 of max_tokens=50" in caplog.text
    caplog.clear()
    engine.generate(prompt, max_tokens=6, ignore_eos=True)
    assert not caplog.records


def test_nothing_compiles_anew_in_a_bucket(engine, compiles, rng):
    """Not the program, and nothing beside it; and one answer is one launch."""
    engine.generate("a", max_tokens=1)
    program, calls = engine._programs[1, 64], []
    engine._programs[1, 64] = lambda *a: calls.append(1) or program(*a)
    before = len(compiles)
    try:
        for index in range(25):
            output = engine.generate(
                random_prompt(rng, 1, 60),
                max_tokens=int(rng.integers(1, 12)),
                temperature=float(rng.choice([0, 0.5, 2])),
                top_k=int(rng.integers(0, 9)),
                seed=index,
                max_draft=int(rng.integers(0, BLOCK)),
            )
            assert output.stats.compile_s == 0
        assert len(calls) == 25 and len(compiles) == before
    finally:
        engine._programs[1, 64] = program


def test_pieces_larger_than_any_answer(engine):
    options = {"max_tokens": 30, "ignore_eos": True, **SAMPLED}
    expected = engine.generate("abc", **options)
    for every in (176, 2**31 - 1, 2**40):
        pieces = list(engine.stream("abc", every=every, **options))
        assert [piece.tokens for piece in pieces] == [expected.tokens]


def test_a_stream_without_room_is_refused_at_once(engine):
    with pytest.raises(MimoError, match="176 tokens; the cache holds 176"):
        engine.stream([5] * 176)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_tokens": 0}, "max_tokens=0 is not allowed: it must be a whole number, 1 to 2"),
        ({"max_tokens": 2.5}, "max_tokens=2.5"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"temperature": -0.1}, "temperature=-0.1 is not allowed: it must be 0, or 0.0001 or more"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0.0}, "top_p=0.0 is not allowed: it must be 0.0001 to 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -1}, r"top_k=-1 .* 0 \(all\) to 312"),
        ({"top_k": 313}, "top_k=313"),
        ({"seed": 2**32}, "seed=4294967296 .* 0 to 4294967295"),
        ({"seed": -1}, "seed=-1"),
        ({"max_draft": 5}, "max_draft=5 .* 0 to 4"),
        ({"max_draft": 1, "speculative": False}, "max_draft=1 .* as speculative=False says"),
        ({"speculative": 1}, "speculative=1 .* True or False"),
        ({"temprature": 1}, "option 'temprature' is not known; there are max_tokens, temperature"),
    ],
)
def test_options_that_are_not_allowed(engine, options, match):
    with pytest.raises(MimoError, match=match):
        engine.generate("a", **options)
    with pytest.raises(MimoError, match=match):
        engine.stream("a", **options)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("", "The prompt is empty: give at least one character"),
        (["ab", ""], "The prompt is empty"),
        ([], "must be a str, token ids, or a list"),
        ([1, 312], "token id 312 is not in the vocabulary: 0 to 311"),
        ([-1], "token id -1"),
        ([9] * 176, "The prompt has 176 tokens; the cache holds 176, one of them for the answer"),
        ("z" * 400, "larger max_len"),
        ("a\ud800b", "The prompt has half of a surrogate pair"),
    ],
)
def test_prompts_that_are_not_allowed(engine, prompt, match):
    with pytest.raises(MimoError, match=match):
        engine.generate(prompt)
    assert engine.generate("a", max_tokens=2).stats.tokens


@pytest.mark.parametrize(
    "make", [list, tuple, np.asarray, jnp.asarray, lambda ids: [*map(np.int64, ids)]]
)
def test_token_ids_of_any_kind(engine, make):
    """What tokenizers return: lists, arrays, and numpy's own integers."""
    ids = [5, 17, 203, 8]
    expected = engine.generate(ids, max_tokens=6)
    assert engine._prompts(make(ids)) == ([ids], True)
    assert engine.generate(make(ids), max_tokens=6).tokens == expected.tokens


@pytest.mark.parametrize(
    "prompt",
    [
        7,
        None,
        3.5,
        ["ab", 3.5],
        ["ab", None],
        [["ab"]],
        [1, "ab"],
        b"ab",
        [True, 5],
        np.ones(3),
        np.ones((2, 2), int),
    ],
)
def test_what_is_no_prompt(engine, prompt):
    """Past the type checks that only tests have."""
    with pytest.raises(MimoError, match="(?s)prompt=.* is not allowed: it must be a str"):
        engine._prompts(prompt)


def test_pieces_of_no_size(engine):
    for every in (0, -1, 2.0, True):
        with pytest.raises((MimoError, TypeError), match="every"):
            engine.stream("a", every=every)


@pytest.mark.parametrize(("devices", "layout"), [(1, "tensor"), (2, "expert"), (4, "tensor")])
def test_meshes_and_experts_agree(
    engine,
    clear_prompt,
    checkpoint,  # noqa: F811
    devices,
    layout,
    rng,
):
    """Packed experts, on one device or divided over several, give the tokens of dense ones."""
    options = {"devices": devices, "layout": layout, "experts": "packed", "progress": False}
    with mimo_jax.load(checkpoint, **options) as other:
        assert other.experts == "packed" and other.devices == devices
        for _ in range(3):
            prompt = clear_prompt(rng)
            mine, theirs = (e.generate(prompt, max_tokens=40) for e in (engine, other))
            assert mine.tokens == theirs.tokens
            assert theirs.stats.devices == devices and theirs.stats.experts == "packed"


def test_without_a_drafter_the_block_is_one(
    engine,
    clear_prompt,
    checkpoint,  # noqa: F811
    tmp_path,
    capsys,
    rng,
):
    capsys.readouterr()
    with mimo_jax.load(checkpoint, devices=1, drafter=False, max_len=100) as plain:
        assert (plain.block, plain.drafter, plain.max_len) == (1, None, 100)
        prompt = clear_prompt(rng)
        output = plain.generate(prompt, max_tokens=30)
        assert output.stats.acceptance_histogram == (0, output.stats.tokens)
        assert output.tokens == engine.generate(prompt, max_tokens=30).tokens
        with pytest.raises(MimoError, match="max_draft=1 .* 0 to 0"):
            plain.generate("a", max_draft=1)
    said = capsys.readouterr()
    assert not said.out
    for words in ("Loaded", "experts decoded from MXFP4", "Compiling for a batch of 1", "Compiled"):
        assert words in said.err
    mimo_jax.load(write_checkpoint(tmp_path, drafter=False), devices=1).close()
    assert "has no drafter: decoding is plain" in capsys.readouterr().err


def test_the_acceptance_plot(engine):
    pytest.importorskip("matplotlib")
    outputs = engine.generate(["abx", "byz", "c"], max_tokens=30, ignore_eos=True)
    total = np.sum([o.stats.acceptance_histogram for o in outputs], axis=0)[1:]
    for shown in (outputs, [o.stats for o in outputs]):
        bars = plots.acceptance_histogram(shown).axes[0].patches
        np.testing.assert_allclose([bar.get_height() for bar in bars], total / total.sum())
    plots.acceptance_histogram(outputs[0])
    with pytest.raises(MimoError, match="no round to plot"):
        plots.acceptance_histogram([])
