"""Conversations on the engine: answers, streams and sessions agree, whatever tokens come out."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from tiny_checkpoint import CONFIG, write_checkpoint

import mimo_jax
from mimo_jax.decode.batch import Decoding
from mimo_jax.errors import MimoError
from mimo_jax.text.answer import ToolCall, parse
from mimo_jax.text.chat import ChatFormat
from mimo_jax.text.messages import check_messages

MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>")
MARKUP += ("</tool_response>",)
LONG = dataclasses.replace(CONFIG, max_position_embeddings=600)
FAVOURED = "".join(MARKUP) + "<|im_end|><=>fé"
SHORT = [{"role": "system", "content": "s"}, {"role": "user", "content": "abx"}]
HOT = {"temperature": 1.3, "max_tokens": 40}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint that knows conversations, in MiMo's own format."""
    folder = tmp_path_factory.mktemp("chat")
    return write_checkpoint(folder, config=LONG, added=MARKUP, favoured=FAVOURED)


@pytest.fixture(scope="module")
def engine(directory):
    with mimo_jax.load(directory, devices=1, progress=False) as engine:
        yield engine


@pytest.fixture
def scripted(engine, monkeypatch):
    """Makes the next answers say given texts, token by token, and end."""
    texts: list[str] = []

    def advance(self, pauses):
        if len(self.tokens[0]) == self.starts[0]:
            script = engine.tokenizer.encode(texts.pop(0), specials=True)
            end = next((i for i, id in enumerate(script) if id in self.eos_ids), len(script))
            self.script = script[: end + 1]
        emitted = len(self.tokens[0]) - int(self.starts[0])
        until = int(min(pauses[0], self.limits[0])) - int(self.starts[0])
        assert self.script[emitted:until], "the script is at its end, the answer is not"
        self.tokens[0] += self.script[emitted:until]
        ended = self.tokens[0][-1] in self.eos_ids
        self.done = np.array([ended])
        self.histogram, self.wall_s, self.ttft_s = np.array([[0, until]]), 1.0, 1.0
        self.rounds = np.zeros((1, engine.max_len), np.int32)

    monkeypatch.setattr(Decoding, "advance", advance)
    return texts


def without_stats(output):
    return {key: value for key, value in dataclasses.asdict(output).items() if key != "stats"}


def test_a_chat_is_its_prompt_generated(engine, rng):
    """The tokens are those of `generate` for the rendered prompt; the rest follows from them."""
    for thinking in (True, False):
        for _ in range(4):
            seed = int(rng.integers(2**32))
            output = engine.chat(SHORT, thinking=thinking, seed=seed, **HOT)
            close = "<think></think>" if not thinking else ""
            text = "<|im_start|>system\ns<|im_end|><|im_start|>user\nabx<|im_end|>"
            text += f"<|im_start|>assistant\n{close}"
            prompt = engine.tokenizer.encode(text, specials=True)
            assert output.stats.prompt_tokens == len(prompt)
            plain = engine.generate(prompt, seed=seed, ignore_eos=True, **HOT).tokens
            assert plain[: len(output.tokens)] == output.tokens
            ended = plain[len(output.tokens)] if len(output.tokens) < len(plain) else None
            assert ended in (engine.chat_stop_ids if ended is not None else (None,))
            assert not set(output.tokens) & set(engine.chat_stop_ids)
            answer = parse(output.text)
            for name in ("content", "reasoning", "tool_calls", "problems"):
                assert getattr(output, name) == getattr(answer, name)
            assert str(output) == output.content


def test_a_stream_is_the_chat(engine, rng):
    """For every size of piece: random tokens, markup among them, cut anywhere."""
    for _ in range(25):
        options = {"seed": int(rng.integers(2**32)), **HOT}
        thinking = bool(rng.integers(2))
        whole = engine.chat(SHORT, thinking=thinking, **options)
        every = int(rng.integers(1, 9))
        *deltas, last = engine.chat_stream(SHORT, thinking=thinking, every=every, **options)
        assert without_stats(last.output) == without_stats(whole)
        assert all(delta.output is None for delta in deltas)
        joined = ["".join(getattr(d, n) for d in [*deltas, last]) for n in ("content", "reasoning")]
        assert joined == [whole.content, whole.reasoning]
        assert sum((d.tool_calls for d in [*deltas, last]), ()) == whole.tool_calls


