"""From a rank's measured round to tokens a second of all ranks, assumptions in the open."""

import collections
from typing import Any

from jax.extend.core import jaxprs_in_params

from mimo_jax.bench.hlo import OTHERS

ACCEPTED = {"coding": 6.30, "mathematics": 5.56, "agents": 4.29}
"""Tokens a round that Xiaomi published for its drafter with blocks of 8."""
PLAIN = {"plain": 1.0}
"""Without a drafter."""
_BY_MAIL = {"all_sum": "sums", "all_gather": "gathers"}
"""Names of the kernels of `pallas_kernels.all_sum`."""


def collectives(traced: Any, sampled: bool = False) -> dict[str, int]:
    """Sums and gathers that a round of a traced program makes, counted in the program itself.

    Args:
      traced: of a jitted decoding program: `program.trace(...)`. On a mesh of one device they are
        there as well, and only later compiled away. Those that go by mail count as what they are,
        not as what stands for them on other platforms.
      sampled: whether tokens are sampled: which branch is taken where tokens are chosen.

    Returns:
      "sums" and "gathers" of the target, and those of the drafter, of a round that drafts.
    """
    loops: list[Any] = []
    _find(traced.jaxpr.jaxpr, lambda eqn, _: loops.append(eqn) if _is(eqn, "while") else None)
    found: collections.Counter = collections.Counter()

    def count(eqn, scope: str) -> None:
        if kind := _kind(eqn):
            found[f"drafter {kind}" if "drafter" in scope.split("/") else kind] += 1

    _find(loops[-1].params["body_jaxpr"].jaxpr, count, sampled=sampled)
    names = ("sums", "gathers", "drafter sums", "drafter gathers")
    return {name: found[name] for name in names}


def _kind(eqn) -> str | None:
    """Of an exchange between devices."""
    if kind := _BY_MAIL.get(eqn.params.get("name")):
        return kind
    return "sums" if _is(eqn, "psum") else "gathers" if _is(eqn, "all_gather") else None


def _is(eqn, name: str) -> bool:
    return eqn.primitive.name in (name, f"{name}_invariant")


def _find(jaxpr, visit, scope: str = "", sampled: bool | None = None) -> None:
    """Visits equations, with the names of the scopes that they are in.

    Without `sampled`, what is in loops is left out.
    """
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        visit(eqn, here)
        if _is(eqn, "while") and sampled is None:
            continue
        for one in _inner(eqn, here, sampled):
            _find(one, visit, here, sampled)


def _inner(eqn, scope: str, sampled: bool | None) -> list[Any]:
    """Of branches for platforms that of GPUs, of those that choose tokens the one in question."""
    if platforms := eqn.params.get("branches_platforms"):
        # None is of all that have no branch of their own, and last.
        on_gpus = next(i for i, names in enumerate(platforms) if names is None or "cuda" in names)
        return [eqn.params["branches"][on_gpus].jaxpr]
    if _is(eqn, "cond") and "accept" in scope.split("/"):
        return [eqn.params["branches"][bool(sampled)].jaxpr]
    return [*jaxprs_in_params(eqn.params)]


def communication_us(counts: dict[str, int], sum_us: float, gather_us: float) -> float:
    """Microseconds of a round's sums and gathers at these costs, none of them hidden."""
    sums = sum(n for name, n in counts.items() if name.endswith("sums"))
    return sums * sum_us + (sum(counts.values()) - sums) * gather_us


def project(round_ms: float, us: float, accepted: dict[str, float]) -> dict[str, Any]:
    """Tokens a second of a single sequence, were all ranks as this one.

    Args:
      round_ms: measured on a rank.
      us: of communication a round, assumed.
      accepted: tokens a round, by name.

    Example:
      >>> project(3.0, 1000.0, {"coding": 6.3})["tokens_per_second"]["coding"]
      1575.0
    """
    whole = round_ms + us / 1e3
    return {
        "round_ms": whole,
        "communication_ms": us / 1e3,
        "tokens_per_second": {name: n / whole * 1e3 for name, n in accepted.items()},
    }


def growth(rows: list[dict[str, Any]], read_gbs: float) -> list[dict[str, Any]]:
    """How much longer rounds take with longer contexts, beside what their added bytes must take.

    Args:
      rows: of one kind of round: context, milliseconds, bytes.
      read_gbs: measured bandwidth in GB/s.

    Returns:
      for each but the one with the shortest context: "context", "added_ms", "bytes_ms" and "ratio".
    """
    rows = sorted(rows, key=lambda row: row["context"])
    found = []
    for row in rows[1:]:
        added = row["ms"] - rows[0]["ms"]
        least = (row["bytes"] - rows[0]["bytes"]) / read_gbs / 1e6
        known = {"context": row["context"], "added_ms": added, "bytes_ms": least}
        found.append(known | {"ratio": added / least})
    return found


def grouped(us: dict[str, float], whole_us: float) -> list[tuple[str, float, float]]:
    """Rows of a table: each part's time and its share of the round, and the time between.

    Nothing is between where parts, under the profiler, add to more than a round.
    """
    rows = [(name, value, value / whole_us) for name, value in us.items() if value]
    rows.sort(key=lambda row: (row[0] == OTHERS, -row[1]))
    between = max(whole_us - sum(us.values()), 0.0)
    return [*rows, ("between kernels", between, between / whole_us)]
