"""Write one of our checkpoints as Hugging Face safetensors."""

import argparse
import json
import sys
from pathlib import Path

from mimo_jax.commands.model import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("source", type=Path, metavar="SRC", help="directory of the checkpoint")
    parser.add_argument("directory", type=Path, metavar="DST", help="new directory to write to")
    parser.add_argument(
        "--layout",
        choices=("v2-flash", "v2.6"),
        default="v2-flash",
        help="v2-flash, which transformers reads (default), or v2.6, with MXFP4 and the drafter",
    )
    parser.add_argument(
        "--shard-gb", type=positive, default=5.0, help="size of a file in GB (default 5)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.epilog = "example: mimo export checkpoints/mimo-nano nano-hf --layout v2-flash"


def main(options: argparse.Namespace) -> int:
    """Runs the command."""
    from mimo_jax.checkpoint.export import export
    from mimo_jax.progress import byte_progress

    with byte_progress("Exporting") as progress:
        exported = export(
            options.source,
            options.directory,
            options.layout,
            shard_bytes=max(1, int(options.shard_gb * 1e9)),
            progress=progress,
        )
    for part in exported.left_out:
        print(f"Left out: the {part}, which layout {options.layout} cannot hold.", file=sys.stderr)
    if options.json:
        fields = {
            "directory": str(options.directory),
            "layout": options.layout,
            "files": [str(path) for path in exported.files],
            "nbytes": exported.nbytes,
            "left_out": list(exported.left_out),
        }
        print(json.dumps(fields))
    else:
        count = len(exported.files)
        print(f"{options.directory}: {exported.nbytes / 1e6:.1f} MB in {count} file(s)")
    return 0