def test_both_stop_tokens_end_an_answer(engine, scripted):
    for end in ("<|im_end|>", "<|endoftext|>"):
        scripted.append(f"ab{end}cd")
        output = engine.chat(SHORT)
        assert (output.content, output.finish_reason) == ("ab", "stop")
    assert engine.chat_stop_ids == (0, 2) and engine.eos_ids == (0,)


def test_calls_of_tools_and_their_results(engine, scripted):
    call = "<tool_call>\n<function=f>\n<parameter=a>1\n</parameter>\n</function>\n</tool_call>"
    scripted += [f"<think>é</think>b\n{call}<|im_end|>", "done<|im_end|>"]
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}]
    output = engine.chat(SHORT, tools=tools)
    assert output.tool_calls == (ToolCall("f", {"a": "1\n"}),)
    assert (output.content, output.reasoning) == ("b\n", "é")
    assert (output.finish_reason, output.problems) == ("tool_calls", ())
    assert output.message == {
        "role": "assistant",
        "content": "b\n",
        "reasoning_content": "é",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "1\n"}}}],
    }
    history = [*SHORT, output.message, {"role": "tool", "content": "7"}]
    assert engine.chat(history, tools=tools).message == {"role": "assistant", "content": "done"}
    # What was said is written in the history exactly as it was said.
    rendered = engine._chat_prompt(history, tools, True, True)
    assert f"assistant\n{output.text}<|im_end|>" in "".join(p.text for p in rendered.parts)


def test_an_answer_without_end_is_reported(engine, scripted):
    scripted.append("<think>abc")
    output = engine.chat(SHORT, max_tokens=3)
    assert (output.finish_reason, output.reasoning) == ("length", "ab")
    assert output.problems == ("the think block was not closed",)


def test_the_default_budget_is_the_cache(engine, scripted, caplog):
    """No warning: nobody asked for more."""
    scripted += ["<" * 600, "a<|im_end|>", "<" * 600, "<"]
    with caplog.at_level(logging.WARNING, "mimo_jax"):
        output = engine.chat(SHORT)
        assert output.stats.prompt_tokens + len(output.tokens) == engine.max_len == 600
        session = engine.chat_session(system="s")
        session.send("ab", max_tokens=9)
        assert session.send("ab").finish_reason == "length"
        assert len(session._decoding.tokens[0]) == 600
    assert not caplog.records
    with pytest.raises(MimoError, match="Shorten it, or load with a larger max_len"):
        session.send("ab")
    assert len(session.messages) == 5
    session.reset("t")
    assert session.send("ab", max_tokens=1).content == "<"


def test_what_is_not_allowed_is_said_at_once(engine):
    for use in (engine.chat, engine.chat_stream):
        with pytest.raises(MimoError, match="temperature=-1"):
            use(SHORT, temperature=-1)
        with pytest.raises(MimoError, match="the last message is of the role 'assistant'"):
            use([*SHORT, {"role": "assistant", "content": "a"}])
        with pytest.raises(MimoError, match="tools=3"):
            use(SHORT, tools=3)
        with pytest.raises(MimoError, match="the cache holds 600"):
            list(use([{"role": "user", "content": "z" * 900}]))
    with pytest.raises(MimoError, match="every=0"):
        engine.chat_stream(SHORT, every=0)
    with pytest.raises(MimoError, match="tools=3"):
        engine.chat_session(tools=3)
    session = engine.chat_session()
    for message in (3, None, [], {"role": "user"}, "\ud800"):
        with pytest.raises(MimoError):
            session.send(message)
    with pytest.raises(MimoError, match="every=0"):
        session.stream("a", every=0)
    with pytest.raises(MimoError, match="max_tokens=0"):
        session.stream("a", max_tokens=0)
    with pytest.raises(MimoError, match="the system message"):
        session.reset("\ud800")
    assert session.messages == []


@pytest.fixture
def read(engine, monkeypatch):
    """How many tokens each answer had to read."""
    counts: list[int] = []
    original = Decoding.append

    def append(self, prompts, options):
        original(self, prompts, options)
        counts.append(len(prompts[0]))

    monkeypatch.setattr(Decoding, "append", append)
    return counts


