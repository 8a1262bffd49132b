"""Attention over a window's ring: one small thread block for each 16 query rows, no copies.

All of a ring, 135 rows for a window of 128, is loaded at once into registers, 16 rows a warp, as
the products want it. The warps' shares are put together in shared memory by ascending row. What
bounds this is one trip to memory, the launch, and the SMs that take part.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from pallas_kernels.attention.launch import launch_lanes
from pallas_kernels.attention.shapes import sizes_of
from pallas_kernels.softmax import LOG2E, MASKED

KEYS = 16
"""Rows of a ring in a warp's share."""
EIGHT = 8
"""Query rows that a lane group has one of; a product has two eights."""
ROWS = 2 * EIGHT
"""Query rows of a thread block that fills its products."""
MOST_WARPS = 16


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a lane is: registers.

    Attributes:
      sequence, kv, tile: of its thread block.
      first: row of the arrays of all rings with which its ring begins.
      start, last: positions of the block's first row and of the last that is cached.
      g, c: lane / 4 and lane % 4.
    """

    sequence: typing.Any
    kv: typing.Any
    tile: typing.Any
    first: typing.Any
    start: typing.Any
    last: typing.Any
    g: typing.Any
    c: typing.Any


@dataclasses.dataclass(frozen=True)
class Ring:
    """Shapes of a call; a thread block's work, on a `Machine` or on numpy's stand-in.

    Attributes:
      b, t, n, h, v, k, s: see the README of the repository: batch, block, query heads, their size,
        the values' size, key/value heads, rows of the ring.
      window: positions that a query sees, itself included.
      sink: whether each head has one more logit.
      sink_bytes: of such a logit: float32, or bfloat16 as models hold it, of an even number of
        heads. Left as it is, it costs no launch.
      eights: of query rows in a thread block, 2 or 1; one takes fewer registers.
    """

    b: int
    t: int
    n: int
    h: int
    v: int
    k: int
    s: int
    window: int
    sink: bool
    sink_bytes: int = dataclasses.field(default=4, kw_only=True)
    eights: int = dataclasses.field(default=2, kw_only=True)

    name = "attention_ring"
    """Of the kernel."""
    ranks = None
    """Thread blocks of a cluster, where a tile of query rows has one."""

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.n // self.k

    @property
    def tiles(self) -> int:
        """Thread blocks of a key/value head."""
        return -(-self.t * self.group // self.rows)

    @property
    def rows(self) -> int:
        """Query rows of a thread block."""
        return EIGHT * self.eights

    @property
    def shares(self) -> int:
        """Warps that have keys."""
        return -(-self.s // KEYS)

    @property
    def warpgroups(self) -> int:
        """Of a thread block."""
        return -(-self.shares // 4)

    @property
    def shared(self) -> dict[str, int]:
        """Sizes of the arrays in shared memory: what the warps leave."""
        rows = self.shares * self.rows
        return dict(sums=rows * self.v, tops=rows, totals=rows)

    @property
    def columns(self) -> list[tuple[int, int]]:
        """(first column, columns of a lane) of the value columns' pieces: 8 lanes side by side."""
        whole = [(64 * i, 8) for i in range(self.v // 64)]
        return whole + ([(self.v - 32, 4)] if self.v % 64 else [])

    def misfit(self) -> str | None:
        """Why the kernel cannot take these shapes."""
        if self.shares > MOST_WARPS:
            return f"a ring of {self.s} rows; at most {KEYS * MOST_WARPS} fit one thread block"
        if self.h % 16 or self.v % 32:
            return f"heads of {self.h} and {self.v}; they must be multiples of 16 and 32"
        return None

    def call(self, inputs: dict, sink, dtype):
        """Launches a thread block for each tile of query rows; inputs may be written to."""
        if self.sink:
            sink = sink if self.sink_bytes == 2 else sink.astype(jnp.float32)
            inputs = {**inputs, "sink": sink}
        return launch_lanes(
            self,
            inputs,
            jax.ShapeDtypeStruct((self.b, self.t, self.n, self.v), dtype),
            blocks=self.b * self.k * self.tiles,
            ranks=self.ranks,
            warps=4 * self.warpgroups,
            shared=self.shared,
            name=self.name,
        )

    # --- one thread block -------------------------------------------------------------------------

    def run(self, m, block, refs):
        """Writes the output rows of one thread block."""
        lane, warp = m.thread % 32, m.thread // 32
        g, c = lane // 4, lane % 4
        tile, head = block % self.tiles, block // self.tiles
        sequence, kv = head // self.k, head % self.k
        rows = [tile * self.rows + g + EIGHT * i for i in range(self.eights)]
        shared = m.const(self.shares) > warp
        query = [self._query(m, refs, sequence, kv, row, c) for row in rows]
        first = (sequence * self.k + kv) * self.s
        own = [warp * KEYS + g + 8 * i for i in (0, 1)]
        mine = [warp * KEYS + c * 2 + place for place in (0, 1, 8, 9)]
        key = [self._key(m, refs, first, row, c) for row in own]
        value = [self._value(m, refs, first, row, g) for row in mine]
        (start,) = m.load(refs["start"], sequence, 4, 1)
        (live,) = m.load(refs["live"], sequence, 4, 1)
        last = start + live - 1
        query = [self._ready(m, row, c) for row in query]
        where = Place(sequence, kv, tile, first, start, last, g, c)
        key, value = self._renew(m, refs, where, own, mine, key, value)
        positions = [self._position(m, last, row) for row in mine]
        # What no row of the block sees may be anything, NaN too: 0 times NaN is not 0.
        used = [(p >= 0) & (p > start - self.window) for p in positions]
        value = [
            [[m.where(use, word, m.const(0)) for word in piece] for piece in row]
            for use, row in zip(used, value, strict=True)
        ]
        scores = [self._scores(m, query, keys) for keys in key]
        token = [row // self.group for row in rows]
        seen = [
            [
                use & (p <= start + t) & (p > start + t - self.window)
                for p, use in zip(positions, used, strict=True)
            ]
            for t in token
        ]
        tops, totals, weights = self._soften(m, scores, seen)
        sums = self._mix(m, weights, value)
        self._leave(m, refs, warp, lane, shared, tops, totals, sums)
        m.barrier()
        self._finish(m, refs, sequence, kv, tile)

    def _query(self, m, refs, sequence, kv, row, c):
        """Starts to load a lane's pieces of a query row."""
        row = m.minimum(row, self.t * self.group - 1)
        token, head = row // self.group, kv * self.group + row % self.group
        at = ((sequence * self.t + token) * self.n + head) * self.h
        return self._pieces(m, refs["q"], at, c)

    def _ready(self, m, query, c):
        """The pieces of a query row, from what was loaded."""
        del m, c
        return query

    def _renew(self, m, refs, where, own, mine, key, value):
        """Keys of the rows `own` and values of the rows `mine`, the block's own among them."""
        del m, refs, where, own, mine
        return key, value

    def _key(self, m, refs, first, row, c):
        """A lane's pieces of a ring's row; of rows past the last, of the last."""
        return self._pieces(m, refs["keys"], (first + m.minimum(row, self.s - 1)) * self.h, c)

    def _pieces(self, m, ref, start, c):
        """4 words for 32 columns, 8 a lane, and 2 for the last 16.

        The order of columns in a product is free, as long as queries and keys have the same.
        """
        return [
            m.load(ref, start + at, 2, words, offset=offset)
            for at, offset, words in columns_of(self.h, c)
        ]

    def _value(self, m, refs, first, row, g):
        """A lane's columns of a row of values."""
        start = (first + m.minimum(row, self.s - 1)) * self.v
        # Not at offsets: a block of one token would spill.
        return [
            m.load(refs["values"], start + (g * width + column), 2, width // 2)
            for column, width in self.columns
        ]

    def _position(self, m, last, row):
        """The position that a ring's row holds, negative if none; see `reference.positions`."""
        found = last - (last - row + self.s) % self.s
        return m.where(m.const(self.s) > row, found, m.const(-1))

    def _scores(self, m, query, keys):
        """Products of 16 query rows with 8 keys: even and odd steps apart, then added."""
        sums = [[m.const(0.0)] * 4, [m.const(0.0)] * 4]
        # A second row that is not there is zeros.
        query = query if self.eights > 1 else [*query, [[m.const(0)] * len(p) for p in query[0]]]
        steps = [
            (low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1], b[2 * i], b[2 * i + 1])
            for low, high, b in zip(*query, keys, strict=True)
            for i in range(len(b) // 2)
        ]
        for i, step in enumerate(steps):
            sums[i % 2] = m.multiply(step[:4], step[4:], sums[i % 2])
        return [a + b for a, b in zip(*sums, strict=True)]

    def _soften(self, m, scores, seen):
        """Maxima and sums of both rows over this warp's keys, and the weights as an operand."""
        factor, tops, totals, halves = m.const(self.h**-0.5 * LOG2E), [], [], []
        for half in range(self.eights):
            # Keys 2 c, 2 c + 1, 2 c + 8, 2 c + 9, as `seen` has them.
            own = [*scores[0][2 * half : 2 * half + 2], *scores[1][2 * half : 2 * half + 2]]
            own = [
                m.where(see, score * factor, m.const(MASKED))
                for see, score in zip(seen[half], own, strict=True)
            ]
            top = m.maximum(m.maximum(own[0], own[1]), m.maximum(own[2], own[3]))
            for mask in (1, 2):
                top = m.maximum(top, m.swap(top, mask))
            # Whole: see `pallas_kernels.softmax`.
            top = m.whole(top)
            weights = [
                m.where(see, m.exp2(score - top), m.const(0.0))
                for see, score in zip(seen[half], own, strict=True)
            ]
            total = (weights[0] + weights[1]) + (weights[2] + weights[3])
            for mask in (1, 2):
                total = total + m.swap(total, mask)
            tops.append(top)
            totals.append(total)
            halves.append((m.pack(*weights[:2]), m.pack(*weights[2:])))
        halves += [[m.const(0)] * 2] * (2 - self.eights)
        return tops, totals, [halves[0][0], halves[1][0], halves[0][1], halves[1][1]]

    def _mix(self, m, weights, value):
        """Weighted sums of this warp's values, [half][the lane's columns in order]."""
        found = [[], []]
        for piece, (_, width) in enumerate(self.columns):
            even, odd = [], []
            for j in range(width):
                words = [row[piece][j // 2] for row in value]
                operand = [m.halves(*words[i : i + 2], bool(j % 2)) for i in (0, 2)]
                sums = m.multiply(weights, operand, [m.const(0.0)] * 4)
                # Columns j of lanes 2 c and 2 c + 1, for each of the two rows.
                even.append((sums[0], sums[2]))
                odd.append((sums[1], sums[3]))
            for half in range(self.eights):
                found[half] += [pair[half] for pair in even + odd]
        return found

    def _leave(self, m, refs, warp, lane, shared, tops, totals, sums):
        """Puts a warp's share in shared memory: 16 bytes of each lane side by side."""
        for half in range(self.eights):
            for q in range(self.v // 16):
                place = (
                    warp * (self.eights * (self.v // 16)) + (half * (self.v // 16) + q)
                ) * 32 + lane
                m.store_shared(refs["sums"], place * 4, sums[half][4 * q : 4 * q + 4], shared)
            place = warp * self.rows + (lane // 4 + 8 * half)
            owner = shared & (lane % 4).equals(0)
            m.store_shared(refs["tops"], place, [tops[half]], owner)
            m.store_shared(refs["totals"], place, [totals[half]], owner)

    def _finish(self, m, refs, sequence, kv, tile):
        """Adds up the shares by ascending row of the ring and writes bfloat16."""
        pieces = self._pieces_of_share
        for begin in range(0, pieces, 128 * self.warpgroups):
            piece = m.thread + begin
            self._finish_piece(m, refs, sequence, kv, tile, piece)

    def _finish_piece(self, m, refs, sequence, kv, tile, piece):
        """Four columns of a row."""
        there = m.const(self._pieces_of_share) > piece
        piece = m.minimum(piece, self._pieces_of_share - 1)
        lane, q = piece % 32, piece // 32
        row = lane // 4 + (q // (self.v // 16)) * 8
        place = tile * self.rows + row
        there = there & (m.const(self.t * self.group) > place)
        place = m.minimum(place, self.t * self.group - 1)
        token, head = place // self.group, kv * self.group + place % self.group
        mixed = self._together(m, refs, piece, row, head)
        column = self._column(m, q % (self.v // 16), lane % 4)
        words = [m.pack(*mixed[:2]), m.pack(*mixed[2:])]
        at = ((sequence * self.t + token) * self.n + head) * self.v + column
        self._write(m, refs, at, words, there)

    def _write(self, m, refs, at, words, there):
        """Writes four columns of a row."""
        m.store(refs["out"], at, 2, words, there)

    @property
    def _pieces_of_share(self) -> int:
        """Pieces of four columns that a warp leaves."""
        return self.rows * self.v // 4

    def _column(self, m, q, c):
        """The first of the four columns that a lane's piece q holds."""
        whole = self.v // 64
        found = q // 4 * 64 + c * 16 + q % 4 * 4
        if self.v % 64:
            rest = c * 8 + (q - 4 * whole) * 4 + 64 * whole
            found = m.where(m.const(4 * whole) > q, found, rest)
        return found

    def _load_sink(self, m, refs, head):
        """Starts to load a head's sink, and of two bytes its neighbour's with it."""
        first = head if self.sink_bytes == 4 else head - head % 2
        return m.load(refs["sink"], first, self.sink_bytes, 1)[0]

    def _logit(self, m, word, head):
        """A head's sink, of what was loaded."""
        if self.sink_bytes == 4:
            return m.as_float(word)
        low, high = m.unpack(word)
        return m.where((head % 2).equals(0), low, high)

    def _together(self, m, refs, piece, row, head):
        """Four columns of a row: all shares, each brought to the row's greatest score."""
        tops = [
            m.load_shared(refs["tops"], row + self.rows * share, 1)[0]
            for share in range(self.shares)
        ]
        top = tops[0]
        for other in tops[1:]:
            top = m.maximum(top, other)
        total = m.const(0.0)
        if self.sink:
            logit = self._logit(m, self._load_sink(m, refs, head), head) * m.const(LOG2E)
            top = m.maximum(top, logit)
            total = m.exp2(logit - top)
        mixed = [m.const(0.0)] * 4
        for share, own in enumerate(tops):
            factor = m.exp2(own - top)
            (weight,) = m.load_shared(refs["totals"], row + self.rows * share, 1)
            total = m.fma(weight, factor, total)
            sums = m.load_shared(refs["sums"], (piece + share * self._pieces_of_share) * 4, 4)
            mixed = [m.fma(a, factor, b) for a, b in zip(sums, mixed, strict=True)]
        share = m.const(1.0) / m.maximum(total, m.const(1e-30))
        return [value * share for value in mixed]


def columns_of(h: int, c):
    """The pieces of h columns that one of four lanes has.

    Returns:
      (a column, how many after it a piece begins, words) of each.
    """
    found = [(c * 8, 32 * i, 4) for i in range(h // 32)]
    return found + ([(c * 4, h - 16, 2)] if h % 32 else [])


def bytes_of(sink) -> int:
    """How a kernel reads sinks."""
    return 2 if sink is not None and sink.dtype == jnp.bfloat16 and sink.size % 2 == 0 else 4


def shape_of(q, keys, values, window: int, sink) -> Ring:
    """The shapes of a call."""
    known = *sizes_of(q, keys, values), window, sink is not None
    return Ring(*known, sink_bytes=bytes_of(sink))


def ring_attention(shape: Ring, q, keys, values, start, live, sink):
    """See `api.decode_attention`; one launch."""
    inputs = dict(q=q, keys=keys, values=values, start=start, live=live)
    return shape.call(inputs, sink, q.dtype)
