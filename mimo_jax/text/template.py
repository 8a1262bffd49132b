"""Chat templates of checkpoints: found, and rendered in a process that cannot harm this one."""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_jax.errors import MimoError
from mimo_jax.json_files import parse_json
from mimo_jax.text.parts import Part, merge, split
from mimo_jax.text.sandbox import LONGEST

TIME_S = 10.0
"""Seconds that rendering may take, the start of its process included."""

LARGEST = 1 << 20
"""Bytes of a template's file."""

BREAKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Characters that Unicode keeps for programs' own use: they are in no text."""

MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Control tokens that templates look for in an assistant's content, and take apart."""

_REMEDY = "Use the template of the model's publisher."

_WHY = {
    "refused": ("does not accept this conversation", "Change the messages as it says."),
    "unsafe": ("tries to leave its sandbox and is refused", _REMEDY),
    "syntax": ("cannot be read", _REMEDY),
    "memory": ("was stopped", _REMEDY),
    "error": ("failed", f"Change the messages if they are at fault. {_REMEDY}"),
}
"""What happened, and the way out, by the kind of error that `sandbox.reply` gives."""


class Renderer:
    """Renders templates in a process of its own, started when first needed.

    A template has `TIME_S` seconds, then its process is ended. The process has 512 MiB of memory
    (on Linux; macOS and Windows know no such limit), may write no file and start no process.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._end = lambda: None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """What the template writes.

        Args:
          template: its source.
          variables: what it can refer to; JSON.

        Raises:
          MimoError: if it fails, takes too long, writes too much, or tries to leave its sandbox.
        """
        request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        with self._lock:
            line = self._ask(request)
        try:
            reply = json.loads(line)
        except ValueError:
            raise MimoError(
                f"The chat template's process wrote what is no reply. {_REMEDY}"
            ) from None
        if "text" not in reply:
            why, remedy = _WHY[reply["kind"]]
            raise MimoError(f"The chat template {why}: {reply['error'].rstrip('.')}. {remedy}")
        return reply["text"]

    def _ask(self, request: bytes) -> bytes:
        """One request, one line; the process is ended if none comes in time."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        process = self._process
        timer = threading.Timer(TIME_S, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            # A character takes at most 6 bytes in JSON.
            line = process.stdout.readline(6 * LONGEST + 100)
        except BrokenPipeError:
            line = b""
        except BaseException:
            # A reply that comes later would be taken for that of the next request.
            self.close()
            raise
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            self.close()
        if not line:
            raise MimoError(
                f"The chat template was stopped: it ran for {TIME_S:g} s or broke its process, "
                f"which ended with {process.returncode}. {_REMEDY}"
            )
        return line

    def _start(self) -> None:
        # Only what Python needs to start and to find its modules: no secrets of the environment.
        kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mimo_jax.text.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            # Ctrl-C at a terminal is for the program that the user sees.
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, self._process)

    def close(self) -> None:
        """Ends the process; the next template starts another."""
        self._end()
        self._process = None


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        try:
            pipe.close()
        except BrokenPipeError:  # What was not read by the process any more.
            pass
    process.wait()


