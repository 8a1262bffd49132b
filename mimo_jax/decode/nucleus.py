"""Which tokens top-k and top-p keep, found without sorting, on vocabulary shards.

Logits have order-preserving integers, their keys; kept are the keys above a bound, and a search
closes in on it: a pass counts the tokens, and adds up the probability mass, above several
thresholds at once, the devices add what they found, and the bound lies between two thresholds.
Masses are integers, so that sums are exact in any order: every device, on every mesh, finds the
same bound. The search ends when one token, or one key, is left to decide about: after three to five
passes as a rule, and after at most 2 + 32 / log2(thresholds + 1).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from mimo_jax.errors import MimoError
from mimo_jax.sharding import Leaf, Parallel

NATS = 24.0
"""How far below the likeliest token a first pass looks: what lies further has no mass to speak of,
and the next passes find it if need be."""
THRESHOLDS = {"cpu": 3, "default": 15}
WIDEST = (1 << 18) - 1
"""Tokens of a vocabulary whose masses can be added in 32 bits."""
LIMB = 14
"""Bits of the integers that masses are made of: three for a mass, in units of 2^-42."""
_MASK = (1 << LIMB) - 1
_DIGIT, _DIGITS = 12, 3
_PIECE = 1280
_BOTTOM = 0x007FFFFE
"""Below the keys of all numbers, -inf included."""


def kept(
    x: Float[Array, "b t w"],
    top_p: Float[Array, "b"],
    top_k: Int32[Array, "b"],
    parallel: Parallel = Parallel(),
    thresholds: int | None = None,
) -> Bool[Array, "b t w"]:
    """Whether a token is among the top-k, and then in the top-p of what these leave.

    top-p keeps a token if the likelier ones have less than that share of the mass of top_k tokens.
    Tokens as likely as one that stays, stay; and the likeliest always does.

    Args:
      x: logits, divided by the temperature: this device's part of the vocabulary.
      top_p: 1 keeps all.
      top_k: 0 keeps all.
      parallel: this device's place on the mesh.
      thresholds: of a pass, at least 3. More of them make fewer passes of more work, and nothing
        else; by default as many as suit the platform.

    Raises:
      MimoError: for a vocabulary of more than `WIDEST` tokens.
    """
    width = x.shape[-1] * parallel.sum(1)
    if width > WIDEST:
        raise MimoError(
            f"a vocabulary of {width} tokens: top_p and top_k take at most {WIDEST}, whose masses "
            "can be added in 32 bits. Choose greedily (temperature=0)."
        )

    def find(number, x, top_p, top_k):
        return _bound(x, top_p, top_k, parallel, width, number)

    if thresholds is None:
        each = {platform: functools.partial(find, n) for platform, n in THRESHOLDS.items()}
        bound = lax.platform_dependent(x, top_p, top_k, **each)
    else:
        bound = find(thresholds, x, top_p, top_k)
    return keys(x) > bound[..., None]


def _bound(x, top_p, top_k, parallel: Parallel, width: int, thresholds: int):
    """The largest key that is not kept, or another one below the least that is; [b, t]."""
    rows = x.shape[:2]
    likeliest = parallel.gather(x.max(axis=-1, keepdims=True), -1).max(axis=-1)
    shard = _Shard.cut(x, likeliest, parallel)
    wanted = jnp.broadcast_to(top_k[:, None], rows).astype(jnp.uint32)
    bottom, none, every = (jnp.full(rows, n, jnp.uint32) for n in (_BOTTOM, 0, width))
    top = keys(likeliest)
    most = Bracket(bottom, top, every, none).only_if((wanted > 0) & (wanted < width))

    def count(memory, at):
        found = shard.count(at)
        return memory, found, found < wanted[..., None]

    most = _search(most, _below(likeliest, thresholds), None, count)

    def weigh(memory, at):
        begun, goal = memory
        found, mass = shard.weigh(at)
        new = _share(_total(most, wanted, [m[..., :2] for m in mass]), top_p[:, None])
        goal = [jnp.where(begun, g, n) for g, n in zip(goal, new, strict=True)]
        return (jnp.array(True), goal), found, _light(found, mass, goal)

    partial = jnp.broadcast_to((top_p < 1.0)[:, None], rows)
    heavy = Bracket(most.low, top, most.count_low, none).only_if(partial)
    # The goal is a share of what is above the ends of `most`, which the first pass looks at.
    at = [most.low[..., None], most.high[..., None], _below(likeliest, thresholds - 2)]
    memory = jnp.array(False), [none, none, none]
    return _search(heavy, jnp.concatenate(at, axis=-1), memory, weigh).low


def _below(likeliest, number: int):
    """Thresholds of a first pass, closer to each other near the likeliest token."""
    steps = (jnp.arange(1, number + 1, dtype=jnp.float32) / number) ** 2
    return keys(likeliest[..., None] - NATS * steps)


def keys(x: Float[Array, "*rows"]) -> UInt32[Array, "*rows"]:
    """Integers in the order of the numbers; both zeros have the same."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bracket:
    """Where each row's bound can lie: what a search asks is false at `low` and true at `high`."""

    low: Leaf  # uint32 [b, t], a key
    high: Leaf
    count_low: Leaf  # uint32 [b, t], tokens above it
    count_high: Leaf

    @property
    def open(self) -> Bool[Array, "b t"]:
        """Rows with more than one key, and more than one token, to decide about."""
        return (self.high - self.low > 1) & (self.count_low - self.count_high > 1)

    def only_if(self, searched: Bool[Array, "b t"]) -> "Bracket":
        """Other rows have their bound at `low`."""
        return dataclasses.replace(
            self,
            high=jnp.where(searched, self.high, self.low),
            count_high=jnp.where(searched, self.count_high, self.count_low),
        )

    def thresholds(self, number: int) -> UInt32[Array, "b t n"]:
        """So many keys in equal steps; where there are fewer in between, the rest are `high`."""
        width = (self.high - self.low)[..., None]
        offset = (width // (number + 1) + 1) * jnp.arange(1, number + 1, dtype=jnp.uint32)
        return self.low[..., None] + jnp.minimum(offset, width)

    def split(
        self, at: UInt32[Array, "b t n"], count: UInt32[Array, "b t n"], true: Bool[Array, "b t n"]
    ) -> "Bracket":
        """Narrowed by what was found at thresholds, in any order, and the tokens above each."""
        most = jnp.uint32(0xFFFFFFFF)
        narrowed = Bracket(
            low=jnp.maximum(self.low, jnp.where(true, 0, at).max(axis=-1)),
            high=jnp.minimum(self.high, jnp.where(true, at, most).min(axis=-1)),
            count_low=jnp.minimum(self.count_low, jnp.where(true, most, count).min(axis=-1)),
            count_high=jnp.maximum(self.count_high, jnp.where(true, count, 0).max(axis=-1)),
        )
        return jax.tree.map(lambda new, old: jnp.where(self.open, new, old), narrowed, self)


def _search(bracket: Bracket, at, memory, ask) -> Bracket:
    """Splits until no row is open.

    Args:
      bracket: where to look.
      at: the first thresholds.
      memory: of `ask`, before its first call.
      ask: ask(memory, thresholds) gives its memory, the tokens above each, and the answer at each.
    """

    def step(carry):
        bracket, at, memory = carry
        memory, count, true = ask(memory, at)
        bracket = bracket.split(at, count, true)
        return bracket, bracket.thresholds(at.shape[-1]), memory

    return lax.while_loop(lambda carry: carry[0].open.any(), step, (bracket, at, memory))[0]


@dataclasses.dataclass(frozen=True)
class _Shard:
    """This device's tokens, in pieces of a row, and sums over all devices."""

    ordered: Array  # uint32 [b, t, pieces, length]
    masses: list[Array]
    parallel: Parallel

    @classmethod
    def cut(cls, x, likeliest, parallel: Parallel):
        """Cuts rows into pieces that thread blocks add up."""
        pieces = -(-x.shape[-1] // _PIECE)
        length = -(-x.shape[-1] // pieces)
        arrays = [keys(x), *_masses(x, likeliest[..., None])]
        if more := pieces * length - x.shape[-1]:
            # A key of 0 is above no threshold.
            arrays = [jnp.pad(a, ((0, 0), (0, 0), (0, more))) for a in arrays]
        ordered, *masses = (a.reshape(*x.shape[:-1], pieces, length) for a in arrays)
        return cls(ordered, masses, parallel)

    def count(self, at):
        """Tokens above each threshold."""
        return self.parallel.sum(self._sums(at, [jnp.uint32(1)])[0])

    def weigh(self, at):
        """Tokens above each threshold, and their mass, as three integers that may exceed a limb."""
        count, *mass = self.parallel.sum(self._sums(at, [jnp.uint32(1), *self.masses]))
        return count, mass

    def _sums(self, at, values):
        """Sums of each value above each threshold, [values, b, t, n].

        Each threshold has a sum of its own, not a dimension of one: XLA reads a token once for all.
        """
        sums = []
        for value in values:
            for n in range(at.shape[-1]):
                above = self.ordered > at[..., n, None, None]
                sums.append(jnp.where(above, value, 0).sum(axis=-1, dtype=jnp.uint32))
        # Side by side in memory first: fused with the sums of pieces, each number of those would be
        # looked for among all arrays anew, one after another (16 of a pass' 41 us on an H200).
        sums = lax.optimization_barrier(jnp.stack(sums)).sum(axis=-1, dtype=jnp.uint32)
        return jnp.moveaxis(sums.reshape(len(values), -1, *sums.shape[1:]), 1, -1)


def _masses(x, likeliest) -> list[Array]:
    """exp(x - likeliest) in units of 2^-42, as integers of 14 bits, the highest first."""
    rest = jnp.where(x == likeliest, 1.0, jnp.exp(x - likeliest))
    limbs = []
    for _ in range(3):
        # Exact: a float32 times a power of two, and less its whole part.
        rest = rest * (1 << LIMB)
        limbs.append(jnp.floor(rest))
        rest = rest - limbs[-1]
    return [limb.astype(jnp.uint32) for limb in limbs]


def _carried(limbs):
    """Three sums of limbs as one number: what exceeds a limb goes to the next higher one."""
    high, middle, low = limbs
    middle = middle + (low >> LIMB)
    return high + (middle >> LIMB), middle & _MASK, low & _MASK


def _light(count, mass, goal):
    """Whether a mass is less than the goal, or nothing."""
    (high, middle, low), goal = _carried(mass), [g[..., None] for g in goal]
    less = (middle < goal[1]) | ((middle == goal[1]) & (low < goal[2]))
    return (count == 0) | (high < goal[0]) | ((high == goal[0]) & less)


def _total(bracket: Bracket, wanted, mass):
    """The mass of as many of the likeliest tokens as are wanted.

    All that are between the ends of the bracket are equal, so that a part of them has that part of
    their mass.

    Args:
      bracket: of the search for their number; without a limit, its ends are one.
      wanted: how many.
      mass: above its two ends, [b, t, 2] each limb.
    """
    between = bracket.count_low - bracket.count_high
    some = wanted - bracket.count_high
    each = [(m[..., 0] - m[..., 1]) // jnp.maximum(between, 1) for m in mass]
    return _carried([m[..., 1] + some * one for m, one in zip(mass, each, strict=True)])


def _share(total, p):
    """p times a mass, digit by digit, rounded down to the units of a mass."""
    limbs = [total[2], total[1], total[0] & _MASK, total[0] >> LIMB]
    digits = []
    for _ in range(_DIGITS):
        p = p * (1 << _DIGIT)
        digits.append(jnp.floor(p).astype(jnp.uint32))
        p = p - jnp.floor(p)
    product = [jnp.zeros_like(limb) for limb in limbs]
    for digit in reversed(digits):
        carry, sums = jnp.uint32(0), []
        for limb, more in zip(limbs, product, strict=True):
            carry = (carry >> LIMB) + limb * digit + more
            sums.append(carry & _MASK)
        sums[-1] = carry
        above = [*sums[1:], jnp.zeros_like(carry)]
        product = [
            (low >> _DIGIT) + ((high & ((1 << _DIGIT) - 1)) << (LIMB - _DIGIT))
            for low, high in zip(sums, above, strict=True)
        ]
    return (product[3] << LIMB) + product[2], product[1], product[0]
