"""Adds up what the chunks of a long cache left: a thread block for each query row."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.attention.chunks import Chunks
from pallas_kernels.attention.launch import launch_lanes
from pallas_kernels.softmax import LOG2E, MASKED

WARPS = 8
"""Warp w adds the chunks c with c % WARPS == w, ascending; then warps are added, ascending."""
_AHEAD = 8
"""Loads of sums that a thread has under way."""


@dataclasses.dataclass(frozen=True)
class Combine:
    """Shapes of a call; `rows` are query rows of a key/value head with those that fill a tile."""

    b: int
    t: int
    n: int
    v: int
    k: int
    rows: int
    chunks: Chunks
    sink: bool

    @property
    def blocks(self) -> int:
        """Thread blocks."""
        return self.b * self.t * self.n

    @property
    def shared(self) -> dict[str, int]:
        """Sizes of the arrays in shared memory."""
        return dict(
            factors=self.padded, sums=WARPS * self.v, tops_shared=WARPS, totals_shared=WARPS
        )

    def call(self, dtype, parts, tops, totals, start, live, sink):
        """Launches, on what the chunks left."""
        inputs = dict(parts=parts, tops=tops, totals=totals, start=start, live=live)
        if self.sink:
            inputs["sink"] = sink.astype(jnp.float32)
        return launch_lanes(
            self,
            inputs,
            jax.ShapeDtypeStruct((self.b, self.t, self.n, self.v), dtype),
            blocks=self.blocks,
            warps=WARPS,
            shared=self.shared,
            name="attention_combine",
        )

    def run(self, m, block, refs):
        """Writes one query row."""
        group = self.n // self.k
        row = block % (self.t * group)
        kv = block // (self.t * group) % self.k
        sequence = block // (self.t * self.n)
        (start,) = m.load(refs["start"], sequence, 4, 1)
        (live,) = m.load(refs["live"], sequence, 4, 1)
        head = kv * group + row % group
        logit = m.load(refs["sink"], head, 4, 1)[0] if self.sink else None
        count = self.chunks.count(start + live, m.maximum)
        first = (sequence * self.k + kv) * self.chunks.most
        lane, warp = m.thread % 32, m.thread // 32
        total = self._factors(m, refs, first, row, count, lane, warp, logit)
        sums = self._sums(m, refs, first, row, count, lane, warp)
        here = m.const(self.v // 4) > lane
        m.store_shared(refs["sums"], (warp * (self.v // 4) + lane) * 4, sums, here)
        m.barrier()
        whole = [m.const(0.0)] * 4
        for other in range(WARPS):
            at = (m.minimum(lane, self.v // 4 - 1) + other * (self.v // 4)) * 4
            found = m.load_shared(refs["sums"], at, 4)
            whole = [a + b for a, b in zip(whole, found, strict=True)]
        whole = [value / total for value in whole]
        at = ((sequence * self.t + row // group) * self.n + head) * self.v + lane * 4
        words = [m.pack(*whole[:2]), m.pack(*whole[2:])]
        m.store(refs["out"], at, 2, words, here & warp.equals(0))

    def _factors(self, m, refs, first, row, count, lane, warp, logit):
        """Puts each chunk's factor in shared memory; returns the sum of weights."""
        tops, totals, places = [], [], []
        for begin in range(0, self.chunks.most, 32 * WARPS):
            chunk = m.thread + begin
            there = count > chunk
            at = (first + chunk) * self.rows + row
            (top,) = m.load(refs["tops"], at, 4, 1, there)
            (total,) = m.load(refs["totals"], at, 4, 1, there)
            tops.append(m.where(there, m.as_float(top), m.const(MASKED)))
            totals.append(m.as_float(total))
            places.append(chunk)
        top = tops[0]
        for other in tops[1:]:
            top = m.maximum(top, other)
        top = self._over_warps(m, refs["tops_shared"], top, lane, warp, m.maximum)
        if self.sink:
            logit = m.as_float(logit) * m.const(LOG2E)
            top = m.maximum(top, logit)
        total = m.const(0.0)
        for own, weight, chunk in zip(tops, totals, places, strict=True):
            factor = m.exp2(own - top)
            here = m.const(self.padded) > chunk
            m.store_shared(refs["factors"], chunk, [factor], here)
            total = m.fma(weight, factor, total)
        total = self._over_warps(m, refs["totals_shared"], total, lane, warp, lambda a, b: a + b)
        if self.sink:
            total = total + m.exp2(logit - top)
        return m.maximum(total, m.const(1e-30))

    @property
    def padded(self) -> int:
        """Factors in shared memory."""
        return -(-self.chunks.most // (32 * WARPS)) * 32 * WARPS

    def _over_warps(self, m, shared, value, lane, warp, join):
        """Joins all threads' values: a tree of lanes, then warps in order."""
        for mask in (1, 2, 4, 8, 16):
            value = join(value, m.swap(value, mask))
        m.store_shared(shared, warp, [value], lane.equals(0))
        m.barrier()
        parts = [m.load_shared(shared, m.const(i), 1)[0] for i in range(WARPS)]
        value = parts[0]
        for other in parts[1:]:
            value = join(value, other)
        return value

    def _sums(self, m, refs, first, row, count, lane, warp):
        """This warp's chunks of four columns, by ascending chunk."""
        column = m.minimum(lane, self.v // 4 - 1) * 4
        rounds = (count + (WARPS * _AHEAD - 1)) // (WARPS * _AHEAD)

        def step(i, sums):
            chunks = [i * (WARPS * _AHEAD) + warp + WARPS * ahead for ahead in range(_AHEAD)]
            loaded = [
                m.load(
                    refs["parts"],
                    ((first + chunk) * self.rows + row) * self.v + column,
                    4,
                    4,
                    count > chunk,
                )
                for chunk in chunks
            ]
            for chunk, words in zip(chunks, loaded, strict=True):
                (factor,) = m.load_shared(refs["factors"], m.minimum(chunk, self.padded - 1), 1)
                sums = [m.fma(m.as_float(w), factor, s) for w, s in zip(words, sums, strict=True)]
            return sums

        return m.repeat(rounds, step, [m.const(0.0)] * 4)
