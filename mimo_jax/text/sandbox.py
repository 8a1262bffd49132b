"""The process in which chat templates are rendered: a jinja2 sandbox with little memory.

A template comes with a checkpoint and is a program of strangers. jinja2's sandbox keeps it from
Python's insides; a process of its own, which `template.Renderer` starts and, after a time, ends,
keeps one that runs forever or makes gigabytes from taking the engine with it. Requests and replies
are lines of JSON.
"""

import datetime
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

MEMORY = 1 << 29
"""Bytes of address space that the process may have, where the system can limit it."""

LONGEST = 1 << 24
"""Characters that a template may write."""

OTHER_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class Refusal(TemplateError):
    """The template's own `raise_exception`: it does not accept these messages."""


class Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Refuses what jinja2's sandbox would answer with an undefined value that prints as nothing."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute or an entry, of a name without two leading underscores."""
        if attribute.startswith("__"):
            return self.unsafe_undefined(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An entry or an attribute; names with two leading underscores are entries of dicts."""
        if isinstance(argument, str) and argument.startswith("__") and not isinstance(obj, dict):
            return self.unsafe_undefined(obj, argument)
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raises, for an attribute that is none of a template's business."""
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__} is not allowed")


class Generation(ext.Extension):
    """`{% generation %}`, which marks an assistant's words for training, as what it encloses."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        """The nodes up to `{% endgeneration %}`."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> Sandbox:
    """The sandbox, with the functions and settings that chat templates are written for."""
    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation])
    made.globals.pop("lipsum")
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    made.filters["tojson"] = _to_json
    return made


def _raise(message: str) -> None:
    raise Refusal(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON that is for a model, not for a page: nothing in it is escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(8)
def compiled(source: str) -> jinja2.Template:
    """The template, which may not refer to other files.

    Raises:
      SecurityError: if it does.
      TemplateSyntaxError: if it cannot be read.
    """
    made = environment()
    other = next(iter(made.parse(source).find_all(OTHER_FILES)), None)
    if other is not None:
        raise SecurityError(f"line {other.lineno} takes in another file, which is not allowed")
    return made.from_string(source)


def render(source: str, variables: dict[str, Any]) -> str:
    """What the template writes.

    Raises:
      OverflowError: if that is too long; and whatever the template raises.
    """
    return "".join(_bounded(compiled(source).generate(variables)))


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > LONGEST:
            raise OverflowError(f"it wrote more than {LONGEST} characters")
        yield piece


def reply(request: bytes) -> bytes:
    """The line that answers a line: {"text"} or {"error", "kind"}."""
    try:
        asked = json.loads(request)
        answer = {"text": render(asked["template"], asked["variables"])}
        return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
    except Refusal as error:
        kind, message = "refused", str(error)
    except SecurityError as error:
        kind, message = "unsafe", str(error)
    except TemplateSyntaxError as error:
        kind, message = "syntax", f"line {error.lineno}: {error}"
    except MemoryError:
        kind, message = "memory", f"it needs more than {MEMORY >> 20} MB"
    except Exception as error:  # A template can raise whatever Python raises.
        kind, message = "error", f"{type(error).__name__}: {error}"
    return json.dumps({"kind": kind, "error": message[:2000]}).encode() + b"\n"


def limit() -> None:
    """Takes from this process what no template needs: memory, files to write, other processes."""
    try:
        import resource
    except ImportError:  # Windows has no limits of this kind.
        return
    limits = {"RLIMIT_AS": MEMORY, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0}
    for name, most in limits.items():
        if hasattr(resource, name):
            _, hard = resource.getrlimit(getattr(resource, name))
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            try:
                resource.setrlimit(getattr(resource, name), (most, most))
            except (ValueError, OSError):  # macOS cannot limit the address space.
                continue


def main(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers requests until there are no more."""
    limit()
    for request in requests:
        replies.write(reply(request))
        replies.flush()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
