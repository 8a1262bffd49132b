"""A drafter's attention in one launch: a block, as projected, sees a ring of context and itself.

A cluster of thread blocks has 16 query rows of a key/value head, and each of its warps 16 rows of
the ring, so that all of a long ring is under way at once; the first has the block's own rows. Each
block adds up its warps, sends every block of the cluster some columns of that, and finishes those
columns that it is sent.
"""

import dataclasses
import typing

from pallas_kernels.attention import rotary
from pallas_kernels.attention.norms import normed
from pallas_kernels.attention.ring import KEYS, ROWS, Ring, bytes_of, columns_of
from pallas_kernels.attention.shapes import block_sizes_of
from pallas_kernels.shared_memory import shared_bytes
from pallas_kernels.softmax import LOG2E

MOST_WARPS = 12
"""Of a thread block: each thread then has registers for what it loads."""
SHARED_BYTES = 226 * 1024
"""Of shared memory that a thread block can have."""
RANKS = (1, 2, 4, 8)
"""Thread blocks that a cluster can have."""
_SUMS = 0
"""The inbox of a block."""


@dataclasses.dataclass(frozen=True)
class Here:
    """Where a lane is: registers.

    Attributes:
      sequence, kv, tile: of its cluster.
      warp, lane: of its block, of its warp.
      g, c: lane / 4 and lane % 4.
      number: of its warp among the cluster's: the first has the block's own rows, the others 16
        rows of the ring each.
      own: whether it is the first.
      shared: whether its warp has rows.
      prepares: whether it norms and rotates query rows for all.
    """

    sequence: typing.Any
    kv: typing.Any
    tile: typing.Any
    warp: typing.Any
    lane: typing.Any
    number: typing.Any
    own: typing.Any
    shared: typing.Any
    prepares: typing.Any

    @property
    def g(self):
        """Query rows, and rows of keys."""
        return self.lane // 4

    @property
    def c(self):
        """Columns of a piece."""
        return self.lane % 4


@dataclasses.dataclass(frozen=True)
class Turning:
    """What is loaded to norm and rotate with: weights, and angles of a lane's one row or two.

    A warp that prepares queries and the one that has the block's own keys use the same registers.
    """

    gains: list
    angles: list


@dataclasses.dataclass(frozen=True)
class Output:
    """Four columns of a row that a thread finishes: registers.

    Attributes:
      index: of them among those that the block finishes.
      there: whether they are any.
      at: the first one's place.
      head: of the row.
      sink: as it is loaded.
    """

    index: typing.Any
    there: typing.Any
    at: typing.Any
    head: typing.Any
    sink: typing.Any


