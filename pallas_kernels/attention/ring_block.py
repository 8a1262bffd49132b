"""A window layer's block in one launch: rotate, write the ring, attend.

Every thread block rotates the new keys that it needs for itself, so that none waits for another;
the first of a key/value head also writes them to the ring. Others may read those rows of the ring
before or after: they take the new ones instead.
"""

import dataclasses

import jax

from pallas_kernels.attention import rotary
from pallas_kernels.attention.ring import Ring, bytes_of, columns_of
from pallas_kernels.attention.shapes import block_sizes_of


@dataclasses.dataclass(frozen=True)
class RingBlock(Ring):
    """A `Ring` whose queries, keys and values come as one product, [b, t, k, (group + 1) h + v].

    Attributes:
      half: half of the columns that are rotated.
      scale: of the values, rounded to bfloat16.
    """

    half: int
    scale: float

    name = "attention_ring_block"

    def misfit(self) -> str | None:
        """Why the kernel cannot take these shapes."""
        return Ring.misfit(self) or rotary.misfit(self.h, self.half)

    def _head(self, row, kv):
        """First element of a key/value head's part of a row [b t] of the product."""
        return (row * self.k + kv) * ((self.group + 1) * self.h + self.v)

    def _query(self, m, refs, sequence, kv, row, c):
        """Starts to load a lane's pieces of a query row, and its angles."""
        pieces, token = self._query_pieces(m, refs, sequence, kv, row, c)
        return pieces, rotary.load_angles(m, refs, token, self.half, c)

    def _query_pieces(self, m, refs, sequence, kv, row, c):
        """Without angles, but with the row [b t] of the product, which is theirs."""
        row = m.minimum(row, self.t * self.group - 1)
        token = sequence * self.t + row // self.group
        at = self._head(token, kv) + (row % self.group) * self.h
        return self._pieces(m, refs["qkv"], at, c), token

    def _ready(self, m, query, c):
        """Rotated."""
        return rotary.rotate(m, *query, self.half, c)

    def _renew(self, m, refs, where, own, mine, key, value):
        """The block's own keys and values in their places, by the few warps that have one."""
        new = [self._is_new(m, where, row) for row in own]
        words = [w for row in (*key, *value) for piece in row for w in piece]

        def renewed():
            keys = [
                self._new_key(m, refs, where, row, is_new, old)
                for row, is_new, old in zip(own, new, key, strict=True)
            ]
            values = [self._new_value(m, refs, where, *x) for x in zip(mine, value, strict=True)]
            return [w for row in (*keys, *values) for piece in row for w in piece]

        found = iter(m.branch(m.any(new[0] | new[1]), renewed, words))
        key, value = (
            [[[next(found) for _ in piece] for piece in row] for row in rows]
            for rows in (key, value)
        )
        return key, value

    def _is_new(self, m, where, row):
        return self._position(m, where.last, row) >= m.maximum(where.start, 0)

    def _token(self, m, where, row):
        """The row [b t] of the product that a row of the ring comes from."""
        token = self._position(m, where.last, row) - where.start
        return where.sequence * self.t + m.minimum(m.maximum(token, 0), self.t - 1)

    def _new_key(self, m, refs, where, row, is_new, old):
        """A lane's pieces of a key: the block's own if it is new, which tile 0 writes."""
        pieces = self._load_new_key(m, refs, where, row, is_new, old)
        return self._place_key(m, refs, where, row, is_new, pieces)

    def _load_new_key(self, m, refs, where, row, is_new, old):
        """Starts to load a new key, as projected, to the registers of what was loaded before."""
        start = self._head(self._token(m, where, row), where.kv) + self.group * self.h
        places = columns_of(self.h, where.c)
        # There are no others to spare.
        return [
            m.load(refs["qkv"], start + at, 2, words, is_new, known, offset)
            for (at, offset, words), known in zip(places, old, strict=True)
        ]

    def _place_key(self, m, refs, where, row, is_new, pieces):
        """Rotates a new key, which tile 0 writes; others are as they were."""
        token, places = self._token(m, where, row), columns_of(self.h, where.c)
        turned = self._turned(m, refs, token, pieces, where.c, is_new)
        write, start = is_new & where.tile.equals(0), (where.first + row) * self.h
        for (at, offset, _), words in zip(places, turned, strict=True):
            m.store(refs["keys"], start + at, 2, words, write, offset)
        return _chosen(m, is_new, turned, pieces)

    def _turned(self, m, refs, token, pieces, c, there=None):
        """A row of the product's, rotated."""
        angles = rotary.load_angles(m, refs, token, self.half, c, there)
        return rotary.rotate(m, pieces, angles, self.half, c)

    def _new_value(self, m, refs, where, row, old):
        """A lane's columns of a row of values likewise, scaled."""
        is_new, base = self._is_new(m, where, row), self._new_values_row(m, where, row)
        pieces = [
            m.load(refs["qkv"], base + where.g * width, 2, width // 2, is_new, known, column)
            for (column, width), known in zip(self.columns, old, strict=True)
        ]
        return self._place_value(m, refs, where, row, is_new, pieces)

    def _new_values_row(self, m, where, row):
        """First element of the values, as projected, that come to a row of the ring."""
        return self._head(self._token(m, where, row), where.kv) + (self.group + 1) * self.h

    def _place_value(self, m, refs, where, row, is_new, pieces):
        """Scales a lane's columns of new values, which tile 0 writes; others are as they were."""
        write, placed = is_new & where.tile.equals(0), []
        for (column, width), words in zip(self.columns, pieces, strict=True):
            at = (where.first + row) * self.v + where.g * width
            words = rotary.scaled(m, words, self.scale)
            m.store(refs["values"], at, 2, words, write, column)
            placed.append(words)
        return _chosen(m, is_new, placed, pieces)


def _chosen(m, condition, new, old):
    """The pieces of `new` where the condition holds, else of `old`."""
    return [
        [a if a is b else m.where(condition, a, b) for a, b in zip(*pair, strict=True)]
        for pair in zip(new, old, strict=True)
    ]


def shape_of(
    qkv, cos, keys, values, window: int, sink, value_scale: float, eights: int = 2
) -> RingBlock:
    """The shapes of a call."""
    known = *block_sizes_of(qkv, keys, values), window, sink is not None
    turned = cos.shape[2], rotary.rounded(value_scale)
    return RingBlock(*known, *turned, sink_bytes=bytes_of(sink), eights=eights)


def ring_block(shape: RingBlock, qkv, cos, sin, keys, values, start, live, sink):
    """See `api.block_attention`, for a ring; one launch."""
    # Written in place: the program has no copy of them if the caller's are not used after it.
    held = [jax.new_ref(x) for x in (keys, values)]
    inputs = dict(qkv=qkv, cos=cos, sin=sin, keys=held[0], values=held[1], start=start, live=live)
    out = shape.call(inputs, sink, qkv.dtype)
    return out, *(jax.freeze(ref) for ref in held)
