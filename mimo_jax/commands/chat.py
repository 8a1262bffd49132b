"""Talks with a model: a conversation line by line, answers on stdout, all else on stderr."""

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mimo_jax.commands.model import add_model_arguments, check_answer, load_model
from mimo_jax.errors import MimoError

HELP = """\
/reset          forget the conversation; the system message stays
/system TEXT    begin anew with this system message
/save FILE      write the conversation as JSON
/help           this
/exit           end; so does Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ goes on with the next."""

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Pictures of control characters: a model's words must not drive a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo chat`."""
    parser.epilog = 'example: mimo chat --model DIR --system "Answer in one sentence."'
    add_model_arguments(parser)
    chat = parser.add_argument_group("conversation")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--no-thinking", action="store_true", help="answer without reasoning first")
    chat.add_argument(
        "--hide-reasoning", action="store_true", help="do not show what the model thinks"
    )
    answer = parser.add_argument_group("answers")
    theirs = "(default: of generation_config.json"
    answer.add_argument("--max-tokens", type=int, help="at most (default: what the cache holds)")
    answer.add_argument("--temperature", type=float, help=f"0 is greedy {theirs}, else 0)")
    answer.add_argument("--top-p", type=float, help=f"mass to choose from {theirs}, else 1)")
    answer.add_argument("--top-k", type=int, help=f"tokens to choose from {theirs}, else all)")
    answer.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    answer.add_argument("--no-spec", action="store_true", help="decode without drafts")


def main(options: argparse.Namespace) -> int:
    """Runs `mimo chat`: 0 at the end of the input, 1 if a piped conversation met an error."""
    names = ("max_tokens", "temperature", "top_p", "top_k")
    choices: dict[str, Any] = {
        name: getattr(options, name) for name in names if getattr(options, name) is not None
    }
    choices |= {"seed": options.seed, "speculative": not options.no_spec}
    check_answer(choices)
    engine = load_model(options)
    session = engine.chat_session(system=options.system, thinking=not options.no_thinking)
    screen = Screen(sys.stdout, sys.stderr, options.hide_reasoning)
    talk = Talk(session, choices, screen, options.system)
    try:
        return talk.run(sys.stdin)
    finally:
        session.close()
        engine.close()


