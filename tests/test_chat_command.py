"""`mimo chat`: answers on stdout, the rest on stderr; Ctrl-C stops an answer, not the program."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_checkpoint import CONFIG, write_checkpoint

from mimo_jax import cli
from mimo_jax.commands import chat
from mimo_jax.commands.chat import Interruption, Screen, Talk
from mimo_jax.decode.chat import ChatDelta, ChatOutput
from mimo_jax.decode.output import Stats
from mimo_jax.errors import MimoError
from mimo_jax.text.answer import ToolCall

MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def output(reason="stop", problems=()) -> ChatOutput:
    stats = Stats(1, 2, 1, 2.0, (0, 1), 1.0, 2.0, 2.0, 0.0, "STATS", 1)
    return ChatOutput("", "", (), problems, "", (), reason, stats)


class Session:
    """Stands for the engine's: answers with given deltas, and remembers what was asked."""

    def __init__(self, *answers):
        self.answers, self.asked, self.system = list(answers), [], "unset"
        self.messages = [{"role": "user", "content": "é"}]

    def stream(self, message, **options):
        self.asked.append((message, options))
        if message == "too long":
            raise MimoError("The prompt is too long.")
        return (delta for delta in self.answers.pop(0))

    def reset(self, system=None):
        self.system = system


def talk(session, lines, out=None, err=None, choices=(), **screen):
    """Runs a piped conversation: exit code, stdout, stderr."""
    out, err = out or io.StringIO(), err or io.StringIO()
    stdin = io.TextIOWrapper(io.BytesIO(lines if isinstance(lines, bytes) else lines.encode()))
    code = Talk(session, dict(choices), Screen(out, err, **screen), "S").run(stdin)
    return code, out.getvalue(), err.getvalue()


END = ChatDelta(output=output())


def test_answers_go_to_stdout_and_the_rest_to_stderr():
    call = ToolCall("f", {"a": "é"})
    deltas = [ChatDelta(reasoning="th"), ChatDelta("a", "ink"), ChatDelta("b\n"), END]
    calls = [ChatDelta(tool_calls=(call,)), ChatDelta(output=output("length", ("not closed",)))]
    session = Session(deltas, calls)
    code, out, err = talk(session, "hi\n\n  \nthere", choices={"seed": 3})
    assert (code, out) == (0, "ab\n\n")
    assert err.startswith("think\n2 tokens in 1 rounds") and 'calls f({"a": "é"})' in err
    assert "[not closed]" in err and "cut off" in err
    assert session.asked == [("hi", {"seed": 3}), ("there", {"seed": 3})]
    assert "think" not in talk(Session(deltas), "hi", hide_reasoning=True)[2]


def test_a_terminal_is_not_driven_by_what_a_model_says():
    evil = ChatDelta("a\x1b[2Jb\tc\x7f\n", "\x1b]0;x\x07")
    out, err = Terminal(), io.StringIO()
    _, shown, said = talk(Session([evil, END]), "hi", out=out, err=err)
    assert shown == "a\u241b[2Jb\tc\u2421\n\n"
    assert talk(Session([evil, END]), "hi")[1] == "a\x1b[2Jb\tc\x7f\n\n", "a pipe gets it as it is"


def test_commands(tmp_path):
    file = tmp_path / "c.json"
    session = Session([END])
    lines = f"/help\n/reset\n/system  new one \n/save {file}\none\\\ntwo\n/exit\nnever"
    code, out, err = talk(session, lines)
    assert (code, out) == (0, "") and "/save FILE" in err and f"Saved to {file}" in err
    assert session.system == "new one" and [m for m, _ in session.asked] == ["one\ntwo"]
    assert json.loads(file.read_text()) == {"messages": session.messages}
    assert talk(session, "/reset")[0] == 0 and session.system == "S"
    assert talk(session, "/system")[0] == 0 and session.system is None
    for line, words in [
        (f"/save {file}", "is there already"),
        (f"/save {tmp_path}/none/x", "cannot be written: No such file"),
        ("/save", "needs a file's name"),
        ("/rest", "/rest is no command"),
        ("too long", "mimo: The prompt is too long."),
    ]:
        code, out, err = talk(session, f"{line}\nnever")
        assert (code, out) == (1, "") and words in err


