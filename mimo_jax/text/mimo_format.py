"""The MiMo family's own conversation format, for checkpoints that bring no template.

A turn is <|im_start|>, the role and a newline, the content, <|im_end|>; the next follows without a
newline. An assistant's turn has its reasoning between <think> and </think>, with nothing there if
there was none, then the content, then its tool calls. The wording that introduces tools is ours:
released checkpoints bring a template, with the wording that they were trained on.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mimo_jax.text.parts import Part, merge

SYSTEM = "You are MiMo, a helpful AI assistant engineered by Xiaomi."
"""The system turn's content where a conversation has none."""

START, END = Part("<|im_start|>", True), Part("<|im_end|>", True)
THINK, THOUGHT = Part("<think>", True), Part("</think>", True)
CALL, CALLED = Part("<tool_call>", True), Part("</tool_call>", True)
RESULT, RESULT_END = Part("<tool_response>", True), Part("</tool_response>", True)

NEEDED = (START, END, THINK, THOUGHT)
"""Tokens without which a model has not been trained on this format."""


def render(
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    *,
    thinking: bool = True,
    keep_all_reasoning: bool = True,
    compact: bool = False,
) -> list[Part]:
    """The parts of a conversation, up to where the assistant is to go on.

    Args:
      messages: from `check_messages`.
      tools: from `check_tools`.
      thinking: False closes the think block at once.
      keep_all_reasoning: False drops the reasoning of turns before the last user's message.
      compact: tool calls without newlines between their parts, as V2.6 writes them; V2-Flash and
        V2.5 have newlines.
    """
    parts: list[Part] = []
    turns = list(messages)
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else SYSTEM
    listing = _tool_listing(tools, compact) if tools else ()
    parts += [START, Part(f"system\n{system}"), *listing, END]
    last_user = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    for index, turn in enumerate(turns):
        if turn["role"] == "tool":
            parts += _result(turns, index)
        elif turn["role"] == "assistant":
            reasons = keep_all_reasoning or index > last_user
            parts += _assistant(turn, reasons, compact)
        else:
            parts += [START, Part(f"{turn['role']}\n{turn['content']}"), END]
    parts += [START, Part("assistant\n"), *(() if thinking else (THINK, THOUGHT))]
    return merge(parts)


def _assistant(turn: dict[str, Any], reasons: bool, compact: bool) -> Iterator[Part]:
    reasoning = turn.get("reasoning_content", "") if reasons else ""
    yield from (START, Part("assistant\n"), THINK, Part(reasoning), THOUGHT)
    yield Part(turn["content"])
    for call in turn.get("tool_calls", ()):
        function = call["function"]
        yield from render_call(function["name"], function["arguments"], compact)
    yield END


def render_call(name: str, arguments: dict[str, Any], compact: bool = False) -> list[Part]:
    """A tool call's parts. Lists and objects are written as JSON, all else as it is."""
    line = "" if compact else "\n"
    inner = [f"{line}<function={name}>{line}"]
    for key, value in arguments.items():
        inner.append(f"<parameter={key}>{_as_text(value)}</parameter>{line}")
    return [CALL, Part("".join([*inner, f"</function>{line}"])), CALLED]


def _result(turns: list[dict[str, Any]], index: int) -> Iterator[Part]:
    """A tool's result; neighbours share a turn."""
    if index == 0 or turns[index - 1]["role"] != "tool":
        yield from (START, Part("tool\n"))
    yield from (RESULT, Part(f"\n{turns[index]['content']}\n"), RESULT_END, Part("\n"))
    if index + 1 == len(turns) or turns[index + 1]["role"] != "tool":
        yield END


def _tool_listing(tools: Sequence[dict[str, Any]], compact: bool) -> Iterator[Part]:
    """The section on tools at the end of the system turn."""
    functions = "".join(_function(tool["function"]) for tool in tools)
    yield Part(
        "\n\n# Tools\n\nThese functions can be called to help with what the user asks for:\n\n"
        f"<tools>{functions}\n</tools>\n\n"
        "A call is written like this, each value exactly as it is to be passed, line breaks and "
        "spaces included:\n"
    )
    yield from render_call("function_name", {"parameter_name": "value"}, compact)
    yield Part("\nCalls come after the think block, never inside of it.")


def _function(function: dict[str, Any]) -> str:
    """One tool, as XML: its name, its description, its parameters with their schemas' fields."""
    lines = ["", "<function>", _element("name", function["name"])]
    if function.get("description") is not None:
        lines.append(_element("description", function["description"]))
    lines.append("<parameters>")
    schema = function.get("parameters") or {}
    properties = schema.get("properties") or {}
    for name, fields in (properties if isinstance(properties, dict) else {}).items():
        lines += ["<parameter>", _element("name", name)]
        if isinstance(fields, dict):
            first = [key for key in ("type", "description") if key in fields]
            rest = [key for key in fields if key not in ("name", "type", "description")]
            lines += [_element(key, fields[key]) for key in first + rest]
        lines.append("</parameter>")
    lines += [_element(k, v) for k, v in schema.items() if k not in ("type", "properties")]
    lines.append("</parameters>")
    known = ("type", "name", "description", "parameters")
    lines += [_element(k, v) for k, v in function.items() if k not in known]
    return "\n".join([*lines, "</function>"])


def _element(key: str, value: Any) -> str:
    text = _as_text(value)
    return f"<{key}>{text.strip() if key == 'description' else text}</{key}>"


def _as_text(value: Any) -> str:
    """Lists and objects as JSON, all else as Python prints it: True, not true, in this family."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
