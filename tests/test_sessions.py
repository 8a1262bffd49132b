"""Sessions, and the states that answers are decoded in: kept, lost, read anew, freed, refused."""

import weakref

import jax
import pytest
from test_engine import SAMPLED, check_stats, engine, random_prompt  # noqa: F401
from tiny_checkpoint import checkpoint  # noqa: F401

import mimo_jax
from mimo_jax.errors import MimoError
from mimo_jax.planning import memory


def test_a_session_is_one_long_prompt(engine, rng):  # noqa: F811
    """Each turn answers as `generate` does for all tokens so far; at any temperature."""
    session = engine.session()
    for turn in range(5):
        text = random_prompt(rng, 1, 12)
        before = session.tokens
        options = {"max_tokens": int(rng.integers(1, 20)), "seed": turn, "temperature": turn % 2}
        output = session.send(text, **options)
        expected = engine.generate([*before, *text], **options)
        assert output.tokens == expected.tokens and output.text == expected.text
        check_stats(output, len(text), options["max_tokens"])
        ended = (0,) if output.finish_reason == "stop" else ()
        assert session.tokens == (*before, *text, *output.tokens, *ended)
    held = session.tokens
    with pytest.raises(MimoError, match=f"after the {len(held)} that the session holds"):
        session.send(random_prompt(rng, 176, 177))
    with pytest.raises(MimoError, match="temperature"):
        session.send("a", temperature=-1)
    assert session.tokens == held
    session.close()
    with pytest.raises(MimoError, match="session was closed"):
        session.send("a")


def test_a_session_goes_on_after_an_end(engine, rng):  # noqa: F811
    """The end-of-sequence token stays in the context, and the next turn is answered."""
    for seed in range(2000):  # One answer in six ends.
        session = engine.session()
        first = session.send(random_prompt(rng, 2, 20), temperature=1.5, seed=seed, max_tokens=60)
        if first.finish_reason == "stop":
            break
    assert first.finish_reason == "stop" and session.tokens[-1] == 0
    text, before = random_prompt(rng, 1, 9), session.tokens
    second = session.send(text, max_tokens=15, ignore_eos=True)
    expected = engine.generate([*before, *text], max_tokens=15, ignore_eos=True)
    assert len(second.tokens) == 15 and second.tokens == expected.tokens


@pytest.mark.parametrize("turns", [0, 2])
def test_a_launch_that_never_began(engine, turns, rng, monkeypatch):  # noqa: F811
    """Interrupted while it compiles, say: nothing was added, and the caches hold what they held."""
    session = engine.session()
    for _ in range(turns):
        session.send(random_prompt(rng, 3, 20), max_tokens=5)
    held = session.tokens
    assert bool(held) is bool(turns)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_program", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.send(random_prompt(rng, 20, 40))
    assert session.tokens == held
    text, options = random_prompt(rng, 3, 20), {"max_tokens": 15, "ignore_eos": True, **SAMPLED}
    assert session.send(text, **options).tokens == engine.generate([*held, *text], **options).tokens
    session.close()


def test_one_state_at_a_time(engine, monkeypatch):  # noqa: F811
    """A prompt that is refused leaves it for the next; another batch's comes after it is freed."""
    engine.generate("ab", max_tokens=1)
    state = engine._idle[1]
    with pytest.raises(MimoError, match="larger max_len"):
        engine.generate([5] * 176)
    assert engine._idle[1] is state
    seen, make = [], engine._makers[1]
    leaf = weakref.ref(state.tokens)
    del state
    monkeypatch.setitem(engine._makers, 2, lambda: seen.append(leaf()) or make())
    engine._take(2)
    assert seen == [None]


def test_more_sequences_than_there_is_room_for(engine, monkeypatch):  # noqa: F811
    """Refused with figures before anything is allocated; what fits still does."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._params))
    monkeypatch.setattr(memory, "host_memory", lambda: weights + 20_000_000)
    engine.generate(["a", "b"], max_tokens=1)
    words = r"5000 sequence\(s\) of max_len=176 need .* left: answer fewer at a time"
    with pytest.raises(MimoError, match=words):
        engine.generate(["a"] * 5000, max_tokens=1)
    assert 5000 not in engine._makers


def test_closing_frees_what_is_open(checkpoint):  # noqa: F811
    alone = mimo_jax.load(checkpoint, devices=1, progress=False)
    stream, session = alone.stream("abc", every=1, max_tokens=9, ignore_eos=True), alone.session()
    next(stream)
    leaves = jax.tree.leaves([decoding.state for decoding in alone._decodings])
    alone.close()
    assert len(leaves) > 20 and all(leaf.is_deleted() for leaf in leaves)
    with pytest.raises(MimoError, match="engine was closed"):
        next(stream)
    with pytest.raises(MimoError, match="engine was closed"):
        session.send("a")


def test_a_sessions_stream(engine, rng):  # noqa: F811
    """Whole or stopped, it leaves the session as it showed it; what overtakes it ends it."""
    options = {"max_tokens": 20, "ignore_eos": True, **SAMPLED}
    session = engine.session()
    session.send(random_prompt(rng, 3, 20), max_tokens=5)
    for stop in (False, True):
        before, text = session.tokens, random_prompt(rng, 3, 9)
        expected = engine.generate([*before, *text], **options)
        stream, seen = session.stream(text, every=3, **options), ()
        for piece in stream:
            seen += piece.tokens
            if stop:
                stream.close()
        assert seen == expected.tokens[: len(seen)] and (len(seen) < 20) is stop
        assert session.tokens == (*before, *text, *seen)
    late, open_one = (session.stream("ab", every=2, **options) for _ in range(2))
    next(open_one)
    for stream in (late, open_one):
        session.send("c", max_tokens=2)
        with pytest.raises(MimoError, match="session went on while this stream was open"):
            next(stream)
    with pytest.raises(MimoError, match="that the session holds"):
        session.stream([5] * 175)
    session.close()


def test_an_interrupted_session_goes_on(engine, rng, monkeypatch):  # noqa: F811
    """The caches are lost with the launch; what was said is read anew."""
    session = engine.session()
    session.send(random_prompt(rng, 3, 20), max_tokens=5)
    held = session.tokens

    def interrupted(params, state, request):
        jax.tree.map(lambda leaf: leaf.delete(), state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_program", lambda *_: (interrupted, 0.0))
        with pytest.raises(KeyboardInterrupt):
            session.send(random_prompt(rng, 3, 20))
    assert session.tokens == held
    text, options = random_prompt(rng, 3, 20), {"max_tokens": 15, "ignore_eos": True, **SAMPLED}
    assert session.send(text, **options).tokens == engine.generate([*held, *text], **options).tokens
    with session:
        pass
    with pytest.raises(MimoError, match="session was closed"):
        session.send("a")