@dataclasses.dataclass(frozen=True)
class Draft(Ring):
    """A `Ring` that is not written to, and a block as projected, [b, t, k, (group + 1) h + v].

    Attributes:
      half: half of the columns that are rotated.
      scale: of the values, rounded to bfloat16.
      epsilon: of the norms of queries and keys.
      causal: a token sees the block up to itself, not all of it.
    """

    half: int
    scale: float
    epsilon: float
    causal: bool

    name = "attention_draft"

    def misfit(self) -> str | None:
        """Why the kernel cannot take these shapes."""
        if self.window < self.t or self.t > KEYS:
            return f"a block of {self.t}; its window of {self.window}, or {KEYS}, is less"
        if self.h % 16 or self.v % 32:
            return f"heads of {self.h} and {self.v}; they must be multiples of 16 and 32"
        if self.shares > MOST_WARPS:
            most = (MOST_WARPS * self.ranks - 1) * KEYS
            return f"a ring of {self.s} rows; at most {most} fit {self.ranks} thread blocks"
        if (size := shared_bytes(*(4 * size for size in self.shared.values()))) > SHARED_BYTES:
            return f"shapes that take {size} bytes of shared memory, of {SHARED_BYTES}"
        return rotary.misfit(self.h, self.half)

    @property
    def numbers(self) -> int:
        """Warps of a cluster that have rows."""
        return -(-self.s // KEYS) + 1

    @property
    def stripes(self) -> int:
        """What 32 lanes finish, four columns each, of the query rows of a cluster."""
        return ROWS * self.v // 128

    @property
    def ranks(self) -> int:
        """Thread blocks of a cluster: as few as have warps enough, all with as many stripes."""
        alike = [ranks for ranks in RANKS if self.stripes % ranks == 0]
        enough = [ranks for ranks in alike if self.numbers <= MOST_WARPS * ranks]
        return (enough or alike[-1:])[0]

    @property
    def shares(self) -> int:
        """Warps of a thread block that have rows."""
        return -(-self.numbers // self.ranks)

    @property
    def finished(self) -> int:
        """Fours of columns that a thread block finishes."""
        return 32 * self.stripes // self.ranks

    @property
    def shared(self) -> dict[str, int]:
        """Sizes of the arrays in shared memory: what a block's warps leave, what it is sent."""
        sent = self.ranks * self.finished
        return super().shared | dict(
            query=ROWS * self.h // 2, parts=4 * sent, marks=2 * sent, told=4
        )

    # --- one thread block -------------------------------------------------------------------------

    def run(self, m, cluster, refs):
        """Finishes some columns of 16 query rows, of which it weighs some rows of the ring."""
        here = self._here(m, cluster)
        (start,) = m.load(refs["start"], here.sequence, 4, 1)
        # Queries first: they are near, and keys would take up the way for longer than they do.
        first, turning = self._load_first(m, refs, here)
        key = [self._rows(m, refs, "keys", here, here.g + 8 * i) for i in (0, 1)]
        value = [self._rows(m, refs, "values", here, place) for place in self._mine(here)]
        outputs = self._outputs(m, refs, here)
        m.open_inboxes(refs["told"], [6 * self.ranks * self.finished])
        m.begin()
        first = self._turned(m, here, first, turning)
        m.when(here.prepares, lambda: self._store_query(m, refs, here, first))
        key, value = self._renewed(m, here, first, key, value, turning)
        m.barrier()
        m.when(here.shared, lambda: self._attend(m, refs, here, start, key, value))
        m.barrier()
        m.meet_cluster()
        self._send(m, refs)
        m.receive((refs["told"], _SUMS))
        for output in outputs:
            self._write(m, refs, output)

    def _here(self, m, cluster) -> Here:
        lane, warp = m.thread % 32, m.thread // 32
        tile, head = cluster % self.tiles, cluster // self.tiles
        shared = m.const(self.shares) > warp
        # Warps past the last have no rows, and read next to nothing.
        number = m.where(shared, m.rank * self.shares + warp, m.const(self.numbers))
        prepares = warp >= 4 * self.warpgroups - 2
        place = head // self.k, head % self.k, tile, warp, lane, number
        return Here(*place, number.equals(0), shared, prepares)

    # --- what is loaded ---------------------------------------------------------------------------

    def _head(self, m, here: Here, token):
        """First element of the cluster's part of a token's row of the product."""
        row = here.sequence * self.t + m.minimum(token, self.t - 1)
        return (row * self.k + here.kv) * ((self.group + 1) * self.h + self.v)

    def _angles(self, m, refs, here: Here, token, there):
        row = here.sequence * self.t + m.minimum(token, self.t - 1)
        return rotary.load_angles(m, refs, row, self.half, here.c, there)

    def _load_first(self, m, refs, here: Here):
        """A query row of each four lanes that prepare one, or of the block's own keys the first.

        In the same registers, and what they are normed and rotated with.
        """
        row = here.tile * ROWS + (here.warp - (4 * self.warpgroups - 2)) * 8 + here.g
        row = m.minimum(row, self.t * self.group - 1)
        token, columns = m.where(here.own, here.g, row // self.group), columns_of(self.h, here.c)
        head = m.where(here.own, m.const(self.group), row % self.group)
        at, needed = self._head(m, here, token) + head * self.h, here.prepares | here.own
        pieces = [
            m.load(refs["qkv"], at + first, 2, words, needed, offset=offset)
            for first, offset, words in columns
        ]
        norms = refs["key_norm"], refs["query_norm"]
        gains = [
            m.load_either(here.own, *((x, first) for x in norms), 2, words, offset, needed)
            for first, offset, words in columns
        ]
        angles = [self._angles(m, refs, here, token, needed)]
        if self.t > 8:
            angles.append(self._angles(m, refs, here, here.g + 8, here.own))
        return pieces, Turning(gains, angles)

    def _mine(self, here: Here):
        """Of a warp's 16 rows, those whose values a lane has."""
        return [here.c * 2 + place for place in (0, 1, 8, 9)]

    def _row(self, here: Here, place):
        """Of the ring, one of a warp's 16."""
        return (here.number - 1) * KEYS + place

    def _rows(self, m, refs, name, here: Here, place):
        """A lane's pieces of a row of the ring, or in one warp of the block's own."""
        if name == "keys":
            size, before, columns = self.h, self.group * self.h, columns_of(self.h, here.c)
        else:
            size, before = self.v, (self.group + 1) * self.h
            columns = [(here.g * width, column, width // 2) for column, width in self.columns]
        row = m.minimum(m.maximum(self._row(here, place), 0), self.s - 1)
        at = ((here.sequence * self.k + here.kv) * self.s + row) * size
        own = self._head(m, here, place) + before
        return [
            m.load_either(
                here.own, (refs["qkv"], own + first), (refs[name], at + first), 2, words, offset
            )
            for first, offset, words in columns
        ]

    # --- norm and rotation ------------------------------------------------------------------------

    def _ready(self, m, pieces, gains, angles, c):
        """A lane's pieces of a head, normed and rotated."""
        pieces = normed(m, pieces, gains, self.h, self.epsilon)
        return rotary.rotate(m, pieces, angles, self.half, c)

    def _turned(self, m, here: Here, first, turning: Turning):
        """The first of a lane's rows, in warps that have one."""

        def ready():
            return _words([self._ready(m, first, turning.gains, turning.angles[0], here.c)])

        return _like([first], m.branch(here.prepares | here.own, ready, _words([first])))[0]

    def _store_query(self, m, refs, here: Here, query):
        """A lane leaves its pieces to the same lane of each warp."""
        half = here.warp - (4 * self.warpgroups - 2)
        for piece, at in zip(query, self._query_places(half, here.lane), strict=True):
            m.store_shared(refs["query"], at, [m.as_float(w) for w in piece], here.prepares)

    def _load_ready(self, m, refs, lane):
        """The pieces of both query rows of a lane."""
        return [
            [
                [m.bits(x) for x in m.load_shared(refs["query"], at, words)]
                for at, (_, _, words) in zip(places, columns_of(self.h, lane), strict=True)
            ]
            for places in (self._query_places(half, lane) for half in (0, 1))
        ]

    def _query_places(self, half, lane):
        """Where in shared memory a lane's pieces of a query row are."""
        begin, found = 0, []
        for _, _, words in columns_of(self.h, lane):
            found.append((lane + half * 32) * words + begin)
            begin += 64 * words
        return found

    def _renewed(self, m, here: Here, first, key, value, turning: Turning):
        """Keys and scaled values, where they are the block's own; `first` is the first key.

        Of up to 8 tokens a lane has one key and two rows of values; what else it has, none sees.
        """
        halves = len(turning.angles)

        def ready():
            second = [
                self._ready(m, row, turning.gains, angles, here.c)
                for row, angles in zip(key[1:], turning.angles[1:], strict=False)
            ]
            scaled = [
                [rotary.scaled(m, piece, self.scale) for piece in row]
                for row in value[: 2 * halves]
            ]
            return _words([first, *(second or key[1:]), *scaled, *value[2 * halves :]])

        rows = [*key, *value]
        found = _like(rows, m.branch(here.own, ready, _words(rows)))
        return found[:2], found[2:]

    # --- products ---------------------------------------------------------------------------------

    def _attend(self, m, refs, here: Here, start, key, value):
        """A warp's share: weighs its 16 rows and leaves their sums."""
        positions = [self._position(m, here, start, place) for place in self._mine(here)]
        # What no row of the block sees may be anything, NaN too: 0 times NaN is not 0.
        used = [(p >= 0) & (p > start - self.window) for p in positions]
        value = [
            [[m.where(use, word, m.const(0)) for word in piece] for piece in row]
            for use, row in zip(used, value, strict=True)
        ]
        tokens = [(here.tile * ROWS + (here.g + 8 * i)) // self.group for i in (0, 1)]
        seen = [
            [
                use & (p <= start + self._sees(t)) & (p > start + t - self.window)
                for p, use in zip(positions, used, strict=True)
            ]
            for t in tokens
        ]
        query = self._load_ready(m, refs, here.lane)
        scores = [self._scores(m, query, keys) for keys in key]
        tops, totals, weights = self._soften(m, scores, seen)
        sums = self._mix(m, weights, value)
        self._leave(m, refs, here.warp, here.lane, here.shared, tops, totals, sums)

    def _sees(self, token):
        """The last token of the block that one sees."""
        return token if self.causal else self.t - 1

    def _position(self, m, here: Here, start, place):
        """The position that a warp's row holds, negative if none; the context ends before start."""
        row, last = self._row(here, place), start - 1
        found = last - (last - row + self.s) % self.s
        found = m.where(m.const(self.s) > row, found, m.const(-1))
        own = m.where(m.const(self.t) > place, start + place, m.const(-1))
        return m.where(here.own, own, found)

    # --- sums -------------------------------------------------------------------------------------

    def _send(self, m, refs):
        """Adds up the block's warps in order, and sends each block its columns."""
        pieces, each, found = 32 * self.stripes, self.stripes // self.ranks, []
        for begin in range(0, pieces, 128 * self.warpgroups):
            piece = m.thread + begin
            there = m.const(pieces) > piece
            piece = m.minimum(piece, pieces - 1)
            lane, stripe = piece % 32, piece // 32
            row = lane // 4 + stripe // (self.v // 16) * 8
            parts = [
                (
                    *m.load_shared(refs["tops"], row + ROWS * share, 1),
                    *m.load_shared(refs["totals"], row + ROWS * share, 1),
                    m.load_shared(refs["sums"], (piece + share * pieces) * 4, 4),
                )
                for share in range(self.shares)
            ]
            to = stripe // each, (refs["told"], _SUMS), there
            place = (m.rank * each + stripe % each) * 32 + lane
            found.append((_added(m, parts), place, to))
        # No load goes ahead of a message: so all are under way before the first one.
        for (top, total, mixed), place, to in found:
            m.send(refs["parts"], place * 4, mixed, *to)
            m.send(refs["marks"], place * 2, [top, total], *to)

    def _outputs(self, m, refs, here: Here) -> list[Output]:
        """What a thread finishes; sinks are loaded long before that."""
        found = []
        for begin in range(0, self.finished, 128 * self.warpgroups):
            index = m.thread + begin
            there = m.const(self.finished) > index
            index = m.minimum(index, self.finished - 1)
            lane, stripe = index % 32, m.rank * (self.stripes // self.ranks) + index // 32
            row = here.tile * ROWS + (lane // 4 + stripe // (self.v // 16) * 8)
            there = there & (m.const(self.t * self.group) > row)
            row = m.minimum(row, self.t * self.group - 1)
            token, head = row // self.group, here.kv * self.group + row % self.group
            column = self._column(m, stripe % (self.v // 16), lane % 4)
            at = ((here.sequence * self.t + token) * self.n + head) * self.v + column
            sink = self._load_sink(m, refs, head) if self.sink else None
            found.append(Output(index, there, at, head, sink))
        return found

    def _write(self, m, refs, output: Output):
        """Adds up the sink and the cluster's blocks in order, and writes bfloat16."""
        parts = []
        if self.sink:
            logit = self._logit(m, output.sink, output.head) * m.const(LOG2E)
            parts = [(logit, m.const(1.0), [m.const(0.0)] * 4)]
        for rank in range(self.ranks):
            place = output.index + rank * self.finished
            marks = m.load_shared(refs["marks"], place * 2, 2)
            parts.append((*marks, m.load_shared(refs["parts"], place * 4, 4)))
        _, total, mixed = _added(m, parts)
        total = m.maximum(total, m.const(1e-30))
        mixed = [value / total for value in mixed]
        words = [m.pack(*mixed[:2]), m.pack(*mixed[2:])]
        m.store(refs["out"], output.at, 2, words, output.there)


def _words(rows):
    """All words of rows of pieces, one after another."""
    return [word for row in rows for piece in row for word in piece]


def _like(rows, words):
    """Words as pieces of rows again."""
    words = iter(words)
    return [[[next(words) for _ in piece] for piece in row] for row in rows]


def _added(m, parts):
    """The greatest score, sum of weights and weighted sums of several such, added in order."""
    top = parts[0][0]
    for own, _, _ in parts[1:]:
        top = m.maximum(top, own)
    total, mixed = m.const(0.0), [m.const(0.0)] * 4
    for own, weight, sums in parts:
        factor = m.exp2(own - top)
        total = m.fma(weight, factor, total)
        mixed = [m.fma(a, factor, b) for a, b in zip(sums, mixed, strict=True)]
    return top, total, mixed


def shape_of(
    qkv, cos, keys, values, window: int, sink, value_scale: float, epsilon: float, causal: bool
) -> Draft:
    """The shapes of a call."""
    known = *block_sizes_of(qkv, keys, values), window, sink is not None
    turned = cos.shape[2], rotary.rounded(value_scale), epsilon
    return Draft(*known, *turned, causal, sink_bytes=bytes_of(sink))


def draft_ring(shape: Draft, qkv, query_norm, key_norm, cos, sin, keys, values, start, sink):
    """See `api.draft_attention`; one launch."""
    inputs = dict(qkv=qkv, query_norm=query_norm, key_norm=key_norm, cos=cos, sin=sin)
    return shape.call(inputs | dict(keys=keys, values=values, start=start), sink, qkv.dtype)
