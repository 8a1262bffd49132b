"""A thread block of the router, one of a cluster: norm, products, and the choice by the last one.

A cluster has some experts; each of its blocks has a part of the columns and reads nothing else.
Rows' sums of squares, then products, go to the cluster's other blocks through shared memory. The
first block of the cluster writes scores; of these blocks, the last one that is done chooses for all
tokens. No block waits for one of another cluster.
"""

import dataclasses
import functools
import math
import typing

from pallas_kernels.router.plan import PIECE, TILE, Plan

LOG2E = math.log2(math.e)
_TAKEN = -(1 << 31)
_NONE = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a lane is: registers.

    Attributes:
      cluster, rank: of its thread block.
      warp: of the block.
      lane: of the warp.
      g, c: lane / 4 and lane % 4: it has tokens and experts g, columns c.
    """

    cluster: typing.Any
    rank: typing.Any
    warp: typing.Any
    lane: typing.Any

    @property
    def g(self):
        """Tokens, and experts of a tile."""
        return self.lane // 4

    @property
    def c(self):
        """Columns of a piece."""
        return self.lane % 4


@dataclasses.dataclass(frozen=True)
class Block:
    """Shapes of a call; a thread block's work, on a `ClusterMachine` or on numpy's stand-in.

    Attributes:
      t: tokens, 1 to 16.
      c: choices of a token.
      plan: of the weights.
      wide: whether these are float32.
      epsilon: of the norm.
      normalise: whether a token's weights are divided by their sum.
      scale: of the weights.
      word: of the counter.
    """

    t: int
    c: int
    plan: Plan
    wide: bool
    epsilon: float
    normalise: bool
    scale: float
    word: int = 0

    @property
    def halves(self) -> int:
        """Eights of tokens."""
        return -(-self.t // 8)

    @property
    def cells(self) -> int:
        """(token, expert) pairs of a cluster."""
        return 8 * self.halves * self.plan.rows

    @property
    def shared(self) -> dict[str, int]:
        """Floats in shared memory."""
        plan, tokens = self.plan, 8 * self.halves
        return dict(
            squares=plan.warps * tokens,
            row_squares=plan.ranks * tokens,
            sums=plan.warps * self.cells,
            shares=plan.ranks * self.cells,
            flag=1,
        )

    def run(self, m, cluster, rank, refs):
        """All of it."""
        at = Place(cluster, rank, m.thread // 32, m.thread % 32)
        # Rows first: they are needed first, and are near.
        rows = self._load_rows(m, refs["h"], at)
        update = self._load_rows(m, refs["update"], at) if "update" in refs else None
        gains = [m.load(refs["norm"], column, 2, 4) for column in self._columns(at)]
        weights = [
            [
                self._load_weights(m, refs["weight"], at, tile, column)
                for column in self._columns(at)
            ]
            for tile in range(self.plan.tiles)
        ]
        if update is not None:
            rows = _map(functools.partial(_add, m), rows, update)
            self._store_rows(m, refs["stream"], at, rows)
        scales = self._scales(m, refs, at, rows)
        x = [
            [
                _map(functools.partial(_normed, m, scale), *pair)
                for pair in zip(row, gains, strict=True)
            ]
            for scale, row in zip(scales, rows, strict=True)
        ]
        self._store_rows(m, refs["x"], at, x)
        for tile, pieces in enumerate(weights):
            self._leave(m, refs["sums"], at, tile, self._multiply(m, x, pieces))
        self._gather(m, refs, at)
        m.when(rank.equals(0), lambda: self._conclude(m, refs, at))

    # --- rows -------------------------------------------------------------------------------------

    def _columns(self, at: Place):
        """The first of 8 columns of each piece of a warp."""
        first = (at.rank * self.plan.warps + at.warp) * self.plan.width + at.c * 8
        return [first + start for start in range(0, self.plan.width, PIECE)]

    def _tokens(self, m, at: Place):
        """A lane's tokens, and whether they are there."""
        tokens = [at.g + 8 * half for half in range(self.halves)]
        return [(token, m.const(self.t) > token) for token in tokens]

    def _load_rows(self, m, ref, at: Place):
        """[half][piece][word]: two columns a word; zeros where there is no token."""
        return [
            [
                m.load(ref, token * self.plan.columns + column, 2, 4, there)
                for column in self._columns(at)
            ]
            for token, there in self._tokens(m, at)
        ]

    def _store_rows(self, m, ref, at: Place, rows):
        """The same back, by the first cluster."""
        for (token, there), row in zip(self._tokens(m, at), rows, strict=True):
            for column, words in zip(self._columns(at), row, strict=True):
                index = token * self.plan.columns + column
                m.store(ref, index, 2, words, there & at.cluster.equals(0))

    def _scales(self, m, refs, at: Place, rows):
        """1 / rms of a lane's tokens: squares of lanes, warps and blocks, added in their order."""
        plan, tokens = self.plan, 8 * self.halves
        for (token, _), row in zip(self._tokens(m, at), rows, strict=True):
            total = m.const(0.0)
            for value in (v for piece in row for word in piece for v in m.unpack(word)):
                total = m.fma(value, value, total)
            for mask in (1, 2):
                total = total + m.swap(total, mask)
            m.store_shared(refs["squares"], at.warp * tokens + token, [total], at.c.equals(0))
        m.barrier()
        # A thread for each token and block of the cluster, which it tells this block's sum.
        token, rank = m.thread % tokens, m.minimum(m.thread // tokens, plan.ranks - 1)
        total = self._added(m, refs["squares"], token, tokens, plan.warps)
        telling = m.const(plan.ranks * tokens) > m.thread
        m.store_remote(refs["row_squares"], at.rank * tokens + token, total, rank, telling)
        m.cluster_barrier()
        scales = []
        for token, _ in self._tokens(m, at):
            total = self._added(m, refs["row_squares"], token, tokens, plan.ranks)
            mean = total / m.const(float(plan.columns))
            scales.append(m.rsqrt(mean + m.const(self.epsilon)))
        return scales

    def _added(self, m, ref, index, pitch: int, count: int):
        """The sum of `count` floats of shared memory, in order."""
        total = None
        for i in range(count):
            (value,) = m.load_shared(ref, index + pitch * i, 1)
            total = value if total is None else total + value
        return total

    # --- products ---------------------------------------------------------------------------------

    def _load_weights(self, m, ref, at: Place, tile: int, column):
        """8 columns of an expert's weights: 4 words, or 8 of float32."""
        row = at.cluster * self.plan.rows + at.g + TILE * tile
        start = m.minimum(row, self.plan.experts - 1) * self.plan.columns + column
        if not self.wide:
            return m.load(ref, start, 2, 4)
        return [*m.load(ref, start, 4, 4), *m.load(ref, start + 4, 4, 4)]

    def _multiply(self, m, x, pieces):
        """Products of a warp's columns: of tokens g and g + 8 with experts 2 c and 2 c + 1.

        The order of columns in a product is free, as long as rows and weights have the same.
        """
        sums = [m.const(0.0)] * 4
        for piece, words in enumerate(pieces):
            low = x[0][piece]
            high = x[1][piece] if self.halves > 1 else [m.const(0)] * 4
            for digit in _digits(m, words) if self.wide else [words]:
                for i in (0, 2):
                    rows = low[i], high[i], low[i + 1], high[i + 1]
                    sums = m.multiply(rows, digit[i : i + 2], sums)
        return sums

    def _leave(self, m, ref, at: Place, tile: int, sums):
        """Puts a warp's sums in shared memory: warp, token, expert."""
        for half in range(self.halves):
            cell = (at.g + 8 * half) * self.plan.rows + at.c * 2 + TILE * tile
            index = at.warp * self.cells + cell
            m.store_shared(ref, index, sums[2 * half : 2 * half + 2], m.const(32) > at.lane)

    def _cells(self, m):
        """Each thread's cells, and whether they are there."""
        for start in range(0, self.cells, self.plan.threads):
            cell = m.thread + start
            yield m.minimum(cell, self.cells - 1), m.const(self.cells) > cell

    def _gather(self, m, refs, at: Place):
        """Adds the warps' sums in order, and gives them to the cluster's first block."""
        m.barrier()
        for cell, there in self._cells(m):
            total = self._added(m, refs["sums"], cell, self.cells, self.plan.warps)
            index = at.rank * self.cells + cell
            m.store_remote(refs["shares"], index, total, m.const(0), there)
        m.cluster_barrier()

    # --- choices ----------------------------------------------------------------------------------

    def _conclude(self, m, refs, at: Place):
        """The first block of a cluster: scores; the last of them: all tokens' experts."""
        plan, one = self.plan, m.const(1.0)
        for cell, there in self._cells(m):
            logit = self._added(m, refs["shares"], cell, self.cells, plan.ranks)
            score = one / (one + m.exp2(logit * m.const(-LOG2E)))
            token, expert = cell // plan.rows, at.cluster * plan.rows + cell % plan.rows
            there = there & (m.const(self.t) > token) & (m.const(plan.experts) > expert)
            m.store(refs["scores"], token * plan.experts + expert, 4, [score], there)
        last = m.is_last(refs["counter"], self.word, plan.clusters, refs["flag"])
        m.when(last, lambda: self._choose(m, refs, at))

    def _choose(self, m, refs, at: Place):
        """A warp for each token."""
        for start in range(0, self.t, self.plan.warps):
            token = at.warp + start
            there = m.const(self.t) > token
            token = m.minimum(token, self.t - 1)
            ids, weights = self._best(m, *self._candidates(m, refs, at, token))
            self._write(m, refs, at, token, there, ids, weights)

    def _candidates(self, m, refs, at: Place, token):
        """A lane's experts, lane, lane + 32, ...: ids, scores, and keys in their order."""
        experts, found = self.plan.experts, []
        for start in range(0, experts, 32):
            expert = at.lane + start
            known = m.minimum(expert, experts - 1)
            score = m.load_new(refs["scores"], token * experts + known)
            (bias,) = m.load(refs["bias"], known, 4, 1)
            found.append((expert, score, bias))
        keys = []
        for expert, score, bias in found:
            key = _ordered(m, score + m.as_float(bias))
            keys.append(m.where(m.const(experts) > expert, key, m.const(_TAKEN)))
        return [expert for expert, *_ in found], [score for _, score, _ in found], keys

    def _best(self, m, experts, scores, keys):
        """The chosen experts and their scores, best first, ties by lowest id: in all lanes."""
        ids, weights, none = [], [], m.const(_NONE)
        for _ in range(self.c):
            top = _tree(m.maximum, keys)
            mine = _tree(
                m.minimum,
                [
                    m.where(key.equals(top), expert, none)
                    for key, expert in zip(keys, experts, strict=True)
                ],
            )
            best = m.warp_min(m.where(top.equals(m.warp_max(top)), mine, none))
            chosen = [expert.equals(best) for expert in experts]
            keys = [
                m.where(is_it, m.const(_TAKEN), key)
                for is_it, key in zip(chosen, keys, strict=True)
            ]
            found = m.const(0)
            for is_it, score in zip(chosen, scores, strict=True):
                found = m.where(is_it, m.bits(score), found)
            ids.append(best)
            weights.append(m.as_float(m.warp_or(found)))
        return ids, weights

    def _write(self, m, refs, at: Place, token, there, ids, weights):
        """A lane for each choice."""
        mine, share, total = m.const(0), m.const(0.0), m.const(0.0)
        for i, (best, weight) in enumerate(zip(ids, weights, strict=True)):
            mine = m.where(at.lane.equals(i), best, mine)
            share = m.where(at.lane.equals(i), weight, share)
            total = total + weight
        if self.normalise:
            share = share / (total + m.const(1e-20))
        if self.scale != 1.0:
            share = share * m.const(self.scale)
        if "live" in refs:
            (live,) = m.load(refs["live"], token, 4, 1)
            mine = m.where(live.equals(0), m.const(-1), mine)
        there = there & (m.const(self.c) > at.lane)
        index = token * self.c + m.minimum(at.lane, self.c - 1)
        m.store(refs["ids"], index, 4, [mine], there)
        m.store(refs["weights"], index, 4, [share], there)


def _map(function, *nested):
    """`function` of the words of nested lists."""
    if not isinstance(nested[0], list):
        return function(*nested)
    return [_map(function, *parts) for parts in zip(*nested, strict=True)]


def _add(m, a, b):
    """Sums of two words' bfloat16, rounded."""
    return m.pack(*(x + y for x, y in zip(m.unpack(a), m.unpack(b), strict=True)))


def _normed(m, scale, word, gain):
    """A word's bfloat16 times a float, rounded, times a word's, rounded."""
    rounded = m.pack(*(value * scale for value in m.unpack(word)))
    return m.pack(*(x * y for x, y in zip(m.unpack(rounded), m.unpack(gain), strict=True)))


def _digits(m, words):
    """Float32 as the sum of three bfloat16, exact: 8 bits each of the 24 of its mantissa.

    So their products are exact too, and only sums are rounded, as those of bfloat16 weights.
    """
    digits = []
    for _ in range(3):
        digits.append([m.halves(*words[i : i + 2], True) for i in range(0, len(words), 2)])
        words = [m.bits(m.as_float(w) - m.as_float(w & ~0xFFFF)) for w in words]
    return digits


def _ordered(m, value):
    """An int for a float, in the same order; no -0.0 comes here, and a NaN does no harm."""
    bits = m.bits(value)
    return m.where(bits < 0, m.const(_NONE) - bits, bits)


def _tree(function, values):
    """A reduction in few steps."""
    while len(values) > 1:
        pairs = [function(*values[i : i + 2]) for i in range(0, len(values) - 1, 2)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]
