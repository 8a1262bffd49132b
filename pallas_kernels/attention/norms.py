"""The RMS norm of what a lane holds of a head: four lanes have a row, as `ring.columns_of` says."""


def normed(m, pieces, gains, h: int, epsilon: float):
    """A lane's pieces of a head of h columns over its RMS, rounded, times the weights, rounded.

    All lanes of a warp come here.
    """
    totals = [m.const(0.0) for _ in pieces]
    for i, piece in enumerate(pieces):  # Chains of sums side by side.
        for value in (value for word in piece for value in m.unpack(word)):
            totals[i] = m.fma(value, value, totals[i])
    total = totals[0]
    for other in totals[1:]:
        total = total + other
    for mask in (1, 2):
        total = total + m.swap(total, mask)
    scale = m.rsqrt(total / m.const(float(h)) + m.const(epsilon))
    return [
        [_scaled(m, scale, word, gain) for word, gain in zip(*pair, strict=True)]
        for pair in zip(pieces, gains, strict=True)
    ]


def _scaled(m, scale, word, gain):
    rounded = m.pack(*(value * scale for value in m.unpack(word)))
    return m.pack(*(a * b for a, b in zip(m.unpack(rounded), m.unpack(gain), strict=True)))
