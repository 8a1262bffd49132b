"""Executes every notebook from its first cell to its last; fails on an error or after a minute.

Usage: python tests/run_notebooks.py [NOTEBOOK ...]      (default: all in notebooks/)
"""

import os
import pathlib
import sys
import tempfile
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from traitlets.config import Config

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT_S = 60
KERNEL_START_S = 60


def execute(path: pathlib.Path, sockets: str) -> tuple[float, str]:
    """Runs one notebook in its own folder; returns its cells' seconds, and what went wrong."""
    # Sockets in a private folder: nobody else on this machine can reach the kernel.
    manager = {"transport": "ipc", "ip": f"{sockets}/{path.stem}"}
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=2 * LIMIT_S,
        startup_timeout=KERNEL_START_S,
        kernel_name="python3",
        config=Config({"KernelManager": manager}),
        resources={"metadata": {"path": str(path.parent)}},
    )
    with client.setup_kernel():
        start = time.monotonic()
        try:
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
        except (CellExecutionError, CellTimeoutError) as error:
            return time.monotonic() - start, str(error)
        seconds = time.monotonic() - start
    return seconds, "" if seconds <= LIMIT_S else f"took {seconds:.0f} s, allowed are {LIMIT_S} s"


def main() -> int:
    """Prints a line a notebook and the closing count; the exit code is 1 if any failed."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    paths = [pathlib.Path(name).resolve() for name in sys.argv[1:]]
    paths = paths or sorted((ROOT / "notebooks").glob("*.ipynb"))
    failed = 0
    for path in paths:
        with tempfile.TemporaryDirectory() as sockets:
            seconds, error = execute(path, sockets)
        failed += bool(error)
        print(f"{path.name}: {'FAILED' if error else 'ok'}, {seconds:.1f} s")
        if error:
            print(error)
    print(f"notebooks: {len(paths) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
