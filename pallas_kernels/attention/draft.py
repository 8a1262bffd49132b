"""A drafter's attention: a block sees a ring of context and itself, in one launch.

The block's keys and values are read from where they were projected; the ring keeps what it holds.
Drafters have longer windows than targets: a warp takes 16 rows after another.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.attention.ring import KEYS, ROWS, Place, Ring, bytes_of, columns_of
from pallas_kernels.attention.shapes import sizes_of
from pallas_kernels.softmax import MASKED

WARPS = 8
"""Of a thread block: each has registers for what it loads and for its sums."""


@dataclasses.dataclass(frozen=True)
class Draft(Ring):
    """A `Ring` whose `s` rows are those of the ring in memory and, after them, the block's own.

    Attributes:
      causal: a token sees the block up to itself, not all of it.
    """

    causal: bool

    name = "attention_draft"

    def misfit(self) -> str | None:
        """Why the kernel cannot take these shapes."""
        if self.window < self.t:
            return f"a block of {self.t}, longer than its window of {self.window}"
        return Ring.misfit(self)

    @property
    def held(self) -> int:
        """Rows of the ring in memory."""
        return self.s - self.t

    @property
    def shares(self) -> int:
        """Warps, each with some of the rows."""
        return min(WARPS, -(-self.s // KEYS))

    @property
    def turns(self) -> int:
        """Of 16 rows, for a warp."""
        return -(-self.s // (KEYS * self.shares))

    def run(self, m, block, refs):
        """Writes the output rows of one thread block."""
        lane, warp = m.thread % 32, m.thread // 32
        tile, head = block % self.tiles, block // self.tiles
        sequence, kv = head // self.k, head % self.k
        rows = [tile * ROWS + lane // 4 + 8 * i for i in (0, 1)]
        query = [self._query(m, refs, sequence, kv, row, lane % 4) for row in rows]
        (start,) = m.load(refs["start"], sequence, 4, 1)
        first = head * self.held
        where = Place(sequence, kv, tile, first, start, start - 1, lane // 4, lane % 4)
        tokens = [row // self.group for row in rows]

        def step(i, carry):
            share = self._share(m, refs, where, warp * self.turns + i, query, tokens)
            return _joined(m, carry, share)

        nothing = [m.const(MASKED)] * 2 + [m.const(0.0)] * (2 + self.v // 2)
        tops, totals, sums = _parts(m.repeat(m.const(self.turns), step, nothing))
        shared = m.const(self.shares) > warp
        self._leave(m, refs, warp, lane, shared, tops, totals, sums)
        m.barrier()
        self._finish(m, refs, sequence, kv, tile)

    def _share(self, m, refs, where, share, query, tokens):
        """Maxima, sums of weights and weighted sums over 16 rows, as one list."""
        own = [share * KEYS + where.g + 8 * i for i in (0, 1)]
        mine = [share * KEYS + where.c * 2 + place for place in (0, 1, 8, 9)]
        key = [self._key(m, refs, where.first, row, where.c) for row in own]
        value = [self._value(m, refs, where.first, row, where.g) for row in mine]
        positions = [self._position(m, where.last, row) for row in mine]
        used = [(p >= 0) & (p > where.start - self.window) for p in positions]
        value = [
            [[m.where(use, word, m.const(0)) for word in piece] for piece in row]
            for use, row in zip(used, value, strict=True)
        ]
        seen = [
            [
                use & (p <= where.start + self._sees(t)) & (p > where.start + t - self.window)
                for p, use in zip(positions, used, strict=True)
            ]
            for t in tokens
        ]
        scores = [self._scores(m, query, keys) for keys in key]
        tops, totals, weights = self._soften(m, scores, seen)
        return [*tops, *totals, *sum(self._mix(m, weights, value), [])]

    def _sees(self, token):
        return token if self.causal else self.t - 1

    def _position(self, m, last, row):
        """The context ends with `last`; the block comes next."""
        context = last - (last - row + self.held) % self.held
        found = m.where(m.const(self.held) > row, context, last + 1 + (row - self.held))
        return m.where(m.const(self.s) > row, found, m.const(-1))

    def _both(self, m, refs, name, first, row, size, places):
        """Pieces of a row of the ring, or of the block; of rows past the last, of the last."""
        head = first // self.held
        token = m.minimum(m.maximum(row - self.held, 0), self.t - 1)
        own = ((head // self.k * self.t + token) * self.k + head % self.k) * size
        start = (first + m.minimum(row, self.held - 1)) * size
        context = m.const(self.held) > row
        block = row > m.const(self.held - 1)
        found = [
            m.load(refs[name], start + at, 2, words, context, offset=offset)
            for at, offset, words in places
        ]
        return [
            m.load(refs[f"own_{name}"], own + at, 2, words, block, known, offset)
            for (at, offset, words), known in zip(places, found, strict=True)
        ]

    def _key(self, m, refs, first, row, c):
        return self._both(m, refs, "keys", first, row, self.h, columns_of(self.h, c))

    def _value(self, m, refs, first, row, g):
        places = [(g * width, column, width // 2) for column, width in self.columns]
        return self._both(m, refs, "values", first, row, self.v, places)


def _parts(carry):
    """Maxima, sums of weights and weighted sums of both rows."""
    half = (len(carry) - 4) // 2
    return carry[:2], carry[2:4], [carry[4 : 4 + half], carry[4 + half :]]


def _joined(m, carry, share):
    """Two such lists over all their rows."""
    (tops, totals, sums), (new_tops, new_totals, new_sums) = _parts(carry), _parts(share)
    found = [m.maximum(*pair) for pair in zip(tops, new_tops, strict=True)]
    old = [m.exp2(a - top) for a, top in zip(tops, found, strict=True)]
    new = [m.exp2(a - top) for a, top in zip(new_tops, found, strict=True)]
    joined = [
        [m.fma(a, old[i], b * new[i]) for a, b in zip(sums[i], new_sums[i], strict=True)]
        for i in (0, 1)
    ]
    totals = [m.fma(totals[i], old[i], new_totals[i] * new[i]) for i in (0, 1)]
    return [*found, *totals, *joined[0], *joined[1]]


def shape_of(q, keys, values, window: int, sink, causal: bool) -> Draft:
    """The shapes of a call."""
    *sizes, held = sizes_of(q, keys, values)
    known = *sizes, held + q.shape[1], window, sink is not None, causal
    return Draft(*known, sink_bytes=bytes_of(sink))


def draft_ring(shape: Draft, q, own_keys, own_values, keys, values, start, sink):
    """See `api.draft_attention`; one launch."""
    inputs = dict(q=q, own_keys=own_keys, own_values=own_values, keys=keys, values=values)
    inputs |= dict(start=start, live=jnp.zeros_like(start))
    return shape.call(inputs, sink, q.dtype)
