"""A drafter's context: all layers' new keys normed, rotated and written to their rings, one launch.

Four lanes have the key and the value of a row, a layer and a head; a warp 8 of them.
"""

import dataclasses
import functools

import jax

from pallas_kernels.attention import norms, rotary
from pallas_kernels.attention.launch import launch_lanes
from pallas_kernels.attention.ring import columns_of
from pallas_kernels.attention.shapes import places_misfit

WARPS = 4
HEADS = 8 * WARPS
"""Keys of a thread block."""
MOST_LAYERS = 16
"""Each layer's ring is an argument, and a store that all others' threads pass by."""


@dataclasses.dataclass(frozen=True)
class Context:
    """Shapes of a call; a thread block's work, on a `Machine` or on numpy's stand-in.

    Attributes:
      b, t, layers, k, h, v, s: batch, rows, layers, key/value heads, sizes of key and value, rows
        of a ring.
      half: half of the columns that are rotated.
      scale: of the values, rounded to bfloat16.
      epsilon: of the norm.
    """

    b: int
    t: int
    layers: int
    k: int
    h: int
    v: int
    s: int
    half: int
    scale: float
    epsilon: float

    @property
    def heads(self) -> int:
        """Keys of all rows and layers."""
        return self.b * self.t * self.layers * self.k

    @property
    def blocks(self) -> int:
        """Thread blocks."""
        return -(-self.heads // HEADS)

    def misfit(self) -> str | None:
        """Why the kernel cannot take these shapes."""
        if self.layers > MOST_LAYERS:
            return f"{self.layers} layers; at most {MOST_LAYERS} fit one launch"
        if self.h % 16 or self.v % 16:
            return f"heads of {self.h} and {self.v}; they must be multiples of 16"
        places = places_misfit(self.b * self.k * self.s, self.h, self.v)
        return places or rotary.misfit(self.h, self.half)

    def run(self, m, block, refs):
        """Norms, rotates, scales and writes what one thread block has."""
        lane = m.thread % 32
        c, place = lane % 4, (block * WARPS + m.thread // 32) * 8 + lane // 4
        there = m.const(self.heads) > place
        place = m.minimum(place, self.heads - 1)
        kv, part = place % self.k, place // self.k
        layer, token = part % self.layers, part // self.layers
        sequence, slot = token // self.t, token % self.t
        first, columns = place * (self.h + self.v), columns_of(self.h, c)
        keys = self._load(m, refs["kv"], first, columns)
        values = self._load(m, refs["kv"], first + self.h, columns_of(self.v, c))
        gains = self._load(m, refs["norms"], layer * self.h, columns)
        angles = rotary.load_angles(m, refs, token, self.half, c)
        (start,) = m.load(refs["start"], sequence, 4, 1)
        (live,) = m.load(refs["live"], sequence, 4, 1)
        keys = norms.normed(m, keys, gains, self.h, self.epsilon)
        keys = rotary.rotate(m, keys, angles, self.half, c)
        values = [rotary.scaled(m, words, self.scale) for words in values]
        row = (sequence * self.k + kv) * self.s + (start + slot) % self.s
        there = there & (live > slot)
        for i in range(self.layers):
            here = there & layer.equals(i)
            self._store(m, refs[f"keys{i}"], row * self.h, columns, keys, here)
            self._store(m, refs[f"values{i}"], row * self.v, columns_of(self.v, c), values, here)

    @staticmethod
    def _load(m, ref, first, columns):
        return [m.load(ref, first + at, 2, words, offset=offset) for at, offset, words in columns]

    @staticmethod
    def _store(m, ref, first, columns, pieces, where):
        for (at, offset, _), words in zip(columns, pieces, strict=True):
            m.store(ref, first + at, 2, words, where, offset)


def shape_of(kv, cos, keys, values, value_scale: float, epsilon: float) -> Context:
    """The shapes of a call."""
    b, t, layers, k, _ = kv.shape
    (s, h), v = keys[0].shape[2:], values[0].shape[3]
    return Context(b, t, layers, k, h, v, s, cos.shape[2], rotary.rounded(value_scale), epsilon)


@functools.partial(jax.jit, static_argnames=("value_scale", "epsilon"))
def write_context_mosaic(
    kv, key_norms, cos, sin, keys, values, start, live, *, value_scale, epsilon
):
    """See `api.write_context`; one launch, which writes to the rings in place."""
    shape = shape_of(kv, cos, keys, values, value_scale, epsilon)
    held = [[jax.new_ref(x) for x in rings] for rings in (keys, values)]
    inputs = dict(kv=kv, norms=key_norms, cos=cos, sin=sin, start=start, live=live)
    for name, rings in zip(("keys", "values"), held, strict=True):
        inputs |= {f"{name}{i}": ring for i, ring in enumerate(rings)}
    launch_lanes(
        shape,
        inputs,
        None,
        blocks=shape.blocks,
        warps=WARPS,
        shared={},
        name="attention_context",
    )
    return tuple(tuple(map(jax.freeze, rings)) for rings in held)