def test_stdin_that_is_not_text():
    with pytest.raises(MimoError, match="stdin is not UTF-8"):
        talk(Session(), b"\xff\n")


def test_somebody_typing(monkeypatch):
    """Ctrl-C clears the line, an error does not end, Ctrl-D does."""
    lines = iter(["too long", KeyboardInterrupt, "hi", EOFError])

    def typed(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    session, out, err = Session([ChatDelta("a"), END]), Terminal(), io.StringIO()
    assert Talk(session, {}, Screen(out, err), None).run(Terminal()) == 0
    assert out.getvalue() == "a\n" and "/help lists commands" in err.getvalue()
    assert "The prompt is too long" in err.getvalue() and "(Ctrl-D or /exit ends)" in err.getvalue()


def test_ctrl_c_stops_an_answer():
    """The stream is closed, and the next line is answered; the second Ctrl-C does not wait."""
    closed = []

    def endless():
        try:
            yield ChatDelta("a")
            os.kill(os.getpid(), signal.SIGINT)
            yield ChatDelta("b")
            raise AssertionError("went on")
        finally:
            closed.append(1)

    def stuck():
        yield ChatDelta("c")
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    before = signal.getsignal(signal.SIGINT)
    code, out, err = talk(Session(endless(), stuck(), [ChatDelta("d"), END]), "1\n2\n3")
    assert (code, out, closed) == (0, "ab\nc\nd\n", [1])
    assert err.count("[stopped]") == 2 and err.count("STATS") == 1
    assert signal.getsignal(signal.SIGINT) is before
    with Interruption() as interruption:
        assert not interruption.asked
    with pytest.raises(ZeroDivisionError), Interruption():
        1 / 0  # noqa: B018


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    config = dataclasses.replace(CONFIG, max_position_embeddings=4000)
    return write_checkpoint(folder, config=config, added=MARKUP, drafter=False)


def test_the_command(directory, capsys, monkeypatch):
    """The options reach the session; a checkpoint that knows no conversations says so."""
    seen = {}

    def run(self, stdin):
        seen.update(choices=self._choices, ask=self._session._ask, held=self._session.messages)
        return 0

    monkeypatch.setattr(chat.Talk, "run", run)
    one = ["--model", str(directory), "--devices", "1"]
    assert cli.main(["chat", *one]) == 0
    assert seen["choices"] == {"seed": 0, "speculative": True}
    assert seen["ask"]["thinking"] is True and seen["held"] == []
    arguments = ["--system", "s", "--no-thinking", "--temperature", "0.5", "--max-tokens", "7"]
    assert cli.main(["chat", *one, *arguments, "--top-p", "0.9", "--top-k", "3", "--no-spec"]) == 0
    values = {"temperature": 0.5, "max_tokens": 7, "top_p": 0.9, "top_k": 3}
    assert seen["choices"] == values | {"seed": 0, "speculative": False}
    assert seen["ask"]["thinking"] is False and seen["held"][0]["content"] == "s"
    capsys.readouterr()


def test_a_base_model_says_so_before_anything_is_typed(tmp_path, capsys):
    model = write_checkpoint(tmp_path, drafter=False)
    assert cli.main(["chat", "--model", str(model), "--devices", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "it is a base model" in captured.err


@pytest.mark.slow
def test_a_process_that_is_interrupted(directory):
    """SIGINT in the middle of an answer: it stops, and the next line is answered; the end is 0."""
    command = [sys.executable, "-W", "error", "-m", "mimo_jax", "chat", "--no-thinking"]
    command += ["--model", str(directory), "--devices", "1", "--max-len", "4000", "--system", "s"]
    process = subprocess.Popen(
        [*command, "--temperature", "1.5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        process.stdin.write(b"ab\n")
        process.stdin.flush()
        assert process.stdout.read(1), "the answer has begun"
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        process.stdin.write(b"/help\n")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    assert b"/save FILE" in err and b"Traceback" not in err
