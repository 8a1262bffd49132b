"""Plots of statistics and of runs' records, with matplotlib (extra `notebooks`).

Each returns a figure, which a notebook shows and `figure.savefig(path)` writes; it belongs to no
window and needs no closing.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jax.errors import MimoError


def acceptance_histogram(answers: Any, title: str = "Tokens emitted by a round") -> Any:
    """Draws how many tokens the rounds emitted, over one answer or many.

    Args:
      answers: an Output, its Stats, or several of them.
      title: above the plot.

    Returns:
      a matplotlib figure; a notebook shows it. It belongs to no window and needs no closing.

    Raises:
      MimoError: if there is no round to show, or matplotlib is not installed.
    """
    answers = list(answers) if isinstance(answers, Iterable) else [answers]
    counts = [np.asarray(getattr(a, "stats", a).acceptance_histogram) for a in answers]
    if not counts or not sum(c.sum() for c in counts):
        raise MimoError("There is no round to plot: give at least one answer with tokens.")
    if len({len(c) for c in counts}) > 1:
        raise MimoError("The answers are of engines with different block sizes: plot them apart.")
    total = np.sum(counts, axis=0)[1:]
    figure, axes = _figure()
    lengths = np.arange(1, len(total) + 1)
    bars = axes.bar(lengths, total / total.sum(), color="#3b6ea5")
    axes.bar_label(bars, [f"{share:.0%}" for share in total / total.sum()], fontsize=8)
    mean = float((lengths * total).sum() / total.sum())
    axes.axvline(mean, color="#c0504d", linestyle="--", label=f"acceptance length {mean:.2f}")
    axes.set(xlabel="tokens", ylabel="share of rounds", title=title, xticks=lengths)
    return _finished(figure, axes)


def loss_curve(runs: Mapping[str, str | Path] | str | Path, window: int = 20) -> Any:
    """Draws the loss of one run or several against the step, smoothed, and held-out bits per byte.

    Args:
      runs: a run's folder (or its metrics.jsonl), or several of them by name.
      window: steps that a point is the mean of.

    Returns:
      a matplotlib figure.

    Raises:
      MimoError: if a run has no losses, or matplotlib is not installed.
    """
    named = runs if isinstance(runs, Mapping) else {Path(runs).name: runs}
    figure, axes = _figure()
    for number, (name, path) in enumerate(named.items()):
        records = _records(path)
        steps, losses = _column(records, "loss")
        if not len(steps):
            raise MimoError(f"{path} has no loss: give a run's folder or its metrics.jsonl.")
        size = min(window, len(losses))
        smooth = np.convolve(losses, np.ones(size) / size, mode="valid")
        axes.plot(steps, losses, color=f"C{number}", alpha=0.25, linewidth=0.7)
        axes.plot(steps[size - 1 :], smooth, color=f"C{number}", label=name)
        measured, bits = _column(records, "bits_per_byte")
        if len(measured):
            words = f"{name}, held-out bits per byte"
            axes.plot(measured, bits, "o--", color=f"C{number}", markersize=3, label=words)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Training")
    return _finished(figure, axes)


def acceptance_by_position(
    results: Mapping[str, Any] | str | Path, group: str | None = None
) -> Any:
    """Draws the share of rounds that accept draft 1, 2, ..., a line for each part of a group.

    Args:
      results: what `mimo eval --json` printed, or a file of it; its last line counts. Or the
        folder of a drafter's run with held-out text, whose evaluations are drawn by step.
      group: "by_temperature", "by_domain" or "by_context"; by default the first that is there.

    Returns:
      a matplotlib figure.

    Raises:
      MimoError: if there is nothing to draw, or matplotlib is not installed.
    """
    curves = _position_curves(results, group)
    figure, axes = _figure()
    for number, (name, shares) in enumerate(curves.items()):
        shade = 0.2 + 0.8 * (number + 1) / len(curves)
        axes.plot(range(1, len(shares) + 1), shares, "o-", markersize=3, alpha=shade, label=name)
    axes.set(xlabel="draft", ylabel="share accepted", title="Acceptance by position", ylim=(0, 1))
    return _finished(figure, axes)


def qat_error(run: str | Path) -> Any:
    """Draws ||MXFP4(w) - w|| / ||w|| of each expert matrix against the step, coloured by layer.

    Args:
      run: the folder of a `mimo train qat` run (or its metrics.jsonl).

    Returns:
      a matplotlib figure.

    Raises:
      MimoError: if the run has no such records, or matplotlib is not installed.
    """
    records = [record for record in _records(run) if "qat_error" in record]
    if not records:
        raise MimoError(f"{run} has no qat_error: give the folder of a `mimo train qat` run.")
    figure, axes = _figure()
    names = sorted(records[0]["qat_error"], key=lambda name: (len(name), name))
    layers = list(dict.fromkeys(name.split(".")[1] for name in names))
    steps = [record["step"] for record in records]
    for name in names:
        layer, matrix = name.split(".")[1], name.rsplit(".", 1)[-1]
        style = "-" if matrix == "gate_up" else "--"
        errors = [record["qat_error"][name] for record in records]
        color = f"C{layers.index(layer)}"
        axes.plot(steps, errors, f"o{style}", markersize=3, color=color, label=f"{layer} {matrix}")
    axes.set(xlabel="step", ylabel="relative error", title="What MXFP4 changes, by layer")
    return _finished(figure, axes)


def _position_curves(results: Any, group: str | None) -> dict[str, list[float]]:
    if isinstance(results, str | Path):
        path = Path(results)
        if path.is_dir():
            records = [r for r in _records(path) if "right_by_slot" in r]
            if not records:
                raise MimoError(f"{path} has no held-out acceptance: train with data.heldout.")
            return {f"step {r['step']}": np.cumprod(r["right_by_slot"]).tolist() for r in records}
        results = json.loads(path.read_text().strip().splitlines()[-1])
    groups = {name: parts for name, parts in results.get("acceptance", {}).items() if parts}
    if not groups or (group is not None and group not in groups):
        raise MimoError(f"group={group!r} is not in the result; it has {sorted(groups)}.")
    parts = groups[group] if group else next(iter(groups.values()))
    return {str(name): measured["by_position"] for name, measured in parts.items()}


def _records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; one that a kill cut short is left out."""
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.exists():
        raise MimoError(f"{path} does not exist: give a run's folder or its metrics.jsonl.")
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _column(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a value."""
    pairs = [(record["step"], record[name]) for record in records if name in record]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps), np.array(values, float)


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MimoError("Plots need matplotlib: pip install 'mimo-jax[notebooks]'.") from None
    figure = Figure(figsize=(6, 3), layout="constrained")
    return figure, figure.subplots()


def _finished(figure: Any, axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
