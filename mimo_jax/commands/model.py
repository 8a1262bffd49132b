"""What commands that load a model share: their options, and the loading itself."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mimo_jax
from mimo_jax.errors import MimoError

if TYPE_CHECKING:
    from mimo_jax.engine import Engine

DEFAULT_MODEL = Path("checkpoints/mimo-nano")
DRAFTERS: dict[str, bool | str] = {"auto": True, "dflash": "dflash", "mtp": "mtp", "none": False}
KERNELS: dict[str, bool | str] = {"auto": True, "whole": "whole", "off": False}
"""Values of --drafter and of --kernel, and what they mean to `mimo_jax.load`."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of all commands that load a model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help=f"a checkpoint's directory (default {DEFAULT_MODEL})",
    )
    group.add_argument(
        "--devices", type=int, metavar="N", help="divide over N devices (default all)"
    )
    group.add_argument(
        "--experts",
        choices=("auto", "packed", "dequantized", "mxfp4"),
        default="auto",
        help="MXFP4 in memory, or decoded once; auto (default) decodes on CPUs; mxfp4 quantises "
        "what a released checkpoint stores otherwise",
    )
    group.add_argument(
        "--linear",
        choices=("auto", "decoded", "fp8"),
        default="auto",
        help="FP8 weights decoded once, or at each use: less memory; auto (default): so where the "
        "kernels run",
    )
    group.add_argument(
        "--o-proj",
        choices=("stored", "fp8"),
        default="stored",
        help="attention's output projections as stored (default), or quantised: half the bytes",
    )
    group.add_argument(
        "--drafter",
        choices=tuple(DRAFTERS),
        default="auto",
        help="the DFlash drafter, or the MTP layers; auto (default) takes the first that there is",
    )
    group.add_argument(
        "--kernel",
        choices=tuple(KERNELS),
        default="auto",
        help="on Hopper GPUs, this package's kernels (auto, default), also a window layer's "
        "attention in one launch (whole), or XLA's programs alone (off)",
    )
    group.add_argument("--max-len", type=int, metavar="N", help="tokens that the cache holds")


def load_model(options: argparse.Namespace) -> "Engine":
    """Loads the model that the options of `add_model_arguments` name.

    Raises:
      MimoError: if there is none, or as `mimo_jax.load` does.
    """
    path = options.model or DEFAULT_MODEL
    if options.model is None and not path.is_dir():
        raise MimoError(
            f"{path} is not in this directory: run mimo in the repository's root, or name a "
            "checkpoint with --model DIR."
        )
    return mimo_jax.load(
        path,
        devices=options.devices,
        drafter=DRAFTERS[options.drafter],
        max_len=options.max_len,
        experts=options.experts,
        linear=options.linear,
        o_proj=options.o_proj,
        kernel=KERNELS[options.kernel],
    )


def check_answer(choices: dict[str, Any]) -> None:
    """Refuses options of an answer that no model allows, before one is loaded.

    Raises:
      MimoError: as `mimo_jax.decode.options.Options.check`.
    """
    from mimo_jax.decode.options import Options

    most = 2**31 - 1  # For those whose limit is the model's.
    Options.check(most, most, choices)


def at_least(least: int) -> Callable[[str], int]:
    """Reads an option that is a whole number, not below another."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number, {least} or more")
        return value

    return read


def positive(text: str) -> float:
    """Reads an option that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value