class ChatTemplate:
    """The templates of a checkpoint.

    Args:
      sources: templates by name: "default", or "tool_use" for conversations with tools; others are
        not used.
      variables: special tokens by their names in templates, such as eos_token.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, Any]):
        self._sources, self._variables = dict(sources), dict(variables)
        self._renderer = Renderer()

    @classmethod
    def find(cls, directory: Path) -> "ChatTemplate | None":
        """The templates in a checkpoint's directory, or None if there are none.

        chat_template.jinja comes before chat_template.json and the one in tokenizer_config.json, as
        in the libraries that write them.

        Raises:
          MimoError: if a file is not what its name says.
        """
        config = _read_config(directory / "tokenizer_config.json")
        variables = {name: _token(config.get(name)) for name in config if name.endswith("_token")}
        sources: dict[str, str] = {}
        for path in sorted(directory.glob("additional_chat_templates/*.jinja")):
            sources[path.stem] = _read_text(path)
        path = directory / "chat_template.jinja"
        if path.is_file():
            sources["default"] = _read_text(path)
        if not sources:
            path = directory / "chat_template.json"
            found = _read_config(path).get("chat_template")
            if found is None:
                path, found = directory / "tokenizer_config.json", config.get("chat_template")
            sources = _named(found, path)
        known = {name: token for name, token in variables.items() if token is not None}
        return cls(sources, known) if sources else None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        controls: list[str],
        **variables: Any,
    ) -> list[Part]:
        """The parts of a conversation, up to where the assistant is to go on.

        What is a control token is decided by where it comes from: one that the template spells is,
        one that is spelled in a message or a tool is text. For this each is broken in two on the
        way in, by a character that no message has, and mended on the way out. It holds for
        templates that leave this character where it is; one that takes messages apart and drops it
        could let a control token of a message through. In an assistant's message <think>,
        </think>, <tool_call> and </tool_call> stay whole, as templates look for them.

        Args:
          messages: from `check_messages`.
          tools: from `check_tools`.
          controls: the tokenizer's control tokens.
          **variables: for the template: enable_thinking and others.

        Raises:
          MimoError: if the template fails or is stopped.
        """
        named = "tool_use" if tools and "tool_use" in self._sources else "default"
        if named not in self._sources:
            raise MimoError(
                f"The checkpoint has chat templates of the names {sorted(self._sources)}, and none "
                "named default: name one of them so."
            )
        template = self._sources[named]
        given = json.dumps([messages, tools], ensure_ascii=False) + template
        mark = next((mark for mark in BREAKS if mark not in given), None)
        if mark is None:
            raise MimoError(
                "The messages hold all of the characters U+FDD0 to U+FDEF, which are no characters "
                "of any text: take them out."
            )
        values = {
            **self._variables,
            **variables,
            "messages": [_broken(m, controls, mark) for m in messages],
            "tools": _broken_value(tools, controls, mark),
            "add_generation_prompt": True,
        }
        parts = split(self._renderer.render(template, values), controls)
        return merge(Part(part.text.replace(mark, ""), part.control) for part in parts)

    def close(self) -> None:
        """Ends the process that renders."""
        self._renderer.close()


def _broken(message: dict[str, Any], controls: list[str], mark: str) -> dict[str, Any]:
    """A message in whose text no control token is whole."""
    assistant = message["role"] == "assistant"
    left = [c for c in controls if not (assistant and c in MARKUP)]
    return {
        key: _broken_value(value, left if key == "content" else controls, mark)
        for key, value in message.items()
    }


def _broken_value(value: Any, controls: list[str], mark: str) -> Any:
    if isinstance(value, str):
        return "".join(
            f"{part.text[:1]}{mark}{part.text[1:]}" if part.control else part.text
            for part in split(value, controls)
        )
    if isinstance(value, dict):
        return {
            _broken_value(k, controls, mark): _broken_value(v, controls, mark)
            for k, v in value.items()
        }
    return [_broken_value(v, controls, mark) for v in value] if isinstance(value, list) else value


def _read_text(path: Path) -> str:
    try:
        return _read(path, LARGEST).decode()
    except UnicodeDecodeError as error:
        raise MimoError(f"{path} is not UTF-8 ({error}): copy it anew.") from None


def _read_config(path: Path) -> dict[str, Any]:
    # Older tokenizers list their added tokens here: more than a template's length.
    return parse_json(_read(path, 16 * LARGEST), str(path)) if path.is_file() else {}


def _read(path: Path, most: int) -> bytes:
    size = path.stat().st_size
    if size > most:
        raise MimoError(f"{path} has {size} bytes; {most} at most are read. Copy it anew.")
    return path.read_bytes()


def _named(found: Any, path: Path) -> dict[str, str]:
    """The templates under chat_template: one, or a list of named ones."""
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        sources = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError, AttributeError):
        sources = {None: None}
    if not all(isinstance(text, str) for pair in sources.items() for text in pair):
        raise MimoError(
            f"{path} has a chat_template that is neither a text nor a list of "
            '{"name", "template"}: copy the file anew.'
        )
    return sources


def _token(value: Any) -> str | None:
    """A special token of tokenizer_config.json, written as its text or as {"content": text}."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
