"""A progress bar in bytes on stderr."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Shows bytes done of all, speed and remaining time while the body runs.

    Where stderr is no terminal, the end alone is shown.

    Args:
      label: what is going on.

    Yields:
      a function to call with the bytes done so far and all bytes.

    Example:
      with byte_progress("Exporting") as progress:
          progress(1 << 20, 1 << 30)
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
