"""The command: text on stdout and nothing else, words on stderr, exit codes, JSON."""

import io
import json
import os
import subprocess
import sys

import pytest
from tiny_checkpoint import checkpoint  # noqa: F401

import mimo_jax
from mimo_jax import cli

QUICK = ["--devices", "1", "--max-tokens", "12", "--temperature", "1", "--seed", "4"]


@pytest.fixture(scope="module")
def expected(checkpoint):  # noqa: F811
    """What the options QUICK answer to "abx"."""
    with mimo_jax.load(checkpoint, devices=1, progress=False) as engine:
        yield engine.generate("abx", max_tokens=12, temperature=1.0, seed=4)


@pytest.fixture
def mimo(checkpoint, capsys, monkeypatch):  # noqa: F811
    """Runs the command in this process: exit code, stdout, stderr."""
    flags = os.environ.get("XLA_FLAGS", "")

    def run(*arguments, model=checkpoint, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        named = ["--model", str(model)] if model else []
        try:
            code = cli.main([*arguments, *named])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield run
    os.environ["XLA_FLAGS"] = flags


@pytest.mark.parametrize("how", [["--stream"], ["--no-stream"], []])
def test_the_text_alone_is_on_stdout(mimo, expected, how):
    code, out, err = mimo("generate", "abx", *QUICK, *how)
    assert (code, out) == (0, expected.text + "\n")
    last = err.strip().splitlines()[-1]
    for words in ("tokens in", "rounds, acceptance length", "tokens/s", "compile", "dequantized"):
        assert words in last


def test_stdin_and_the_option_are_prompts_too(mimo, expected):
    assert mimo("generate", "-p", "abx", *QUICK)[1] == expected.text + "\n"
    assert mimo("generate", "-p", "-", *QUICK, stdin=b"abx")[1] == expected.text + "\n"


def test_json(mimo, expected):
    code, out, _ = mimo("generate", "abx", *QUICK, "--json")
    answer = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert answer["prompt"] == "abx" and answer["text"] == expected.text
    assert answer["tokens"] == list(expected.tokens)
    assert answer["finish_reason"] == expected.finish_reason
    stats = answer["stats"]
    assert stats["acceptance_histogram"] == list(expected.stats.acceptance_histogram)
    assert stats["acceptance_length"] == expected.stats.acceptance_length


def test_plain_decoding_gives_the_same(mimo, expected):
    code, out, _ = mimo("generate", "abx", *QUICK, "--no-spec", "--json")
    answer = json.loads(out)
    assert (code, answer["text"], answer["stats"]["acceptance_length"]) == (0, expected.text, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["abx", "--max-tokens", "0"], "max_tokens=0 is not allowed"),
        (["abx", "--top-p", "2"], "top_p=2.0 is not allowed"),
        ([""], "The prompt is empty"),
        (["z" * 400], "The prompt has 400 tokens; the cache holds 176"),
        (["abx", "--devices", "3"], "numbers that can"),
        (["abx", "--max-len", "1"], "max_len=1"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(mimo, arguments, words):
    one = [] if "--devices" in arguments else ["--devices", "1"]
    code, out, err = mimo("generate", *arguments, *one)
    assert (code, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("mimo: ") and words in last and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "a", "--max-tokens", "0"], "max_tokens=0"),
        (["generate", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", ""], "The prompt is empty"),
        (["chat", "--top-p", "2"], "top_p=2.0"),
    ],
)
def test_nothing_is_loaded_for_options_that_no_model_allows(mimo, arguments, words, monkeypatch):
    monkeypatch.setattr(mimo_jax, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    code, out, err = mimo(*arguments)
    assert (code, out) == (1, "") and words in err


@pytest.mark.parametrize(("name", "kernel"), [("auto", True), ("whole", "whole"), ("off", False)])
def test_kernels_by_name(mimo, name, kernel, monkeypatch):
    given = {}
    monkeypatch.setattr(mimo_jax, "load", lambda *_, **options: given.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mimo("generate", "a", "--kernel", name)
    assert given["kernel"] == kernel


def test_models_that_are_not_there(mimo, tmp_path, monkeypatch):
    code, out, err = mimo("generate", "abx", model=tmp_path / "none")
    assert (code, out) == (1, "") and "is not a directory" in err
    monkeypatch.chdir(tmp_path)
    code, out, err = mimo("generate", "abx", model=None)
    assert (code, out) == (1, "") and "name a checkpoint with --model DIR" in err


def test_stdin_that_is_not_text(mimo):
    code, out, err = mimo("generate", "-p", "-", stdin=b"ab\xff")
    assert (code, out) == (1, "") and "stdin is not UTF-8" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generat"],
        ["generate"],
        ["generate", "a", "-p", "b"],
        ["generate", "a", "--tempreature", "1"],
        ["generate", "a", "--temp", "1"],
        ["generate", "a", "--max-tokens", "many"],
        ["eval", "--rows", "0"],
        ["eval", "--contexts", "64", "-5"],
        ["eval", "--rule", "mse"],
        ["export", "a", "b", "--shard-gb", "nan"],
        ["export", "a", "b", "--shard-gb", "0"],
        ["plan", "mimo-nano", "--hbm-gb", "nan"],
        ["plan", "mimo-nano", "--bandwidth-gbs", "-3"],
        ["generate", "a", "--experts", "fast"],
    ],
)
def test_wrong_usage_is_exit_2(mimo, arguments):
    code, out, err = mimo(*arguments, model=None)
    assert (code, out) == (2, "") and "usage: mimo" in err


def test_interruption_is_exit_130(mimo, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(mimo_jax.Engine, "_pieces", interrupted)
    code, out, err = mimo("generate", "abx", *QUICK)
    assert (code, out) == (130, "") and err.endswith("mimo: interrupted\n")


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_help_and_version_need_no_jax():
    script = "import sys; from mimo_jax.cli import main\ntry: main(['--help'])\nfinally: "
    script += "assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    done = command("-c", script)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr
    done = command("-m", "mimo_jax", "--version")
    assert (done.returncode, done.stdout) == (0, f"mimo {mimo_jax.__version__}\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_commands_of_the_table_start_without_jax(name):
    """Their options are declared, explained, and cost no import of JAX."""
    script = (
        f"import sys; from mimo_jax.cli import main\ntry: main([{name!r}, '--help'])\nfinally: "
    )
    script += "assert not {'jax', 'flax'} & set(sys.modules)"
    done = command("-c", script)
    assert done.returncode == 0 and f"usage: mimo {name}" in done.stdout, done.stderr


def test_virtual_devices_without_a_flag_of_the_users(checkpoint, expected):  # noqa: F811
    """A fresh process divides the model over two devices of a CPU; no warning, no log line."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    arguments = ["abx", "--model", str(checkpoint), *QUICK[2:], "--devices", "2", "--json"]
    done = command("-W", "error", "-m", "mimo_jax", "generate", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["stats"]["devices"] == 2
    assert answer["tokens"] == list(expected.tokens)
    starts = ("Loaded", "Compiling", "Compiled")
    assert all(line.startswith(starts) for line in done.stderr.splitlines()), done.stderr
