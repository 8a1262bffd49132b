"""Messages and tools: one form for all that is allowed, words for what is not."""

import pytest

from mimo_jax.errors import MimoError
from mimo_jax.text.messages import check_messages, check_tools

USER = {"role": "user", "content": "u"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


def test_one_form():
    messages = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "user", "content": "u", "name": "n", "tool_calls": None},
        {"role": "assistant", "content": None, "reasoning_content": "r"},
        {"role": "user", "content": ""},
        {"role": "assistant", "tool_calls": [{"id": "7", "name": "f", "arguments": '{"a": 1}'}]},
        {"role": "tool", "content": "t", "tool_call_id": "7"},
    ]
    call = {"id": "7", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert check_messages(messages) == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "u", "name": "n"},
        {"role": "assistant", "content": "", "reasoning_content": "r"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "t", "tool_call_id": "7"},
    ]


def test_what_a_client_adds_and_leaves_empty():
    """A message as OpenAI's client returns it, sent back."""
    more = {"annotations": [], "refusal": None, "audio": None, "function_call": {}}
    answer = {"role": "assistant", "content": "a"}
    assert check_messages([USER, answer | more, USER])[1] == answer
    with pytest.raises(MimoError, match="has the key 'annotations'"):
        check_messages([USER, answer | {"annotations": [1]}, USER])


def test_what_is_checked_is_a_copy():
    arguments = {"a": [1]}
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    checked = check_messages([USER, call, USER])
    checked[1]["tool_calls"][0]["function"]["arguments"]["a"].append(2)
    assert arguments == {"a": [1]}


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hello", "must be a list of messages"),
        ([], "must be a list of messages"),
        (None, "must be a list of messages"),
        (["u"], r"messages\[0\]='u' is not allowed: a message is a dict"),
        ([{"content": "u"}], r"messages\[0\] has role=None.*system, user, assistant, tool"),
        ([{"role": ["user"], "content": "u"}], "role="),
        ([USER, {"role": "developer", "content": "u"}], r"messages\[1\] has role='developer'"),
        ([{"role": "user"}], r"messages\[0\]\['content'\]=None is not allowed: it must be a str"),
        ([{"role": "user", "content": 3}], "=3 is not allowed"),
        ([{"role": "assistant", "content": None}, USER], "must be a str"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url': .* text alone"),
        ([{"role": "user", "content": ["u"]}], "reads text alone"),
        ([{"role": "user", "content": [{"type": "text"}]}], "reads text alone"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "must be a str"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
        ([USER | {"temperature": 1}], "has the key 'temperature'; known are role"),
        ([USER | {"reasoning_content": "r"}], "which only an assistant's message has"),
        ([USER | {"tool_calls": [{"name": "f"}]}], "which only an assistant's message has"),
        ([USER, {"role": "assistant", "content": "a"}], "the last message is of the role 'assist"),
        ([{"role": "system", "content": "a"}], "the last message is of the role 'system'"),
        ([USER, {"role": "tool", "content": "t"}], r"messages\[1\] is a tool's result, but no"),
        ([CALLING, USER, {"role": "tool", "content": "t"}], r"messages\[2\] is a tool's result"),
        ([USER, CALLING | {"tool_calls": "f"}, USER], "must be a list"),
        ([USER, CALLING | {"tool_calls": ["f"]}, USER], r"tool_calls'\]\[0\]='f' is not allowed"),
        ([USER, CALLING | {"tool_calls": [{"function": {}}]}, USER], "a call is"),
        ([USER, CALLING | {"tool_calls": [{"name": 3}]}, USER], "must be a str"),
        (
            [USER, CALLING | {"tool_calls": [{"name": "f", "arguments": "{"}]}, USER],
            "arguments='{': they must be a dict",
        ),
        (
            [USER, CALLING | {"tool_calls": [{"name": "f", "arguments": [1]}]}, USER],
            "they must be a dict",
        ),
        (
            [USER, CALLING | {"tool_calls": [{"name": "f", "arguments": {"a": {1}}}]}, USER],
            "cannot be written as JSON",
        ),
    ],
)  # fmt: skip
def test_messages_that_are_not_allowed(messages, match):
    with pytest.raises(MimoError, match=match):
        check_messages(messages)


def test_long_values_are_cut_in_errors():
    with pytest.raises(MimoError) as error:
        check_messages("x" * 10**6)
    assert len(str(error.value)) < 500


def test_tools():
    outer = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert check_tools([outer, {"name": "g"}]) == [
        outer,
        {"type": "function", "function": {"name": "g"}},
    ]
    assert check_tools(None) is None and check_tools([]) is None
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    bad = [3, "f", ["f"], [{}], [{"name": 3}], [{"name": "f", "parameters": "p"}]]
    bad += [[{"name": "f", "x": float("nan")}], [{"name": "f", "x": "\ud800"}]]
    for tools in [*bad, [{"name": "f", "x": deep}]]:
        with pytest.raises(MimoError, match="tools"):
            check_tools(tools)
