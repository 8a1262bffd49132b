"""The messages and tools of a conversation: checked, and brought into one form."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_jax.errors import MimoError

ROLES = ("system", "user", "assistant", "tool")
KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")

Message = dict[str, Any]


def check_messages(messages: Any) -> list[Message]:
    """Copies a conversation that is to be answered, each message in one form.

    Args:
      messages: dicts with "role" (system, user, assistant or tool) and "content": a str, or a list
        of {"type": "text", "text": str}. An assistant's may have "reasoning_content" and
        "tool_calls" ({"function": {"name", "arguments"}}, the arguments a dict or its JSON), and
        with calls no content. A tool's result follows the assistant's message that called it.

    Returns:
      dicts whose content is a str, whose tool calls are {"type", "function": {"name",
      "arguments": dict}} with their "id" if they had one, and without keys that were None, or
      unknown and empty.

    Raises:
      MimoError: naming the message and what is wrong with it.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise MimoError(
            f"messages={_shown(messages)} is not allowed: it must be a list of messages, "
            '[{"role": "user", "content": "..."}].'
        )
    checked = [check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    _check_order(checked)
    return checked


def _check_order(messages: list[Message]) -> None:
    called = False
    for index, message in enumerate(messages):
        if message["role"] == "tool" and not called:
            raise MimoError(
                f"messages[{index}] is a tool's result, but no assistant message with tool_calls "
                "comes before it: send that message back too, as it was answered."
            )
        if message["role"] != "tool":
            called = bool(message.get("tool_calls"))
    if messages[-1]["role"] not in ("user", "tool"):
        raise MimoError(
            f"the last message is of the role {messages[-1]['role']!r}: a conversation is answered "
            "after a user's message or a tool's result."
        )


def check_message(message: Any, where: str) -> Message:
    """One message in the form that `check_messages` describes; `where` names it in errors."""
    if not isinstance(message, Mapping):
        raise MimoError(
            f"{where}={_shown(message)} is not allowed: a message is a dict with a role."
        )
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    if role not in ROLES:
        raise MimoError(
            f"{where} has role={_shown(role)}, which is not allowed: {', '.join(ROLES)}."
        )
    for key, value in given.items():
        # OpenAI's client returns messages with empty lists of annotations and the like.
        if key not in KEYS and value not in ([], {}, ""):
            raise MimoError(f"{where} has the key {key!r}; known are {', '.join(KEYS)}.")
    checked = {"role": role, "content": _content(given, where)}
    for key in ("reasoning_content", "tool_calls"):
        if key in given and role != "assistant":
            raise MimoError(f"{where} has {key!r}, which only an assistant's message has.")
    for key in ("reasoning_content", "tool_call_id", "name"):
        if key in given:
            checked[key] = check_text(given[key], f"{where}[{key!r}]")
    calls = given.get("tool_calls", ())
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise MimoError(f"{where}['tool_calls']={_shown(calls)} is not allowed: it must be a list.")
    if calls:
        checked["tool_calls"] = [
            _call(call, f"{where}['tool_calls'][{i}]") for i, call in enumerate(calls)
        ]
    return checked


def _content(message: Mapping[str, Any], where: str) -> str:
    """The text of a message."""
    where = f"{where}['content']"
    content = message.get("content")
    if content is None and (message.get("tool_calls") or "reasoning_content" in message):
        return ""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return check_text(content, where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or "text" not in part:
            what = f"of type {kind!r}" if kind else _shown(part)
            raise MimoError(
                f"{where}[{index}] is a part {what}: this engine reads text alone, "
                '{"type": "text", "text": "..."}. Leave images, sound and video out.'
            )
        texts.append(check_text(part["text"], f"{where}[{index}]['text']"))
    return "".join(texts)


def _shown(value: Any) -> str:
    """A value for an error: not all of a long conversation."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_text(value: Any, where: str) -> str:
    """Returns a text, or raises a MimoError that names where it stands."""
    if not isinstance(value, str):
        raise MimoError(f"{where}={_shown(value)} is not allowed: it must be a str.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise MimoError(
            f"{where} has half of a surrogate pair, which is no character: decode the text anew."
        ) from None
    return value


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call as templates expect it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not function.get("name"):
        raise MimoError(
            f"{where}={_shown(call)} is not allowed: a call is "
            '{"function": {"name": "...", "arguments": {...}}}.'
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            pass
    if not isinstance(arguments, Mapping):
        raise MimoError(
            f"{where} has arguments={_shown(arguments)}: they must be a dict, or its JSON."
        )
    arguments = _plain_json(dict(arguments), f"{where}'s arguments")
    checked = {"name": check_text(function["name"], f"{where}'s name"), "arguments": arguments}
    given_id = {"id": check_text(call["id"], f"{where}'s id")} if call.get("id") is not None else {}
    return given_id | {"type": "function", "function": checked}


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Copies a list of tools.

    Args:
      tools: dicts {"type": "function", "function": {"name", "description", "parameters"}}, the
        parameters a JSON schema; or the inner dicts alone; or None.

    Returns:
      the outer dicts; None without a tool.

    Raises:
      MimoError: naming the tool and what is wrong with it.
    """
    if tools is None or (isinstance(tools, Sequence) and not tools):
        return None
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise MimoError(f"tools={_shown(tools)} is not allowed: it must be a list of functions.")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MimoError(
            f"{where}={_shown(tool)} is not allowed: a tool is "
            '{"type": "function", "function": {"name": "...", "parameters": {...}}}.'
        )
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise MimoError(f"{where} has parameters that are not a JSON schema: it must be a dict.")
    return _plain_json({"type": "function", "function": dict(function)}, where)


def _plain_json(value: Any, where: str) -> Any:
    """A deep copy that JSON can hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise MimoError(f"{where} cannot be written as JSON ({error}).") from None
