"""Convert a released checkpoint into ours: verified, and resumed where it was stopped."""

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("source", type=Path, metavar="SRC", help="directory as downloaded")
    parser.add_argument("destination", type=Path, metavar="DST", help="new directory to write to")
    parser.add_argument(
        "--experts",
        choices=("auto", "mxfp4", "bfloat16"),
        default="auto",
        help="auto (default) keeps MXFP4 and decodes FP8 to bfloat16, at twice the size; mxfp4 "
        "quantises what is not MXFP4, which changes it",
    )
    parser.add_argument(
        "--linear",
        choices=("auto", "bfloat16"),
        default="auto",
        help="FP8 attention projections and dense MLPs: kept (default), or decoded",
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="devices that will read it: chunks on disk are whole parts of each one's slice "
        "(default 1; any number can read it)",
    )
    parser.add_argument(
        "--layout",
        choices=("tensor", "expert"),
        default="tensor",
        help="how they divide experts: columns of each (default), or whole ones",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read back what was written"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.epilog = "example: mimo convert MiMo-V2.6-Flash flash --devices 8"


def main(options: argparse.Namespace) -> int:
    """Runs the command."""
    import jax

    # Weights pass through the host alone; a GPU would only lend its memory.
    jax.config.update("jax_platforms", "cpu")
    from mimo_jax.checkpoint.convert import Choices, convert
    from mimo_jax.progress import byte_progress

    choices = Choices(options.experts, options.linear, options.devices, options.layout)
    with byte_progress("Converting") as progress:
        manifest = convert(
            options.source,
            options.destination,
            choices,
            verify=not options.no_verify,
            progress=progress,
            say=lambda line: print(line, file=sys.stderr),
        )
    nbytes = sum(entry.nbytes for entry in manifest.arrays.values())
    if options.json:
        fields = {
            "directory": str(options.destination),
            "arrays": len(manifest.arrays),
            "nbytes": nbytes,
            "files": sorted(manifest.files),
            "verified": not options.no_verify,
        }
        print(json.dumps(fields))
    else:
        print(f"{options.destination}: {nbytes / 1e9:.2f} GB in {len(manifest.arrays)} arrays")
    return 0
