"""What threads of a router compute, on a `Machine` or on numpy's stand-in."""

from pallas_kernels.softmax import LOG2E


def scaled(m, scale, word):
    """A word's bfloat16 times a float, rounded."""
    return m.pack(*(value * scale for value in m.unpack(word)))


def normed(m, scale, word, gain):
    """A word's bfloat16 times a float, rounded, times a word's, rounded."""
    pairs = zip(m.unpack(scaled(m, scale, word)), m.unpack(gain), strict=True)
    return m.pack(*(x * y for x, y in pairs))


def digits(m, words):
    """Float32 as the sum of three bfloat16, exact: 8 bits each of the 24 of its mantissa.

    So their products are exact too, and only sums are rounded, as those of bfloat16 weights.
    """
    found = []
    for _ in range(3):
        found.append([m.halves(*words[i : i + 2], True) for i in range(0, len(words), 2)])
        words = [m.bits(m.as_float(w) - m.as_float(w & ~0xFFFF)) for w in words]
    return found


def added(m, ref, index, pitch: int, count: int):
    """The sum of `count` floats of shared memory, each `pitch` from the one before, in order."""
    total = None
    for i in range(count):
        (value,) = m.load_shared(ref, index + pitch * i, 1)
        total = value if total is None else total + value
    return total


def sigmoid(m, logit):
    """1 / (1 + e^-logit)."""
    one = m.const(1.0)
    return one / (one + m.exp2(logit * m.const(-LOG2E)))
