"""The command `mimo`: results on stdout, all else on stderr; exit codes 0, 1, 2 (usage), 130."""

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence

import mimo_jax
from mimo_jax.commands.model import add_model_arguments, check_answer, load_model
from mimo_jax.errors import MimoError

COMMANDS: dict[str, tuple[str, str]] = {
    "chat": ("mimo_jax.commands.chat", "talk with a model"),
    "convert": ("mimo_jax.commands.convert", "make a checkpoint of ours out of a released one"),
    "export": ("mimo_jax.commands.export", "write Hugging Face safetensors"),
    "inspect": ("mimo_jax.commands.inspect", "say what a checkpoint holds"),
    "plan": ("mimo_jax.commands.plan", "say what a model needs on some devices"),
    "eval": ("mimo_jax.commands.eval", "measure a model and its drafter"),
    "train": ("mimo_jax.commands.train", "train a target or a drafter"),
}
"""Commands by name: a module with `add_arguments(parser)` and `main(options) -> exit code`, and a
line of help. A module is imported when its command is asked for, and brings in no JAX before main.
"""

BENCHES = {
    "convert": "mimo_jax.bench.convert",
    "drafter": "mimo_jax.bench.drafter",
    "generate": "mimo_jax.bench.generate",
    "kernels": "mimo_jax.bench.kernels",
    "prefill": "mimo_jax.bench.prefill",
    "qat": "mimo_jax.bench.qat",
    "train": "mimo_jax.bench.train",
    "rank": "mimo_jax.bench.rank",
    "sums": "mimo_jax.bench.sums",
}
"""Benchmarks by name: modules with `add_arguments(parser)` and `main(arguments) -> exit code`."""

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name; those of the process by default.

    Returns:
      the exit code: 0, 1 after an error that was reported, 130 after Ctrl-C. Wrong usage exits
      with 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(arguments)
    options = parser.parse_args(arguments)
    use_virtual_devices(getattr(options, "devices", None))
    try:
        return options.command(options)
    except MimoError as error:
        print(f"mimo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmimo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who read our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mimo",
        description="MiMo models in JAX: MXFP4 experts, DFlash drafting, one compiled loop.",
        epilog='example: mimo generate "def fibonacci(n):" --max-tokens 128',
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mimo {mimo_jax.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    for name in COMMANDS:
        _add_command(commands, name, arguments[:1] == [name])
    if arguments[:1] == ["bench"]:
        _add_bench(commands)
    else:
        # Benchmarks bring JAX in: their own options are read only when one is asked for.
        commands.add_parser("bench", help="measure")
    return parser


def _add_generate(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a prompt",
        description="Answers a prompt: the text on stdout, as it comes; statistics on stderr.",
        epilog='example: echo "import os" | mimo generate -p - --temperature 0.8 --seed 1',
        allow_abbrev=False,
    )
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="the text to go on from")
    parser.add_argument("-p", "--prompt", help="likewise; - reads it from stdin")
    add_model_arguments(parser)
    answer = parser.add_argument_group("answer")
    answer.add_argument("--max-tokens", type=int, default=256, help="at most (default 256)")
    answer.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    answer.add_argument("--top-p", type=float, default=1.0, help="mass to choose from (default 1)")
    answer.add_argument(
        "--top-k", type=int, default=0, help="tokens to choose from (default 0: all)"
    )
    answer.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    answer.add_argument("--no-spec", action="store_true", help="decode without drafts")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    output.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print as tokens come, or all at once",
    )
    parser.set_defaults(command=generate, usage_error=parser.error)


def _add_command(commands, name: str, asked: bool) -> None:
    """Declares a command of the table; its module and its options only when it is asked for."""
    module_name, help_line = COMMANDS[name]
    if not asked:
        commands.add_parser(name, help=help_line)
        return
    module = importlib.import_module(module_name)
    parser = commands.add_parser(
        name, help=help_line, description=module.__doc__.splitlines()[0], allow_abbrev=False
    )
    module.add_arguments(parser)
    parser.set_defaults(command=module.main, usage_error=parser.error)


def _add_bench(commands) -> None:
    parser = commands.add_parser("bench", help="measure", allow_abbrev=False)
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for name, module_name in BENCHES.items():
        module = importlib.import_module(module_name)
        bench = benches.add_parser(name, help=module.__doc__.splitlines()[0], allow_abbrev=False)
        module.add_arguments(bench)
        bench.set_defaults(command=module.main)


def use_virtual_devices(count: int | None) -> None:
    """Lets a CPU stand for several devices; must come before JAX starts. GPUs are not affected."""
    flags = os.environ.get("XLA_FLAGS", "")
    if count and count > 1 and "xla_force_host_platform_device_count" not in flags:
        flag = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def generate(options: argparse.Namespace) -> int:
    """Runs `mimo generate`."""
    prompt = _prompt(options)
    choices = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "seed": options.seed,
        "speculative": not options.no_spec,
    }
    check_answer(choices)
    if not prompt:
        raise MimoError("The prompt is empty: give at least one character to go on from.")
    engine = load_model(options)
    if options.json:
        output = engine.generate(prompt, **choices)
        print(json.dumps({"prompt": prompt} | dataclasses.asdict(output)), flush=True)
        return 0
    stats = None
    if options.stream:
        for piece in engine.stream(prompt, **choices):
            print(piece.text, end="", flush=True)
            stats = piece.stats
        print(flush=True)
    else:
        output = engine.generate(prompt, **choices)
        print(output.text, flush=True)
        stats = output.stats
    print(stats, file=sys.stderr)
    return 0


def _prompt(options: argparse.Namespace) -> str:
    if (options.text is None) == (options.prompt is None):
        options.usage_error('give one prompt: "some text", -p "some text", or -p - to read stdin')
    if options.text is not None:
        return options.text
    if options.prompt != "-":
        return options.prompt
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise MimoError(f"stdin is not UTF-8 ({error}): convert it first.") from None
