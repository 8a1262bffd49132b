"""A thread block of the router, one of a cluster: norm, products, and the choice by the last one.

A cluster has some experts; each of its blocks has a part of the columns and reads nothing else.
Rows' sums of squares, then products, are sent to other blocks' shared memory. The first block of
the cluster writes scores; of these blocks, the last one that is done chooses for all tokens. No
block waits for one of another cluster.

Shared memory is written once, each place by one thread. A block receives all that it is sent before
it ends, so that nothing can come to one that is gone: the squares of all ranks for its norm, and in
the first block all ranks' sums.
"""

import dataclasses
import functools
import typing

from pallas_kernels.router import arithmetic, choosing
from pallas_kernels.router.plan import PIECE, TILE, Plan

_SQUARES, _SHARES = 0, 1
"""Inboxes of a block."""


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
    """Shapes of a call; a thread block's work, on a `RouterMachine` or on numpy's stand-in.

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
            scores_here=self.t * plan.experts,
            told=4,
            flag=1,
        )

    def run(self, m, cluster, rank, refs):
        """All of it."""
        at = Place(cluster, rank, m.thread // 32, m.thread % 32)
        weights = [
            [
                self._load_weights(m, refs["weight"], at, tile, column)
                for column in self._columns(at)
            ]
            for tile in range(self.plan.tiles)
        ]
        gains = [m.load(refs["norm"], column, 2, 4) for column in self._columns(at)]
        self._prefetch_bias(m, refs["bias"], at)
        sizes = [self.plan.ranks * 8 * self.halves, self.plan.ranks * self.cells]
        m.open_inboxes(refs["told"], sizes)
        m.begin()
        rows = self._load_rows(m, refs["h"], at)
        scales = self._scales(m, refs, at, rows)
        x = [
            [
                _map(functools.partial(arithmetic.normed, m, scale), *pair)
                for pair in zip(row, gains, strict=True)
            ]
            for scale, row in zip(scales, rows, strict=True)
        ]
        self._store_rows(m, refs["x"], at, x)
        for tile, pieces in enumerate(weights):
            self._leave(m, refs["sums"], at, tile, self._multiply(m, x, pieces))
        self._gather(m, refs, at)
        m.when(rank.equals(0), lambda: self._conclude(m, refs, at))

    def _prefetch_bias(self, m, ref, at: Place):
        """It is needed last, and then at once."""
        line = m.minimum(m.thread * 32, self.plan.experts - 1)
        m.prefetch(ref, line, 4, at.rank.equals(0) & (m.const(self.plan.experts) > m.thread * 32))

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
        total = arithmetic.added(m, refs["squares"], token, tokens, plan.warps)
        telling = m.const(plan.ranks * tokens) > m.thread
        m.meet_cluster()
        inbox = refs["told"], _SQUARES
        m.send(refs["row_squares"], at.rank * tokens + token, [total], rank, inbox, telling)
        m.receive(inbox)
        scales = []
        for token, _ in self._tokens(m, at):
            total = arithmetic.added(m, refs["row_squares"], token, tokens, plan.ranks)
            mean = total / m.const(float(plan.columns))
            scales.append(m.rsqrt(mean + m.const(self.epsilon)))
        return scales

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
            for digit in arithmetic.digits(m, words) if self.wide else [words]:
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
            total = arithmetic.added(m, refs["sums"], cell, self.cells, self.plan.warps)
            index = at.rank * self.cells + cell
            m.send(refs["shares"], index, [total], m.const(0), (refs["told"], _SHARES), there)

    # --- choices ----------------------------------------------------------------------------------

    def _conclude(self, m, refs, at: Place):
        """The first block of a cluster: scores; the last of them: all tokens' experts."""
        plan = self.plan
        m.receive((refs["told"], _SHARES))
        for cell, there in self._cells(m):
            logit = arithmetic.added(m, refs["shares"], cell, self.cells, plan.ranks)
            score = arithmetic.sigmoid(m, logit)
            token, expert = cell // plan.rows, at.cluster * plan.rows + cell % plan.rows
            there = there & (m.const(self.t) > token) & (m.const(plan.experts) > expert)
            m.store(refs["scores"], token * plan.experts + expert, 4, [score], there)
        last = m.is_last(refs["counter"], self.word, plan.clusters, refs["flag"])
        m.when(last, lambda: self._choose(m, refs, at))

    def _choose(self, m, refs, at: Place):
        """A warp for each token."""
        for start in range(0, self.t, self.plan.warps):
            token = at.warp + start
            m.when(m.const(self.t) > token, functools.partial(self._choose_for, m, refs, at, token))

    def _choose_for(self, m, refs, at: Place, token):
        """A token's experts, a lane for each choice."""
        live = m.load(refs["live"], token, 4, 1)[0] if "live" in refs else None
        best = self._best(m, at, *self._candidates(m, refs, at, token))
        m.meet_warp()
        index = token * self.plan.experts + best
        (score,) = m.load_shared(refs["scores_here"], index, 1)
        self._write(m, refs, at, token, best, score, live)

    def _candidates(self, m, refs, at: Place, token):
        """A lane's experts, lane, lane + 32, ..., and keys in the order of their scores.

        The scores are left in shared memory.
        """
        count, found, keys = self.plan.experts, [], []
        for start in range(0, count, 32):
            expert = at.lane + start
            known = m.minimum(expert, count - 1)
            score = m.load_new(refs["scores"], token * count + known)
            (bias,) = m.load(refs["bias"], known, 4, 1)
            found.append((expert, known, score, bias))
        for expert, known, score, bias in found:
            exists = m.const(count) > expert
            m.store_shared(refs["scores_here"], token * count + known, [score], exists)
            keys.append(choosing.key(m, score, m.as_float(bias), exists))
        return [expert for expert, *_ in found], keys

    def _best(self, m, at: Place, experts, keys):
        """The chosen experts, best first, ties by lowest id: one in each lane, then zeros."""
        return choosing.best(m, at.lane, self.c, experts, keys)

    def _write(self, m, refs, at: Place, token, best, share, live):
        """Ids and weights of a token."""
        share = choosing.weigh(m, share, self.c, self.normalise, self.scale)
        if live is not None:
            best = m.where(live.equals(0), m.const(-1), best)
        there = m.const(self.c) > at.lane
        index = token * self.c + m.minimum(at.lane, self.c - 1)
        m.store(refs["ids"], index, 4, [best], there)
        m.store(refs["weights"], index, 4, [share], there)


def _map(function, *nested):
    """`function` of the words of nested lists."""
    if not isinstance(nested[0], list):
        return function(*nested)
    return [_map(function, *parts) for parts in zip(*nested, strict=True)]
