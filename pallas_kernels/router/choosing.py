"""How a warp chooses a token's experts by their scores, lane i having experts i, i + 32 and so on.

What threads do is on a `RouterMachine`, or on numpy's stand-in.
"""

from collections.abc import Sequence

_TAKEN = -(1 << 31)
_NONE = (1 << 31) - 1


def key(m, score, bias, exists):
    """An int in the order of score plus bias; below all others where there is no expert."""
    return m.where(exists, _ordered(m, score + bias), m.const(_TAKEN))


def best(m, lane, count: int, experts: Sequence, keys: Sequence):
    """The chosen experts, best first, ties by lowest id: one in each lane, then zeros.

    Args:
      m: the machine.
      lane: of the warp.
      count: of experts to choose.
      experts: a lane's.
      keys: of `key`, for each.
    """
    none = m.const(_NONE)

    def one(i, carry):
        keys, found = carry[:-1], carry[-1]
        top = _tree(m.maximum, keys)
        mine = [
            m.where(key.equals(top), expert, none)
            for key, expert in zip(keys, experts, strict=True)
        ]
        mine = _tree(m.minimum, mine)
        chosen = m.warp_min(m.where(top.equals(m.warp_max(top)), mine, none))
        keys = [
            m.where(expert.equals(chosen), m.const(_TAKEN), key)
            for key, expert in zip(keys, experts, strict=True)
        ]
        return [*keys, m.where(lane.equals(i), chosen, found)]

    return m.repeat(m.const(count), one, [*keys, m.const(0)])[-1]


def weigh(m, score, count: int, normalise: bool, scale: float):
    """A choice's weight from its score: a lane for each of `count`, the others' are of no use."""
    if normalise:
        total = m.of_lane(score, 0)
        for i in range(1, count):
            total = total + m.of_lane(score, i)
        score = score / (total + m.const(1e-20))
    return score * m.const(scale) if scale != 1.0 else score


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