def test_a_session_reads_only_what_is_new(engine, read, scripted, caplog):
    """A turn reads <|im_end|> if need be, the user's words and the header; or everything anew."""
    scripted += ["<think>r</think>one<|im_end|>", "<think></think>two", "three", "four<|im_end|>"]
    session = engine.chat_session(system="s")
    turn = len(
        engine.tokenizer.encode("<|im_start|>user\nab<|im_end|><|im_start|>assistant\n", True)
    )
    session.send("ab")
    first = read.pop()
    session.send("ab", max_tokens=5)
    assert read.pop() == turn
    with caplog.at_level(logging.DEBUG, "mimo_jax"):
        session.send("ab", max_tokens=4)
        assert read.pop() == turn + 1, "the answer before was cut off: <|im_end|> is read too"
        assert not [r for r in caplog.records if "read anew" in r.message]
        # The answer had no think block, and the history has: the caches do not hold that.
        session.send("ab")
        assert read.pop() > first + 2 * turn
        assert "does not begin with what is held: it is read anew" in caplog.text
    contents = [m["content"] for m in session.messages]
    assert contents == ["s", "ab", "one", "ab", "two", "ab", "thre", "ab", "four"]
    session.reset("s")
    scripted.append("five<|im_end|>")
    session.send("ab")
    assert read.pop() == first and len(session.messages) == 3


def test_a_session_is_the_chat_of_its_messages(engine, read, rng):
    """Reading only what is new changes no token; without thinking most turns go on."""
    longest = 0
    for number in range(40):
        # Most turns go on, but not in every four conversations of a random model.
        if number >= 4 and longest:
            break
        session = engine.chat_session(system="s", thinking=False)
        for turn in range(3):
            seed, temperature = int(rng.integers(2**31)), float(rng.choice([0, 1.3]))
            options = {"seed": seed, "temperature": temperature, "max_tokens": 12}
            history = [*session.messages, {"role": "user", "content": "ab"}]
            said = session.send("ab", **options)
            held, count = session._decoding.tokens[0], read[-1]
            if len(held) == count + len(said.tokens) + (said.finish_reason != "length"):
                alone = engine.chat(history, thinking=False, **options)
                assert without_stats(alone) == without_stats(said)
            else:
                # Spelling out what is held need not give the tokens that are held; these count.
                prompt = held[: len(held) - said.stats.tokens]
                alone = engine.generate(prompt, **options, ignore_eos=True).tokens
                assert alone[: len(said.tokens)] == said.tokens
                longest = max(longest, turn)
            assert session.messages == check_messages([*history, said.message, history[-1]])[:-1]
        session.close()
    assert longest > 0, "no turn went on: the test shows nothing"


def test_a_stopped_stream_stays_in_the_conversation(engine, read, scripted):
    scripted += ["<think>long thoughts</think>", "<think></think>b<|im_end|>"]
    session = engine.chat_session(system="s")
    stream = session.stream("ab", every=3)
    said = [next(stream), next(stream)]
    stream.close()
    assert session.messages[-1]["reasoning_content"] == "".join(d.reasoning for d in said) != ""
    assert session.messages[-1]["content"] == ""
    session.send("c")
    turn = "</think><|im_end|><|im_start|>user\nc<|im_end|><|im_start|>assistant\n"
    assert read[-1] == len(engine.tokenizer.encode(turn, specials=True))
    assert len(session.messages) == 5


def test_an_interrupted_launch_keeps_what_was_said(engine, scripted, monkeypatch):
    """The caches are lost then; the conversation is not, and is read anew."""
    scripted += ["hello<|im_end|>", "<think></think>b<|im_end|>", "<think></think>c<|im_end|>"]
    session = engine.chat_session(system="s")
    advance = Decoding.advance

    def interrupted(self, pauses):
        self.state = None
        raise KeyboardInterrupt

    stream = session.stream("ab", every=2)
    next(stream)
    monkeypatch.setattr(Decoding, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert session.messages[1:] == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "he"},
    ]
    with pytest.raises(KeyboardInterrupt):
        session.send("cd")
    assert len(session.messages) == 3, "nothing was said: as if nothing had been asked"
    monkeypatch.setattr(Decoding, "advance", advance)
    assert session.send("cd").content == "b"
    assert engine.chat(SHORT).content == "c"


