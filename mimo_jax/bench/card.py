"""What every benchmark prints around its numbers: the machine, a table, the JSON line."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax
from rich.console import Console
from rich.table import Table


def environment() -> dict[str, Any]:
    """Hardware, versions and date."""
    devices = jax.devices()
    return {
        "date": datetime.date.today().isoformat(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": version("flax"),
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; floats with four significant digits."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=110, soft_wrap=True).print(table)


def print_json(result: dict[str, Any]) -> None:
    """Prints the result as one line of JSON, the last of a benchmark's output."""
    print(json.dumps(result), flush=True)
