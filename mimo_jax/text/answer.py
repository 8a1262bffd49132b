"""What a model wrote, taken apart as it comes: reasoning, content and tool calls."""

import dataclasses
import re

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"

_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>\s*")
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>(.*?)</parameter>\s*", re.DOTALL)
_END = re.compile(r"</function>\s*\Z")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function that the model asks to be called.

    Attributes:
      name: of the function.
      arguments: each parameter's value, exactly as written: numbers and JSON are text too.
    """

    name: str
    arguments: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a piece of text added to an answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, taken apart.

    Attributes:
      content: what is for the user, and the text of calls that are malformed.
      reasoning: what stood in the think block.
      tool_calls: in their order.
      problems: what is malformed or was not closed, in words; empty if all is well.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    problems: tuple[str, ...] = ()


class AnswerParser:
    """Takes an answer apart while it comes, in pieces of any sizes: the sizes change nothing.

    A think block counts at the answer's start alone, and holds no calls. A call ends at the first
    </tool_call>, a value at the first </parameter>, and in no value another call or parameter
    begins: a call that is not well-formed by these rules is never guessed at, nor is a call looked
    for inside of it: its text becomes content. White
    space before a think block, and between calls or after the last one where there is nothing
    else, is layout and left out; all other text is in the answer, character by character.

    Args:
      in_think: whether the prompt opened the think block already.
    """

    def __init__(self, in_think: bool = False):
        self._state = self._reasoning if in_think else self._start
        self._rest = ""
        self._body: list[str] = []
        # White space that followed a call: layout, unless what comes next is content.
        self._gap, self._after_call = "", False
        self._calls = 0
        self._fresh, self._whole = _Found(), _Found()

    @property
    def answer(self) -> Answer:
        """All so far."""
        found = self._whole
        return Answer(
            "".join(found.content), "".join(found.reasoning), tuple(found.calls), tuple(found.wrong)
        )

    def push(self, text: str) -> Delta:
        """Takes a piece of text; returns what is certain now."""
        self._rest += text
        while self._state():
            pass
        fresh, self._fresh = self._fresh, _Found()
        return Delta("".join(fresh.content), "".join(fresh.reasoning), tuple(fresh.calls))

    def finish(self, text: str = "") -> Delta:
        """The answer is over, after this last piece; returns all that was kept back."""
        self._rest += text
        while self._state():
            pass
        rest = "".join(self._body) + self._take(len(self._rest))
        if self._state == self._reasoning:
            self._add("reasoning", rest)
            self._add("wrong", "the think block was not closed")
        elif self._state == self._call:
            self._add("content", self._gap + rest)
            self._add("wrong", f"tool call {self._calls} was not closed")
        elif not self._after_call or rest.strip():
            self._add("content", rest)
        self._state = self._over
        return self.push("")

    def _add(self, kind: str, value: str | ToolCall) -> None:
        if value:
            getattr(self._fresh, kind).append(value)
            getattr(self._whole, kind).append(value)

    def _take(self, count: int) -> str:
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    # The states: each takes what is certain off the rest, and returns whether to go on.

    def _over(self) -> bool:
        return False

    def _start(self) -> bool:
        """Before anything was said: is there a think block?"""
        text = self._rest.lstrip()
        if text.startswith(THINK):
            self._rest, self._state = text[len(THINK) :], self._reasoning
            return True
        if THINK.startswith(text):
            return False
        self._state = self._content
        return True

    def _reasoning(self) -> bool:
        place = self._rest.find(THOUGHT)
        if place < 0:
            self._add("reasoning", self._take(len(self._rest) - _begun(self._rest, THOUGHT)))
            return False
        self._add("reasoning", self._take(place))
        self._take(len(THOUGHT))
        self._state = self._content
        return True

    def _content(self) -> bool:
        place = self._rest.find(CALL)
        end = place if place >= 0 else len(self._rest) - _begun(self._rest, CALL)
        if not self._after_call or self._rest[:end].strip():
            self._add("content", self._take(end))
            self._gap, self._after_call = "", False
        elif place >= 0:
            self._gap = self._take(end)
        if place >= 0:
            self._state = self._call
            self._calls += 1
        return place >= 0

    def _call(self) -> bool:
        place = self._rest.find(CALLED)
        if place < 0:
            # What was searched is put aside: long calls come in many pieces.
            self._body.append(self._take(len(self._rest) - _begun(self._rest, CALLED)))
            return False
        text = "".join(self._body) + self._take(place + len(CALLED))
        self._body = []
        call = parse_call(text[len(CALL) : -len(CALLED)])
        self._after_call = isinstance(call, ToolCall)
        if self._after_call:
            self._add("calls", call)
        else:
            self._add("content", self._gap + text)
            self._add("wrong", f"tool call {self._calls} {call}")
        self._gap, self._state = "", self._content
        return True


@dataclasses.dataclass
class _Found:
    """Pieces of an answer, to be joined."""

    content: list[str] = dataclasses.field(default_factory=list)
    reasoning: list[str] = dataclasses.field(default_factory=list)
    calls: list[ToolCall] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)


def parse_call(text: str) -> ToolCall | str:
    """The call that stands between <tool_call> and </tool_call>, or what is wrong, in words.

    Parts may have newlines or nothing between them: `<function=NAME>`, any number of
    `<parameter=KEY>VALUE</parameter>`, `</function>`. Values are kept as they are.
    """
    function = _FUNCTION.match(text)
    if function is None:
        return "does not begin with <function=NAME>"
    arguments: dict[str, str] = {}
    place = function.end()
    while parameter := _PARAMETER.match(text, place):
        key, value = parameter.groups()
        if key in arguments:
            return f"has the parameter {key!r} twice"
        if CALL in value or "<parameter=" in value:
            # Its end was forgotten, or its text has ends of its own: it is not all there.
            return f"has another call or parameter inside of {key!r}"
        arguments[key] = value
        place = parameter.end()
    if _END.match(text, place) is None:
        return "has something other than <parameter=KEY>VALUE</parameter> before </function>"
    return ToolCall(function[1], arguments)


def parse(text: str, in_think: bool = False) -> Answer:
    """A whole answer, taken apart."""
    parser = AnswerParser(in_think)
    parser.push(text)
    parser.finish()
    return parser.answer


def _begun(text: str, marker: str) -> int:
    """Characters at the text's end that may be the beginning of a marker."""
    return next(
        n for n in range(min(len(marker) - 1, len(text)), -1, -1) if text.endswith(marker[:n])
    )