def test_streams_that_the_conversation_overtook(engine, scripted):
    scripted += ["<think></think>abcdef<|im_end|>", "<think></think>b<|im_end|>"]
    session = engine.chat_session(system="s")
    first, second = session.stream("ab", every=2), session.stream("ab", every=2)
    next(first)
    with pytest.raises(MimoError, match="went on while this stream was open"):
        next(second)
    session.send("cd")
    assert len(session.messages) == 3 and session.messages[1]["content"] == "cd"
    with pytest.raises(MimoError, match="went on while this stream was open"):
        next(first)
    assert len(session.messages) == 3


def test_any_tokens_are_survived(engine, rng):
    """A random model says anything: sessions and streams go on, and the history stays valid."""
    for _ in range(6):
        session = engine.chat_session(system="s", thinking=bool(rng.integers(2)))
        for turn in range(3):
            options = {"seed": int(rng.integers(2**32)), "temperature": 1.5, "max_tokens": 12}
            stream = session.stream("ab", every=int(rng.integers(1, 9)), **options)
            for _ in stream:
                if rng.random() < 0.1:
                    stream.close()
            assert len(session.messages) == 3 + 2 * turn
            assert session.messages[-1]["role"] == "assistant"
            check_messages([*session.messages, {"role": "user", "content": ""}])
            json.dumps(session.messages)
        session.close()


def test_the_checkpoints_template_and_defaults(directory, engine, tmp_path, scripted):
    """A template beside config.json is used, as are the sampling and the ends it comes with."""
    other = ChatFormat
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "[{{ tools | length if tools else enable_thinking }}]<think>"
    )
    end = engine.tokenizer.encode("f")
    values = {"temperature": 0.7, "top_p": 0.9, "eos_token_id": [2, *end]}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    held, engine._format = engine._format, other.open(tmp_path, engine.tokenizer)
    try:
        assert engine.chat_stop_ids == (0, 2, *end)
        scripted += ["r</think>abf", "no end"]
        output = engine.chat(SHORT)
        assert (output.content, output.reasoning, output.finish_reason) == ("ab", "r", "stop")
        prompt = engine._chat_prompt(SHORT, None, False, True)
        assert prompt.parts == (("[system]s[user]abx[False]", False), ("<think>", True))
        decoding = mimo_jax.decode.chat.chat_options(engine, {}, 10)
        assert (decoding.temperature, decoding.top_p, decoding.max_tokens) == (0.7, 0.9, 590)
        engine._format = other(engine.tokenizer, generation={"temperature": "hot"}, where="there")
        words = "there/generation_config.json cannot be used: temperature='hot' is not allowed"
        with pytest.raises(MimoError, match=words):
            engine.chat(SHORT)
        assert mimo_jax.decode.chat.chat_options(engine, {"temperature": 0.5}, 10).temperature
        many = other(engine.tokenizer, generation={"eos_token_id": list(range(20))})
        engine._format = many
        with pytest.raises(MimoError, match="has 20 tokens that end an answer"):
            engine.chat(SHORT)
    finally:
        engine._format = held


def test_a_base_model_says_so(tmp_path):
    """As the shipped checkpoints/mimo-nano: it has <|im_end|> but knows no conversations."""
    with mimo_jax.load(write_checkpoint(tmp_path), devices=1, progress=False) as base:
        for use in (lambda: base.chat(SHORT), base.chat_session):
            with pytest.raises(MimoError, match="lacks <think>, </think>: it is a base model"):
                use()


def test_a_closed_engine_and_a_closed_session(directory, scripted, engine):
    scripted += ["<think></think>a<|im_end|>", "<think></think>b<|im_end|>"]
    session = engine.chat_session()
    session.send("ab")
    session.close()
    session.close()
    assert session.send("cd").content == "b" and len(session.messages) == 4
    closed = mimo_jax.load(directory, devices=1, progress=False)
    session = closed.chat_session()
    closed.close()
    for use in (lambda: closed.chat(SHORT), closed.chat_session, lambda: session.send("a")):
        with pytest.raises(MimoError, match="engine was closed"):
            use()
