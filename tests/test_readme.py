"""Runs what README.md tells a reader to run: its Python as one program, its commands one by one."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RUN = ("mimo ", "make demo", "echo ")
SKIPPED = {
    "make test": "runs this suite",
    "make notebooks": "a step of its own in .ci/run",
    "make lint": "a step of its own in .ci/run",
    "bash .ci/run": "runs this file",
    "git clone": "needs a network",
    "cd ": "stays in the repository",
    "python3 -m venv": "make demo does it",
    "pip install": "make demo does it",
    ".venv/bin/pip install": "make demo does it",
    "source .venv/bin/activate": "the tests' environment is used",
    "mimo train": "tests/train/test_newcomer.py runs the same three commands, smaller",
    "mimo eval": "likewise",
}
"""Commands that are not run, by how they begin, each with the reason."""


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    text = README.read_text() if README.exists() else ""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command of its sh blocks: a line, or several joined by backslashes; no comments."""
    joined = "\n".join(blocks("sh")).replace("\\\n", " ")
    lines = (re.sub(r"\s+#\s.*$", "", line).strip() for line in joined.splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def run(arguments, **options):
    """Runs a command from the repository's root, with this environment's programs found first."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        **options,
    )
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_command(command):
    for start, reason in SKIPPED.items():
        if command.startswith(start):
            pytest.skip(f"{command}: {reason}")
    assert command.startswith(RUN), f"{command!r} is neither in RUN nor in SKIPPED of this file"
    assert run(command, shell=True).stdout.strip(), "nothing on stdout"


@pytest.mark.slow
def test_python_blocks():
    program = "\n".join(blocks("python"))
    if not program:
        pytest.skip("README.md has no Python yet")
    run([sys.executable, "-c", program])
