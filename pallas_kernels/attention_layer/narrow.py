"""A ring's attention in few registers: eight query rows a block, keys and values one after another.

Beside the warps that multiply there are not registers enough for a `RingBlock`'s order, in which
all of a warp's keys and values are loaded at once. Here they come from the L2 cache, where they
were brought while the projection was under way.

One trip to that cache takes longer than all that is computed, so that few of them must follow one
another. The ring's keys do not depend on the projection, and are loaded before it is waited for.
What the first-level cache held is lost with the wait, which acquires what other blocks wrote. Then
come queries, new keys and angles, as far as registers allow at once, and values, new or not.
"""

import dataclasses
import functools
import operator

from pallas_kernels.attention.ring import KEYS, Place
from pallas_kernels.attention.ring_block import RingBlock

_LINE = 64
"""Elements of 2 bytes that are brought to the cache at a time."""


@dataclasses.dataclass(frozen=True)
class NarrowRing(RingBlock):
    """A `RingBlock` of one eight; its bits are the same."""

    eights: int = dataclasses.field(default=1, kw_only=True)

    def bring(self, m, block, refs):
        """Starts to bring the tile's ring to the L2 cache."""
        first = block // self.tiles * self.s
        for name, size in (("keys", self.h), ("values", self.v)):
            lines = self.s * size // _LINE
            for start in range(0, lines, m.threads):
                line = m.thread + start
                at = first * size + m.minimum(line, lines - 1) * _LINE
                m.prefetch(refs[name], at, 2, m.const(lines) > line)

    def run(self, m, block, refs):
        """Writes the output rows of one thread block."""
        lane, warp = m.thread % 32, m.thread // 32
        g, c = lane // 4, lane % 4
        tile, head = block % self.tiles, block // self.tiles
        sequence, kv = head // self.k, head % self.k
        row, first = tile * self.rows + g, head * self.s
        (start,) = m.load(refs["start"], sequence, 4, 1)
        (live,) = m.load(refs["live"], sequence, 4, 1)
        own = [warp * KEYS + g + 8 * i for i in (0, 1)]
        mine = [warp * KEYS + c * 2 + place for place in (0, 1, 8, 9)]
        keys = [self._key(m, refs, first, r, c) for r in own]
        where = Place(sequence, kv, tile, first, start, start + live - 1, g, c)
        m.wait()
        query, token = self._query_pieces(m, refs, sequence, kv, row, c)
        new = [self._is_new(m, where, r) for r in own]
        keys = [
            self._load_new_key(m, refs, where, r, is_new, key)
            for r, is_new, key in zip(own, new, keys, strict=True)
        ]
        query = self._turned(m, refs, token, query, c)
        keys = self._placed(m, new, self._place_key, refs, where, own, keys)
        scores = [self._scores(m, [query], key) for key in keys]
        value = self._newest_values(m, refs, where, mine)
        used, seen = self._visible(m, where, row // self.group, mine)
        tops, totals, weights = self._soften(m, scores, [seen])
        new = [self._is_new(m, where, r) for r in mine]
        value = self._placed(m, new, self._place_value, refs, where, mine, value)
        # What no row of the block sees may be anything, NaN too: 0 times NaN is not 0.
        value = [
            [[m.where(use, word, m.const(0)) for word in piece] for piece in words]
            for use, words in zip(used, value, strict=True)
        ]
        sums = self._mix(m, weights, value)
        self._leave(m, refs, warp, lane, m.const(self.shares) > warp, tops, totals, sums)
        m.barrier()
        self._finish(m, refs, sequence, kv, tile)

    def _visible(self, m, where, token, rows):
        """Which rows of the ring some row of the block may see, and which its `token`-th sees."""
        positions = [self._position(m, where.last, row) for row in rows]
        used = [(p >= 0) & (p > where.start - self.window) for p in positions]
        last = where.start + token
        seen = [
            use & (p <= last) & (p > last - self.window)
            for p, use in zip(positions, used, strict=True)
        ]
        return used, seen

    def _newest_values(self, m, refs, where, rows):
        """Starts to load a lane's columns of rows of values: the ring's, or the block's own."""
        found = []
        for row in rows:
            is_new, base = self._is_new(m, where, row), self._new_values_row(m, where, row)
            held = (where.first + m.minimum(row, self.s - 1)) * self.v
            found.append(
                [
                    m.load_either(
                        is_new,
                        (refs["qkv"], base + where.g * width),
                        (refs["values"], held + where.g * width),
                        2,
                        width // 2,
                        column,
                    )
                    for column, width in self.columns
                ]
            )
        return found

    def _placed(self, m, new, place, refs, where, rows, held):
        """Lanes' pieces of rows; the block's own as they go to the ring, by `place`."""

        def placed():
            found = [
                place(m, refs, where, row, is_new, pieces)
                for row, is_new, pieces in zip(rows, new, held, strict=True)
            ]
            return [word for pieces in found for word in _flat(pieces)]

        some = functools.reduce(operator.or_, new)
        words = m.branch(m.any(some), placed, [w for pieces in held for w in _flat(pieces)])
        return _like(held, words)


def _flat(pieces) -> list:
    return [word for piece in pieces for word in piece]


def _like(rows, words) -> list:
    """Words in pieces as long as those of some rows."""
    words = iter(words)
    return [[[next(words) for _ in piece] for piece in row] for row in rows]