class Screen:
    """Where answers go: content to stdout; reasoning, calls and statistics to stderr.

    Args:
      out: for content; control characters become pictures if it is a terminal.
      err: for the rest; reasoning is dimmed if it is a terminal that can.
      hide_reasoning: whether to leave it out.
    """

    def __init__(self, out: Any, err: Any, hide_reasoning: bool = False):
        from rich.console import Console

        self._out, self._hide = out, hide_reasoning
        self._err = Console(file=err, soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._at = ""

    def show(self, delta: Any) -> None:
        """Shows what a piece of an answer, a ChatDelta, brought."""
        if delta.reasoning and not self._hide:
            self._to("err")
            self._dim(delta.reasoning)
        if delta.content:
            self._to("out")
            text = delta.content
            self._out.write(text.translate(CONTROLS) if self._out.isatty() else text)
            self._out.flush()
        for call in delta.tool_calls:
            self.say(f"calls {call.name}({json.dumps(call.arguments, ensure_ascii=False)})")

    def say(self, line: str) -> None:
        """A line on stderr."""
        self._to("")
        self._dim(f"{line}\n")

    def end(self) -> None:
        """Ends the line that an answer left open; on stdout each answer ends with a newline."""
        self._to("")

    def _dim(self, text: str) -> None:
        shown = text.translate(CONTROLS) if self._err.is_terminal else text
        self._err.print(shown, style="dim", end="")
        self._err.file.flush()

    def _to(self, place: str) -> None:
        """Ends the line of the stream that was written last, if it is another one's turn."""
        if self._at == place:
            return
        if self._at:
            stream = self._out if self._at == "out" else self._err.file
            stream.write("\n")
            stream.flush()
        self._at = place


class Talk:
    """A conversation over lines of input.

    Args:
      session: a ChatSession of the engine.
      choices: options of all answers.
      screen: to show them on.
      system: the system message that /reset keeps.
    """

    def __init__(self, session: Any, choices: dict[str, Any], screen: Screen, system: str | None):
        self._session, self._choices, self._screen = session, choices, screen
        self._system = system
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: screen.say(HELP),
            "/reset": lambda _: self._begin(self._system),
            "/system": lambda text: self._begin(text or None),
            "/save": self._save,
        }

    def run(self, stdin: Any) -> int:
        """Answers line after line; returns the exit code."""
        piped = not stdin.isatty()
        if not piped:
            self._screen.say("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends.")
        lines = read_piped(stdin) if piped else read_terminal(self._screen)
        for line in lines:
            if line.strip() in ("/exit", "/quit"):
                break
            try:
                self._take(line)
            except MimoError as error:
                self._screen.say(f"mimo: {error}")
                if piped:
                    return 1
        return 0

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        command, _, rest = line.strip().partition(" ")
        if not command.startswith("/"):
            self._answer(line)
        elif command in self._commands:
            self._commands[command](rest.strip())
        else:
            raise MimoError(
                f"{command} is no command: /help lists them. To say something that begins with /, "
                "put a word before it."
            )

    def _answer(self, line: str) -> None:
        """Streams an answer; Ctrl-C stops it, and what was said stays."""
        stream = self._session.stream(line, **self._choices)
        output = None
        with contextlib.closing(stream), Interruption() as interruption:
            for delta in stream:
                self._screen.show(delta)
                output = delta.output
                if interruption.asked:
                    break
        self._screen.end()
        if output is None:
            self._screen.say("[stopped]")
            return
        for problem in output.problems:
            self._screen.say(f"[{problem}]")
        if output.finish_reason == "length":
            self._screen.say("[the answer was cut off: its budget or the cache is at its end]")
        self._screen.say(str(output.stats))

    def _begin(self, system: str | None) -> None:
        self._system = system
        self._session.reset(system)
        self._screen.say("The conversation begins anew.")

    def _save(self, name: str) -> None:
        if not name:
            raise MimoError("/save needs a file's name: /save conversation.json.")
        text = json.dumps({"messages": self._session.messages}, ensure_ascii=False, indent=1)
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except FileExistsError:
            raise MimoError(f"{name} is there already: choose another name.") from None
        except OSError as error:
            raise MimoError(f"{name} cannot be written: {error.strerror}.") from None
        self._screen.say(f"Saved to {name}.")


class Interruption:
    """Ctrl-C as a wish, `asked`, that the answer looks at; the second one interrupts at once."""

    def __enter__(self) -> "Interruption":
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        signal.signal(signal.SIGINT, self._before)
        return kind is KeyboardInterrupt


def read_piped(stdin: Any) -> Iterator[str]:
    """The lines of a file or a pipe.

    Raises:
      MimoError: if they are not UTF-8.
    """
    try:
        yield from _joined(line.rstrip("\r\n") for line in _utf8(stdin))
    except UnicodeDecodeError as error:
        raise MimoError(f"stdin is not UTF-8 ({error}): convert it first.") from None


def _utf8(stdin: Any) -> Iterator[str]:
    for line in stdin.buffer:
        yield line.decode("utf-8")


def read_terminal(screen: Screen) -> Iterator[str]:
    """Lines that somebody types, with readline's editing where Python has it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is imported)
    yield from _joined(_typed(screen))


def _typed(screen: Screen) -> Iterator[str]:
    while True:
        try:
            if not sys.stdout.isatty():
                # input() would write it to stdout, among the answers.
                print("> ", end="", file=sys.stderr, flush=True)
            yield input("> " if sys.stdout.isatty() else "")
        except EOFError:
            screen.say("")
            return
        except KeyboardInterrupt:
            screen.say("\n(Ctrl-D or /exit ends)")


def _joined(lines: Iterator[str]) -> Iterator[str]:
    """Lines with those joined that end with a backslash."""
    begun: list[str] = []
    for line in lines:
        if line.endswith("\\"):
            begun.append(line[:-1])
            continue
        yield "\n".join([*begun, line])
        begun = []
    if begun:
        yield "\n".join(begun)
