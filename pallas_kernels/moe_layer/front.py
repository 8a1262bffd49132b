"""What a thread block does before its experts: norm, its share of the router, the choice for all.

Every block needs the normed rows, for the experts, so that every block makes them; of the router's
experts each has a few. Scores go to the other blocks through global memory, and each block chooses
for all tokens. Nobody waits at a barrier for that: a score is never negative, so that its sign bit
can say whether it is of this launch or of one before; it changes from launch to launch, as a word
says that is read at the beginning and changed at the end, after all blocks have met.

Those that multiply the experts' weights do this, a warp for each slice of the columns, then a warp
for each token. Lane (g, c) = (lane / 4, lane mod 4) has 8 columns of every 32 of token g, from
column 8 c on, which is what products of expert weights take; the router's rows are laid beside
them.
"""

import dataclasses

from pallas_kernels.expert_ffn.slots import TOKENS
from pallas_kernels.router import arithmetic, choosing

PIECE = 32
"""Columns that a warp loads at a time: 8 for each of 4 lanes."""
MOST_OWN = 8
"""Experts of a block: a product has as many rows."""
_CHAINS = 4
"""Sums under way at once: a product waits for the one whose sum it goes on with."""
_SIGN = -(1 << 31)


@dataclasses.dataclass(frozen=True)
class Front:
    """Shapes of a call; a thread block's work, on a `FrontMachine` or on numpy's stand-in.

    Attributes:
      t: tokens, 1 to 8.
      c: choices of a token.
      experts: a multiple of 32.
      columns: of a row.
      warps: that multiply.
      slices: of the columns, of which warps i, i + slices and so on have the ith.
      blocks: of the grid.
      wide: whether the router's weights are float32.
      epsilon: of the norm.
      normalise: whether a token's weights are divided by their sum.
      scale: of the weights.
      words: of the flags, which says what launch it is, and the first of the scores.
    """

    t: int
    c: int
    experts: int
    columns: int
    warps: int
    slices: int
    blocks: int
    wide: bool
    epsilon: float
    normalise: bool
    scale: float
    words: tuple[int, int]

    @property
    def own(self) -> int:
        """Experts of a block."""
        return -(-self.experts // self.blocks)

    @property
    def pieces(self) -> int:
        """Of a slice."""
        return self.columns // self.slices // PIECE

    @property
    def row_words(self) -> int:
        """Of the router's weights of an expert."""
        return self.columns if self.wide else self.columns // 2

    @property
    def shared(self) -> dict[str, int]:
        """Words in shared memory; rows and gain are copied there."""
        return dict(
            router_here=self.own * self.row_words,
            gain_here=self.columns // 2,
            squares=self.slices * TOKENS,
            logits=self.slices * TOKENS * MOST_OWN,
            mark=1,
            scores_here=self.t * self.experts,
            ids_here=self.t * self.c,
            weights_here=self.t * self.c,
        )

    def held(self, m, block):
        """The first of the router's experts whose weights a block holds."""
        return m.minimum(block * self.own, self.experts - self.own)

    def _place(self, m):
        """Where a lane is: g, c, its slice, its first column, and whether it is the slice's own.

        A slice's own warp is the first that has it; others know the same.
        """
        warp, lane = m.thread // 32, m.thread % 32
        g, c, mine = lane // 4, lane % 4, warp % self.slices
        column = mine * (self.columns // self.slices) + c * 8
        return g, c, mine, column, m.const(self.slices) > warp

    # --- the norm -----------------------------------------------------------------------------

    def scaled_rows(self, m, refs):
        """A lane's words of the rows over their root mean square; zeros where there is no token."""
        g, c, mine, column, own = self._place(m)
        before = m.load_new(refs["flags"], m.const(self.words[0]), m.thread.equals(0))
        start, there, words = g * self.columns + column, m.const(self.t) > g, []
        for piece in range(self.pieces):
            words += m.load(refs["h"], start, 2, 4, there, offset=PIECE * piece)
        total = self._squares(m, words, g)
        diagonal = c.equals(g // 2)
        m.store_shared(refs["squares"], mine * TOKENS + g, [total], own & diagonal)
        mark = m.as_float(m.where(m.bits(before).equals(0), m.const(_SIGN), m.const(0)))
        m.store_shared(refs["mark"], m.const(0), [mark], m.thread.equals(0))
        m.barrier()
        total = arithmetic.added(m, refs["squares"], g, TOKENS, self.slices)
        scale = m.rsqrt(total / m.const(float(self.columns)) + m.const(self.epsilon))
        return [arithmetic.scaled(m, scale, word) for word in words]

    def _squares(self, m, words, g):
        """A row's sum of squares over a slice, in one lane of its four: the product with itself.

        The diagonal of rows times rows, of which a lane has token g with tokens 2 c and 2 c + 1.
        """
        sums = self._multiply(m, [(words, words)])
        return m.where((g % 2).equals(0), sums[0], sums[1])

    def _multiply(self, m, pairs):
        """Sums of products of words as rows with words as columns, pairs of lists of both."""
        zero, sums = m.const(0), [[m.const(0.0)] * 4 for _ in range(_CHAINS)]
        steps = (
            (rows[i : i + 2], columns[i : i + 2])
            for rows, columns in pairs
            for i in range(0, len(rows), 2)
        )
        for nth, ((low, high), right) in enumerate(steps):
            chain = nth % _CHAINS
            sums[chain] = m.multiply((low, zero, high, zero), right, sums[chain])
        return [(a + b) + (c + d) for a, b, c, d in zip(*sums, strict=True)]

    # --- scores -------------------------------------------------------------------------------

    def score(self, m, refs, block, words):
        """Writes the scores of the block's experts; the normed rows, raised, as products take them.

        Args:
          m: the machine.
          refs: memory.
          block: number of the block.
          words: of `scaled_rows`.
        """
        g, c, mine, column, own = self._place(m)
        rows = []
        for piece in range(self.pieces):
            gain = m.load_shared(refs["gain_here"], column // 2 + PIECE // 2 * piece, 4)
            part = words[4 * piece : 4 * piece + 4]
            rows += [m.times(word, m.bits(x)) for word, x in zip(part, gain, strict=True)]
        weights = self._weights(m, refs, m.minimum(g, self.own - 1), column)
        pairs = (
            (rows[4 * piece : 4 * piece + 4], digit)
            for piece, digits in enumerate(weights)
            for digit in digits
        )
        sums = self._multiply(m, pairs)
        cell = (mine * TOKENS + g) * MOST_OWN + c * 2
        m.store_shared(refs["logits"], cell, sums[:2], own)
        m.barrier()
        self._tell(m, refs, block)
        return [m.raised(word) for word in rows]

    def _weights(self, m, refs, row, column):
        """Of each piece, its weights of an expert: 4 words, or those of three digits."""
        for piece in range(self.pieces):
            at = row * self.row_words
            if self.wide:
                at = at + column + PIECE * piece
                loads = [m.load_shared(refs["router_here"], at + i, 4) for i in (0, 4)]
                yield arithmetic.digits(m, [m.bits(x) for load in loads for x in load])
            else:
                at = at + column // 2 + PIECE // 2 * piece
                yield [[m.bits(x) for x in m.load_shared(refs["router_here"], at, 4)]]

    def _tell(self, m, refs, block):
        """A thread for each token and own expert: adds the slices, and writes the score."""
        cells = TOKENS * self.own
        cell = m.minimum(m.thread, cells - 1)
        token, own = cell // self.own, cell % self.own
        at = token * MOST_OWN + own
        logit = arithmetic.added(m, refs["logits"], at, TOKENS * MOST_OWN, self.slices)
        score = m.bits(arithmetic.sigmoid(m, logit)) & ~_SIGN
        (mark,) = m.load_shared(refs["mark"], m.const(0), 1)
        # The last blocks may hold experts of those before them, of which these tell.
        expert = self.held(m, block) + own
        at = token * self.experts + expert + self.words[1]
        there = (m.const(cells) > m.thread) & (expert >= block * self.own)
        m.store_new(refs["flags"], at, score | m.bits(mark), there)

    # --- choices ------------------------------------------------------------------------------

    def choose(self, m, refs):
        """A warp for each token: its experts and their weights, in shared memory."""
        warp = m.thread // 32
        m.when(m.const(self.t) > warp, lambda: self._choose_for(m, refs, warp))

    def _choose_for(self, m, refs, token):
        lane = m.thread % 32
        experts = [lane + start for start in range(0, self.experts, 32)]
        biases = [m.load(refs["bias"], expert, 4, 1)[0] for expert in experts]
        live = m.load(refs["alive"], token, 4, 1)[0] if "alive" in refs else None
        (mark,) = m.load_shared(refs["mark"], m.const(0), 1)
        start = token * self.experts + lane
        found = m.await_marked(refs["flags"], start + self.words[1], len(experts), 32, m.bits(mark))
        keys = []
        for i, (score, bias) in enumerate(zip(found, biases, strict=True)):
            score = m.as_float(score)
            m.store_shared(refs["scores_here"], start + 32 * i, [score], lane < 32)
            keys.append(choosing.key(m, score, m.as_float(bias), lane < 32))
        best = choosing.best(m, lane, self.c, experts, keys)
        m.meet_warp()
        (score,) = m.load_shared(refs["scores_here"], token * self.experts + best, 1)
        weight = choosing.weigh(m, score, self.c, self.normalise, self.scale)
        if live is not None:
            best = m.where(live.equals(0), m.const(-1), best)
        there, at = m.const(self.c) > lane, token * self.c + m.minimum(lane, self.c - 1)
        m.store_shared(refs["ids_here"], at, [m.as_float(best)], there)
        m.store_shared(refs["weights_here"], at, [weight], there)
