"""The tables of `mimo bench rank`: what was measured, and, apart from it, what is projected."""

from typing import Any

from mimo_jax.bench import rank_projection as projection
from mimo_jax.bench.card import print_table

ROUNDS = {
    "round": "name",
    "context": "context",
    "rows": "rows",
    "ms": "ms",
    "spread": "spread",
    "experts": "distinct",
    "GB": "bytes",
    "floor ms": "floor_ms",
    "share": "share",
    "a call ms": "call_ms",
}
"""Columns of the first table: title, and field of a result."""


def show(result: dict[str, Any]) -> None:
    """Prints the tables of a benchmark's result."""
    _rounds(result)
    if "growth" in result:
        columns = ("context", "added_ms", "bytes_ms", "ratio")
        rows = [[row[name] for name in columns] for row in result["growth"]]
        print_table("Longer contexts: added time, and what the added bytes take", columns, rows)
    for row in result["profiles"]:
        if "us" in row:
            table = projection.grouped(row["us"], 1e3 * row["round_ms"])
            title = f"{row['name']} at {row['context']}: {row['kernels']:.0f} kernels a round"
            print_table(title, ("part", "device us", "share"), table)
    _projections(result)


def _rounds(result: dict[str, Any]) -> None:
    count = result["devices"]
    ranks = "One rank" if count == 1 else f"{count} ranks"
    title = f"{ranks} of {result['ranks']} of {result['model']}, {result['device']}: measured"
    rows = [row | {"bytes": row["bytes"] / 1e9} for row in result["rounds"]]
    print_table(title, tuple(ROUNDS), [[row.get(k, "") for k in ROUNDS.values()] for row in rows])


def _projections(result: dict[str, Any]) -> None:
    """Of rounds that draft."""
    fields = ("name", "context", "communication_ms", "round_ms")
    found = [row for row in result["projections"] if len(row["tokens_per_second"]) > 1]
    rows = [[*(row[k] for k in fields), *row["tokens_per_second"].values()] for row in found]
    if not rows:
        return
    first, more = found[0], " more than measured" if result["devices"] > 1 else ""
    title = (
        f"Projected for {result['ranks']} ranks, assuming {first['sum_us']:g} us a sum and "
        f"{first['gather_us']:g} us a gather{more}: {first['collectives']}"
    )
    accepted = [f"tokens/s at {n:.2f}" for n in projection.ACCEPTED.values()]
    print_table(title, ("round", "context", "sums ms", "round ms", *accepted), rows)
