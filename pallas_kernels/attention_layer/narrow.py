"""A ring's attention in few registers: eight query rows a block, keys and values one after another.

Beside the warps that multiply there are not registers enough for a `RingBlock`'s order, in which
all of a warp's keys and values are loaded at once. Here they come from the L2 cache, where they
were brought while the projection was under way.

One trip to that cache takes longer than all that is computed, so that few of them must follow one
another. The ring's keys do not depend on the projection, and are loaded before it is waited for.
Queries and new rows the finisher's warps take from the exchange to shared memory (`take`), while
those that attend wait; the ring's values are copied to shared memory meanwhile, each warp's to
where it leaves its sums later, and angles are in the first-level cache by then. So no trip is left.
"""

import dataclasses
import functools
import operator

from pallas_kernels.attention.ring import KEYS, Place, columns_of
from pallas_kernels.attention.ring_block import RingBlock

_LINE = 64
"""Elements of 2 bytes that are brought to the cache at a time."""
_NEAR = 8
"""Sinks that are brought by one of them, in one sector of the cache."""
_PIECE = 8
"""Elements of 2 bytes that a thread takes at a time."""
_AT_ONCE = 4
"""Pieces that a thread waits for at a time: of the finisher's registers."""


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

    @property
    def shared(self) -> dict[str, int]:
        """With what is taken of the projection: queries, new keys and values, in words."""
        return RingBlock.shared.fget(self) | dict(own=4 * self._pieces_taken)

    @property
    def _pieces_taken(self) -> int:
        return (self.rows * self.h + self.t * (self.h + self.v)) // _PIECE

    def take(self, m, block, refs):
        """Puts a tile's queries, and the block's keys and values, into shared memory."""
        tile, head = block % self.tiles, block // self.tiles
        sequence, kv, last = head // self.k, head % self.k, self._pieces_taken - 1
        for begin in range(0, last + 1, _AT_ONCE * m.threads):
            many = min(_AT_ONCE, -(-(last + 1 - begin) // m.threads))
            pieces = [m.minimum(m.thread + (begin + i * m.threads), last) for i in range(many)]
            places = [self._place_of(m, sequence, kv, tile, piece) for piece in pieces]
            found = m.await_words(refs["exchange"], [refs["qkv"] + (at >> 1) for at in places])
            for piece, words in zip(pieces, found, strict=True):
                m.store_shared_words(refs["own"], piece * 4, words)

    def _place_of(self, m, sequence, kv, tile, piece):
        """First element, in the product, of a piece that is taken."""
        h, v, rows = self.h // _PIECE, self.v // _PIECE, self.rows
        query = m.minimum(piece // h + tile * rows, self.t * self.group - 1)
        token = sequence * self.t + query // self.group
        of_query = self._head(token, kv) + (query % self.group) * self.h + (piece % h) * _PIECE
        # Of pieces that are not of keys these numbers are of no interest, but not negative.
        key = m.maximum(piece - rows * h, 0)
        token = sequence * self.t + m.minimum(key // h, self.t - 1)
        of_key = self._head(token, kv) + (key % h) * _PIECE + self.group * self.h
        value = m.maximum(piece - (rows + self.t) * h, 0)
        token = sequence * self.t + value // v
        of_value = self._head(token, kv) + (value % v) * _PIECE + (self.group + 1) * self.h
        found = m.where(m.const((rows + self.t) * h) > piece, of_key, of_value)
        return m.where(m.const(rows * h) > piece, of_query, found)

    def run(self, m, block, refs):
        """Writes the output rows of one thread block."""
        lane, warp = m.thread % 32, m.thread // 32
        g, c = lane // 4, lane % 4
        tile, head = block % self.tiles, block // self.tiles
        sequence, kv = head // self.k, head % self.k
        first = head * self.s
        (start,) = m.load(refs["start"], sequence, 4, 1)
        (live,) = m.load(refs["live"], sequence, 4, 1)
        own = [warp * KEYS + g + 8 * i for i in (0, 1)]
        mine = [warp * KEYS + c * 2 + place for place in (0, 1, 8, 9)]
        self._copy_values(m, refs, first, warp, lane)
        keys = [self._key(m, refs, first, r, c) for r in own]
        where = Place(sequence, kv, tile, first, start, start + live - 1, g, c)
        self._touch_angles(m, refs, sequence)
        self._touch_sinks(m, refs)
        m.wait()
        row = tile * self.rows + g
        query = self._taken(m, refs, g * self.h, columns_of(self.h, c))
        token = sequence * self.t + m.minimum(row, self.t * self.group - 1) // self.group
        query = self._turned(m, refs, token, query, c)
        new = [self._is_new(m, where, r) for r in own]
        keys = self._renewed(m, new, self._new_key, refs, where, own, keys)
        scores = [self._scores(m, [query], key) for key in keys]
        m.await_copies()
        value = [self._copied_value(m, refs, r, g) for r in mine]
        used, seen = self._visible(m, where, row // self.group, mine)
        tops, totals, weights = self._soften(m, scores, [seen])
        new = [self._is_new(m, where, r) for r in mine]
        value = self._renewed(m, new, self._new_value_of, refs, where, mine, value)
        # What no row of the block sees may be anything, NaN too: 0 times NaN is not 0.
        value = [
            [[m.where(use, word, m.const(0)) for word in piece] for piece in words]
            for use, words in zip(used, value, strict=True)
        ]
        sums = self._mix(m, weights, value)
        m.meet_warp()
        self._leave(m, refs, warp, lane, m.const(self.shares) > warp, tops, totals, sums)
        m.barrier()
        self._finish(m, refs, sequence, kv, tile)

    def _copy_values(self, m, refs, first, warp, lane):
        """Starts to copy a warp's rows of values to shared memory, a lane a piece at a time."""
        pieces, last = self.v // _PIECE, m.const(self.shares) > warp
        for begin in range(0, KEYS * pieces, 32):
            piece = lane + begin
            row, there = warp * KEYS + piece // pieces, last & (m.const(KEYS * pieces) > piece)
            source = (first + m.minimum(row, self.s - 1)) * self.v + (piece % pieces) * _PIECE
            m.copy(
                refs["sums"], self._value_at(m, row, piece % pieces), refs["values"], source, there
            )

    def _value_at(self, m, row, piece):
        """First word, in shared memory, of a piece of a row of values.

        Lanes that load at a time have four rows, in turn, and two pieces: they are kept apart.
        """
        piece = m.exclusive_or(piece, row & 6) if self.v % 64 == 0 else piece
        return (row * (self.v // _PIECE) + piece) * (_PIECE // 2)

    def _copied_value(self, m, refs, row, g):
        """A lane's columns of a row of values that was copied."""
        row, found = m.minimum(row, self.shares * KEYS - 1), []
        for column, width in self.columns:
            element = g * width + column
            at = self._value_at(m, row, element // _PIECE) + ((element % _PIECE) >> 1)
            found.append(m.load_shared_words(refs["sums"], at, width // 2))
        return found

    def _touch_angles(self, m, refs, sequence):
        """Starts to bring a sequence's angles to the first-level cache."""
        size = self.t * self.half
        for name in ("cos", "sin"):
            for begin in range(0, size, _LINE // 2 * m.threads):
                at = m.thread * (_LINE // 2) + begin
                place = sequence * size + m.minimum(at, size - 1)
                m.touch(refs[name], place, 4, m.const(size) > at)

    def _touch_sinks(self, m, refs):
        """Likewise: they are needed last, and then at once."""
        if self.sink:
            head = m.thread * _NEAR
            m.touch(refs["sink"], head, self.sink_bytes, m.const(self.n) > head)

    def _finish_piece(self, m, refs, sequence, kv, tile, piece):
        """By whole warps: those without a piece leave the others their turn."""

        def finish():
            RingBlock._finish_piece(self, m, refs, sequence, kv, tile, piece)
            return []

        m.branch(m.const(self._pieces_of_share) > piece, finish, [])

    def _taken(self, m, refs, first, places, where=None, other=None):
        """Pieces of a row that was taken, which begins with element `first`."""
        other = other or [None] * len(places)
        return [
            m.load_shared_words(refs["own"], (first + at + offset) >> 1, words, where, known)
            for (at, offset, words), known in zip(places, other, strict=True)
        ]

    def _load_new_key(self, m, refs, where, row, is_new, old):
        """A new key, as projected, in the registers of what was loaded before."""
        token = self._token(m, where, row) - where.sequence * self.t
        first = (token + self.rows) * self.h
        return self._taken(m, refs, first, columns_of(self.h, where.c), is_new, old)

    def _new_value_of(self, m, refs, where, row, is_new, old):
        """A lane's columns of new values likewise, scaled, which tile 0 writes."""
        token = self._token(m, where, row) - where.sequence * self.t
        first = token * self.v + (self.rows + self.t) * self.h
        places = [(where.g * width, column, width // 2) for column, width in self.columns]
        pieces = self._taken(m, refs, first, places, is_new, old)
        return self._place_value(m, refs, where, row, is_new, pieces)

    def _write(self, m, refs, at, words, there):
        """Leaves a row's columns in the exchange."""
        m.publish(refs["exchange"], refs["out"] + (at >> 1), words, there)

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

    def _renewed(self, m, new, renew, refs, where, rows, held):
        """Lanes' pieces of rows, the block's own by `renew`, in the few warps that have one."""

        def renewed():
            found = [
                renew(m, refs, where, row, is_new, pieces)
                for row, is_new, pieces in zip(rows, new, held, strict=True)
            ]
            return [word for pieces in found for word in _flat(pieces)]

        some = functools.reduce(operator.or_, new)
        words = m.branch(m.any(some), renewed, [w for pieces in held for w in _flat(pieces)])
        return _like(held, words)


def _flat(pieces) -> list:
    return [word for piece in pieces for word in piece]


def _like(rows, words) -> list:
    """Words in pieces as long as those of some rows."""
    words = iter(words)
    return [[[next(words) for _ in piece] for piece in row] for row in rows]
