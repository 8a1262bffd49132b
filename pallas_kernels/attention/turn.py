"""A block's queries and keys rotated, its keys and values written to a long cache, in one launch.

Four lanes have a head of a token, a warp 8 of them. The queries are left as `chunked.py` reads
them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.attention import rotary
from pallas_kernels.attention.chunked import Chunked, Launch, attend_rows
from pallas_kernels.attention.launch import launch_lanes
from pallas_kernels.attention.ring import columns_of
from pallas_kernels.attention.shapes import block_sizes_of, places_misfit

WARPS = 4
HEADS = 8 * WARPS
"""Heads of a thread block."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """Shapes of a call.

    Attributes:
      attention: of the launches that follow.
      half: half of the columns that are rotated.
      scale: of the values, rounded to bfloat16.
    """

    attention: Chunked
    half: int
    scale: float

    def misfit(self) -> str | None:
        """Why the kernels cannot take these shapes."""
        of = self.attention
        places = places_misfit(of.b * of.k * of.s, of.h, of.v)
        return of.misfit() or places or rotary.misfit(of.h, self.half)

    @property
    def heads(self) -> int:
        """Queries and keys of all tokens."""
        of = self.attention
        return of.b * of.t * of.k * (of.group + 1)

    @property
    def blocks(self) -> int:
        """Thread blocks."""
        return -(-self.heads // HEADS)

    def run(self, m, block, refs):
        """Rotates and writes the heads of one thread block."""
        of, lane = self.attention, m.thread % 32
        g, c = lane // 4, lane % 4
        place = (block * WARPS + m.thread // 32) * 8 + g
        there = m.const(self.heads) > place
        place = m.minimum(place, self.heads - 1)
        head, part = place % (of.group + 1), place // (of.group + 1)
        kv, token = part % of.k, part // of.k
        sequence, slot = token // of.t, token % of.t
        first = part * ((of.group + 1) * of.h + of.v)
        columns = columns_of(of.h, c)
        pieces = [
            m.load(refs["qkv"], first + head * of.h + at, 2, words, offset=offset)
            for at, offset, words in columns
        ]
        angles = rotary.load_angles(m, refs, token, self.half, c)
        (start,) = m.load(refs["start"], sequence, 4, 1)
        (live,) = m.load(refs["live"], sequence, 4, 1)
        is_key = there & head.equals(of.group) & (live > slot)
        row = (sequence * of.k + kv) * of.s + (start + slot) % of.s
        self._values(m, refs, first + (of.group + 1) * of.h, row, c, is_key)
        query = ((sequence * of.k + kv) * of.rows + slot * of.group + head) * of.h
        pieces = rotary.rotate(m, pieces, angles, self.half, c)
        is_query = there & (m.const(of.group) > head)
        for (at, offset, _), words in zip(columns, pieces, strict=True):
            m.store(refs["out"], query + at, 2, words, is_query, offset)
            m.store(refs["keys"], row * of.h + at, 2, words, is_key, offset)

    def _values(self, m, refs, first, row, c, where):
        """Scales and writes a row of values: the lanes that have its key."""
        columns = columns_of(self.attention.v, c)
        loaded = [
            m.load(refs["qkv"], first + at, 2, words, where, offset=offset)
            for at, offset, words in columns
        ]
        for (at, offset, _), words in zip(columns, loaded, strict=True):
            words = rotary.scaled(m, words, self.scale)
            m.store(refs["values"], row * self.attention.v + at, 2, words, where, offset)

    def call(self, qkv, cos, sin, keys, values, start, live):
        """Launches; writes to the references `keys` and `values`, returns [b, k, rows, h]."""
        of = self.attention
        inputs = dict(qkv=qkv, cos=cos, sin=sin, keys=keys, values=values, start=start, live=live)
        return launch_lanes(
            self,
            inputs,
            jax.ShapeDtypeStruct((of.b, of.k, of.rows, of.h), jnp.bfloat16),
            blocks=self.blocks,
            warps=WARPS,
            shared={},
            name="attention_turn",
        )


def shape_of(qkv, cos, keys, values, value_scale: float) -> Turn:
    """The shapes of a call."""
    chunked = Chunked(*block_sizes_of(qkv, keys, values), Launch())
    return Turn(chunked, cos.shape[2], rotary.rounded(value_scale))


def turned_block(shape: Turn, qkv, cos, sin, keys, values, start, live, sink):
    """See `api.block_attention`, for a cache that holds all positions; three launches."""
    held = [jax.new_ref(x) for x in (keys, values)]
    q = shape.call(qkv, cos, sin, *held, start, live)
    keys, values = (jax.freeze(ref) for ref in held)
    return attend_rows(shape.attention, q, keys, values, start, live, sink), keys, values
