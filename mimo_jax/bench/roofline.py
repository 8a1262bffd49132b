"""Draws what `mimo bench kernels` measured: times against bytes under a roofline, a time line."""

from typing import Any

import numpy as np

from mimo_jax.errors import MimoError

_COLORS = ("#3b6ea5", "#c0504d", "#6a994e", "#7a5195", "#e08e45", "#4d4d4d")


def points(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each timing: its shape and launch, tokens, megabytes, microseconds and GB/s.

    Bytes are packed weights, once for each slot of the work list. Timings that failed, and those of
    hooks that leave a part of the work out, are left out.

    Args:
      result: of `mimo bench kernels`, as `json.load` gives it; the rows of 23 November 2026, which
        name a variant instead of a launch, count as "two" if the variant only sets tokens.

    Raises:
      MimoError: if it holds no timing.
    """
    rows = []
    for row in result.get("times", []):
        launch = row.get("launch") or _launch_of(row.get("variant", {}))
        if "us" not in row or "hooks" in row or launch is None:
            continue
        known = {k: row[k] for k in ("shape", "t", "slots", "us", "GB/s")}
        zipf = float(row.get("zipf", row.get("variant", {}).get("zipf", 0)))
        rows.append({**known, "launch": launch, "zipf": zipf, "MB": row["us"] * row["GB/s"] / 1e3})
    if not rows:
        raise MimoError("This result holds no timing: run `mimo bench kernels --time`.")
    return rows


def _launch_of(variant: dict[str, str]) -> str | None:
    """A launch's name for a row of the first benchmark."""
    rest = {k: v for k, v in variant.items() if k not in ("t", "active", "profile", "zipf")}
    if not rest:
        return "two"
    return "two-3" if rest == {"stages": "3"} else None


def roofline(result: dict[str, Any]) -> Any:
    """Microseconds and GB/s against megabytes of weights, with the bandwidth of the same run.

    Returns:
      a matplotlib figure.

    Raises:
      MimoError: if there is nothing to draw, or matplotlib is not installed.
    """
    rows, ceiling = points(result), result["read_GB/s"]
    figure = _figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    sizes = np.geomspace(min(r["MB"] for r in rows) / 1.5, max(r["MB"] for r in rows) * 1.5, 50)
    left.plot(sizes, sizes / ceiling * 1e3, color="black", lw=1, label="read-only bandwidth")
    right.axhline(ceiling, color="black", lw=1, label=f"{ceiling:,.0f} GB/s")
    groups = sorted({(row["shape"], row["launch"]) for row in rows})
    for number, group in enumerate(groups):
        mine = sorted(
            (r for r in rows if (r["shape"], r["launch"]) == group), key=lambda r: r["MB"]
        )
        style = dict(
            color=_COLORS[number % len(_COLORS)],
            marker="osD^v*"[number // len(_COLORS) % 6],
            linestyle="",
            markersize=5,
            label=f"{group[0]}, {group[1]}",
        )
        left.plot([r["MB"] for r in mine], [r["us"] for r in mine], **style)
        right.plot([r["MB"] for r in mine], [r["GB/s"] for r in mine], **style)
    left.set(xscale="log", yscale="log", xlabel="MB of weights", ylabel="us", title="Time")
    right.set(xscale="log", ylim=0, xlabel="MB of weights", ylabel="GB/s", title="Bandwidth")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=7
    )
    return figure


def time_line(line: dict[str, Any]) -> Any:
    """When the blocks of one launch came to each event: a dot a block, a bar from first to last.

    Args:
      line: one of the result's `time_lines`.
    """
    blocks = line["blocks"]
    figure = _figure(figsize=(9, 0.35 * len(blocks) + 1))
    axes = figure.subplots()
    order = sorted(blocks, key=lambda event: np.median(blocks[event]))
    for height, event in enumerate(order):
        since = np.asarray(blocks[event]) / 1e3
        color = _COLORS[("consumer", "finisher", "producer").index(event.split(":")[0])]
        axes.plot([since.min(), since.max()], [height] * 2, color=color, lw=1)
        axes.plot(since, [height] * len(since), "|", color=color, markersize=7)
    axes.set(xlabel="us since the first block began", yticks=range(len(order)), yticklabels=order)
    axes.set_title(f"{line['shape']}, t = {line['t']}, {line['launch']}", loc="left")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _figure(**options) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MimoError("Plots need matplotlib: pip install 'mimo-jax[notebooks]'.") from None
    return Figure(layout="constrained", **options)
