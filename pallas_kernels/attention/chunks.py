"""Where a long cache is cut: at fixed positions, finely at first, in larger chunks further on.

A chunk begins and ends at the same positions whatever the length, so that the order of a row's sums
depends on its own position alone. Chunks grow with their position, so that there are enough of them
for all SMs at every length, and few when they are many rows each: each leaves sums to be added up.
"""

import dataclasses

SMALLEST = 128


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Chunks of a cache of `rows` rows; from position 2 * SMALLEST * ratio on they grow.

    Between powers of two there are `ratio` chunks of one size.
    """

    rows: int
    ratio: int = 64

    @property
    def levels(self) -> list[tuple[int, int, int]]:
        """(first position, size, chunks before) of each size."""
        low, size, before = 0, SMALLEST, 0
        high = 2 * SMALLEST * self.ratio
        found = [(low, size, before)]
        while high < self.rows:
            before += (high - low) // size
            low, size, high = high, 2 * size, 2 * high
            found.append((low, size, before))
        return found

    @property
    def most(self) -> int:
        """Chunks of a full cache."""
        low, size, before = self.levels[-1]
        return before + -(-(self.rows - low) // size)

    def count(self, end, maximum):
        """Chunks that begin before `end`; `maximum` is of the kind of numbers that `end` is."""
        total, levels = 0, self.levels
        for i, (low, size, before) in enumerate(levels):
            some = maximum(end - low + (size - 1), 0) // size
            if i + 1 < len(levels):
                most = levels[i + 1][2] - before
                some = some - maximum(some - most, 0)
            total = some + total
        return total

    def place(self, chunk, where):
        """First position and size of a chunk."""
        (low, size, _), *others = self.levels
        start, width = chunk * size + low, chunk * 0 + size
        for low, size, before in others:
            later = chunk >= before
            start = where(later, (chunk - before) * size + low, start)
            width = where(later, chunk * 0 + size, width)
        return start, width
