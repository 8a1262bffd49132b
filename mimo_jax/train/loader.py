"""Batches through grain: shuffled anew each epoch by a seed, from a position that is saved."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from mimo_jax.errors import MimoError
from mimo_jax.train.sources import Rows

Batch = dict[str, np.ndarray]
"""{"tokens": int32 [b, t], "trained": bool [b, t]}"""

PREFETCHED = 2


class Loader:
    """Endless batches; which one comes next depends on the rows, the seed and the position alone.

    With several kinds of rows, whose lengths may differ, batches of each kind take turns.

    Args:
      kinds: rows of each kind, and how many make a batch of it.
      seed: of the order.

    Raises:
      MimoError: if there are not enough rows for a batch.
    """

    def __init__(self, kinds: Sequence[tuple[Rows, int]], seed: int):
        datasets = []
        for number, (rows, batch) in enumerate(kinds):
            if len(rows) < batch:
                raise MimoError(
                    f"The data make {len(rows)} rows of {rows.length} tokens, a batch needs "
                    f"{batch}: use more text, a smaller run.batch or shorter rows (data.length)."
                )
            order = grain.MapDataset.source(rows).seed(seed + number).shuffle()
            datasets.append(order.repeat().batch(batch, drop_remainder=True))
        mixed = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED)
        self._batches = iter(mixed.to_iter_dataset(options))

    def __next__(self) -> Batch:
        return next(self._batches)

    @property
    def position(self) -> dict[str, Any]:
        """What comes next, JSON: a part of every checkpoint."""
        return self._batches.get_state()

    @position.setter
    def position(self, position: dict[str, Any]) -> None:
        self._batches.set_state(position)
