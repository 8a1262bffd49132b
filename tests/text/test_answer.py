"""The parser of answers: built answers come apart as they were built, wherever they are cut."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.text.answer import Answer, AnswerParser, Delta, ToolCall, parse

MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "</function>", "<parameter=k>"]
PIECES = st.sampled_from([*MARKERS, "<function=f>", "</parameter>", "<", "ab", " ", "\n", "é漢"])
SOUP = st.lists(PIECES, max_size=14).map("".join)
"""Text in which markers stand, and begin, where they should not."""

NAME = st.text(st.characters(exclude_characters="<>\n", exclude_categories=["Cs"]), min_size=1)
PLAIN = st.text(st.sampled_from("ab <>/\n_=é漢🙂"), max_size=12)
VALUE = st.one_of(
    PLAIN, SOUP.map(lambda s: re.sub("</parameter>|</?tool_call>|<parameter=", "", s))
)
ARGUMENTS = st.dictionaries(NAME, VALUE, max_size=3)


def spelled(call: ToolCall, line: str) -> str:
    """A call as a model writes it, with newlines between its parts or nothing."""
    inner = "".join(f"<parameter={k}>{v}</parameter>{line}" for k, v in call.arguments.items())
    return f"<tool_call>{line}<function={call.name}>{line}{inner}</function>{line}</tool_call>"


def in_pieces(text: str, cuts: list[int], in_think: bool = False) -> tuple[Answer, list[Delta]]:
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parser = AnswerParser(in_think)
    deltas = [parser.push(text[a:b]) for a, b in zip(places, places[1:], strict=False)]
    deltas.append(parser.finish())
    return parser.answer, deltas


def joined(deltas: list[Delta]) -> tuple[str, str, tuple[ToolCall, ...]]:
    content, reasoning = ("".join(getattr(d, n) for d in deltas) for n in ("content", "reasoning"))
    return content, reasoning, sum((d.tool_calls for d in deltas), ())


@settings(max_examples=60)
@given(SOUP.map(lambda s: s[:70]), st.booleans())
def test_every_cut_gives_the_same(text, in_think):
    """Any two pieces, single characters, and all at once; the deltas add up to the answer."""
    whole = parse(text, in_think)
    for cuts in [[place] for place in range(len(text) + 1)] + [list(range(len(text)))]:
        answer, deltas = in_pieces(text, cuts, in_think)
        assert answer == whole
        assert joined(deltas) == (whole.content, whole.reasoning, whole.tool_calls)


@given(SOUP, st.lists(st.integers(0, 999), max_size=6))
def test_what_was_said_is_never_taken_back(text, cuts):
    """At any time the deltas so far are the beginning of the answer."""
    whole = parse(text)
    _, deltas = in_pieces(text, cuts)
    for count in range(len(deltas) + 1):
        content, reasoning, calls = joined(deltas[:count])
        assert whole.content.startswith(content) and whole.reasoning.startswith(reasoning)
        assert whole.tool_calls[: len(calls)] == calls


@given(SOUP, st.booleans())
def test_no_text_is_lost(text, in_think):
    """All but white space and the markup of what was understood is in the answer."""
    answer = parse(text, in_think)
    kept = sorted("".join((answer.content + answer.reasoning).split()))
    for call in answer.tool_calls:
        kept += "".join(spelled(call, "").split())
    for marker in ("<think>", "</think>"):
        if text.count(marker) > (answer.content + answer.reasoning).count(marker) + sum(
            v.count(marker) for c in answer.tool_calls for v in c.arguments.values()
        ):
            kept += marker
    assert sorted(kept) == sorted("".join(text.split()))


@given(
    st.one_of(st.none(), PLAIN),
    PLAIN.filter(lambda t: not "<think>".startswith(t.lstrip()) or not t.strip()),
    st.lists(st.builds(ToolCall, NAME, ARGUMENTS), max_size=3),
    st.sampled_from(["", "\n"]),
    st.sampled_from(["", "\n", " \n "]),
    st.booleans(),
)
def test_answers_come_apart_as_they_were_built(reasoning, content, calls, line, gap, in_think):
    """Both styles of newlines; values keep every character."""
    if reasoning is None and in_think:
        reasoning = ""
    think = "" if reasoning is None else f"<think>{reasoning}</think>"
    think = think.removeprefix("<think>") if in_think else think
    text = think + content + gap.join(spelled(call, line) for call in calls)
    answer = parse(text + (gap if calls else ""), in_think)
    assert answer == Answer(content, reasoning or "", tuple(calls))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Answer()),
        ("hello", Answer("hello")),
        (" <think>a</think>b", Answer("b", "a")),
        ("<think></think>b", Answer("b")),
        ("x<think>a</think>b", Answer("x<think>a</think>b")),
        ("<think>a</think><think>b</think>", Answer("<think>b</think>", "a")),
        ("<think>a<tool_call>b</think>c", Answer("c", "a<tool_call>b")),
        ("a</think>b", Answer("a</think>b")),
        ("  \n", Answer("  \n")),
        ("<thin", Answer("<thin")),
        ("a<tool_cal", Answer("a<tool_cal")),
    ],
)
def test_think_blocks_and_loose_ends(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("inner", "problem"),
    [
        ("", "does not begin with <function=NAME>"),
        ("<function=>x</function>", "does not begin with"),
        ('{"name": "f"}', "does not begin with"),
        ("<function=f>", "before </function>"),
        ("<function=f><parameter=a>1</function>", "before </function>"),
        ("<function=f><parameter=a>1</parameter>x</function>", "before </function>"),
        ("<function=f></function><function=g></function>", "before </function>"),
        (
            "<function=f><parameter=a>1</parameter><parameter=a>2</parameter></function>",
            "has the parameter 'a' twice",
        ),
        ("<function=f><parameter=a><tool_call><function=g></function>", "before </function>"),
        ("<function=f><parameter=a>1<parameter=b>2</parameter></function>", "inside of 'a'"),
    ],
)
def test_malformed_calls_are_content_and_named(inner, problem):
    """What stands around them stays in its place; the calls beside them count."""
    good = ToolCall("g", {"x": "1\n"})
    bad = f"<tool_call>{inner}</tool_call>"
    text = f"a\n{spelled(good, '')}\n{bad}\n{spelled(good, '')}\n"
    answer = parse(text)
    assert answer.content == f"a\n\n{bad}\n" and answer.tool_calls == (good, good)
    assert len(answer.problems) == 1
    assert answer.problems[0].startswith("tool call 2") and problem in answer.problems[0]


def test_a_call_inside_of_a_value_is_never_made():
    """A value that spells </tool_call> spoils its call; what is left does not become one."""
    inner = spelled(ToolCall("rm", {"path": "/"}), "")
    answer = parse(spelled(ToolCall("write", {"text": f"like {inner} so"}), "\n"))
    assert answer.tool_calls == ()
    assert answer.problems == ("tool call 1 has another call or parameter inside of 'text'",)
    assert answer.content.count("<tool_call>") == 2


def test_what_was_not_closed_is_said():
    assert parse("<think>abc</thin") == Answer(
        "", "abc</thin", (), ("the think block was not closed",)
    )
    assert parse("", in_think=True).problems == ("the think block was not closed",)
    good = ToolCall("f", {})
    text = "a" + spelled(good, "") + "\n<tool_call><function=f>"
    answer = parse(text)
    assert answer.content == "a\n<tool_call><function=f>" and answer.tool_calls == (good,)
    assert answer.problems == ("tool call 2 was not closed",)


def test_a_stream_shows_text_at_once():
    """Nothing is kept back but what may be markup."""
    parser = AnswerParser()
    assert parser.push("<think>ab") == Delta(reasoning="ab")
    assert parser.push("c</") == Delta(reasoning="c")
    assert parser.push("think>d <") == Delta(reasoning="", content="d ")
    assert parser.push("e") == Delta(content="<e")
    call = ToolCall("f", {"k": "v"})
    assert parser.push(f"g{spelled(call, '')[:-1]}") == Delta(content="g")
    assert parser.push(">") == Delta(tool_calls=(call,))
    assert parser.push("\n") == Delta() and parser.push("h") == Delta(content="\nh")
    assert parser.finish() == Delta()
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.name = ""


def test_a_long_value_in_single_characters():
    """It is put aside while it comes; its end is found although it is cut."""
    call = ToolCall("f", {"k": "x</too l_call>" * 200})
    parser = AnswerParser()
    deltas = [parser.push(character) for character in spelled(call, "\n")]
    assert deltas.pop() == Delta(tool_calls=(call,)) and set(deltas) == {Delta()}
