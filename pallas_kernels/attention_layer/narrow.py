"""A ring's attention in few registers: eight query rows a block, keys and values one after another.

Beside the warps that multiply there are not registers enough for a `RingBlock`'s order, in which
all of a warp's keys and values are loaded at once. Here they come from the L2 cache, where they
were brought while the projection was under way.
"""

import dataclasses

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
        row = tile * self.rows + g
        query = self._ready(m, self._query(m, refs, sequence, kv, row, c), c)
        (start,) = m.load(refs["start"], sequence, 4, 1)
        (live,) = m.load(refs["live"], sequence, 4, 1)
        first, last = head * self.s, start + live - 1
        where = Place(sequence, kv, tile, first, start, last, g, c)
        own = [warp * KEYS + g + 8 * i for i in (0, 1)]
        mine = [warp * KEYS + c * 2 + place for place in (0, 1, 8, 9)]
        scores = [self._scores(m, [query], self._fresh_key(m, refs, where, r)) for r in own]
        positions = [self._position(m, last, r) for r in mine]
        used = [(p >= 0) & (p > start - self.window) for p in positions]
        token = row // self.group
        seen = [
            use & (p <= start + token) & (p > start + token - self.window)
            for p, use in zip(positions, used, strict=True)
        ]
        tops, totals, weights = self._soften(m, scores, [seen])
        value = self._fresh_values(m, refs, where, mine)
        # What no row of the block sees may be anything, NaN too: 0 times NaN is not 0.
        value = [
            [[m.where(use, word, m.const(0)) for word in piece] for piece in words]
            for use, words in zip(used, value, strict=True)
        ]
        sums = self._mix(m, weights, value)
        self._leave(m, refs, warp, lane, m.const(self.shares) > warp, tops, totals, sums)
        m.barrier()
        self._finish(m, refs, sequence, kv, tile)

    def _fresh_key(self, m, refs, where, row):
        """A lane's pieces of a ring's row, or of the block's own key for it."""
        old, is_new = self._key(m, refs, where.first, row, where.c), self._is_new(m, where, row)

        def renewed():
            return _flat(self._new_key(m, refs, where, row, is_new, old))

        return _like(old, m.branch(m.any(is_new), renewed, _flat(old)))

    def _fresh_values(self, m, refs, where, rows):
        """A lane's columns of some rows of values likewise."""
        old = [self._value(m, refs, where.first, row, where.g) for row in rows]
        new = [self._is_new(m, where, row) for row in rows]
        some = new[0] | new[1] | new[2] | new[3]

        def renewed():
            pairs = zip(rows, old, strict=True)
            return [w for row, o in pairs for w in _flat(self._new_value(m, refs, where, row, o))]

        found = iter(m.branch(m.any(some), renewed, [w for row in old for w in _flat(row)]))
        return [_like(row, found) for row in old]


def _flat(pieces) -> list:
    return [word for piece in pieces for word in piece]


def _like(pieces, words) -> list:
    """Words in pieces as long as those."""
    words = iter(words)
    return [[next(words) for _ in piece] for piece in pieces]
