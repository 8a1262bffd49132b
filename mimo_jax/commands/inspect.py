"""Say what a checkpoint's directory holds: ours or a released one, whole or half downloaded.

The exit code is 1 if it is not complete.
"""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="of a checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.epilog = "example: mimo inspect checkpoints/mimo-nano"


def main(options: argparse.Namespace) -> int:
    """Runs the command."""
    from mimo_jax.planning.inspection import inspect

    found = inspect(options.directory)
    print(json.dumps(found.to_dict()) if options.json else found)
    return 0 if found.complete else 1
