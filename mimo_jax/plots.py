"""Plots of statistics, with matplotlib (extra `notebooks`)."""

from collections.abc import Iterable
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
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MimoError("Plots need matplotlib: pip install 'mimo-jax[notebooks]'.") from None
    lengths = np.arange(1, len(total) + 1)
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(lengths, total / total.sum(), color="#3b6ea5")
    axes.bar_label(bars, [f"{share:.0%}" for share in total / total.sum()], fontsize=8)
    mean = float((lengths * total).sum() / total.sum())
    axes.axvline(mean, color="#c0504d", linestyle="--", label=f"acceptance length {mean:.2f}")
    axes.set(xlabel="tokens", ylabel="share of rounds", title=title, xticks=lengths)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
