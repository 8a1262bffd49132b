"""Rotary embedding of what a lane holds: pairs (i, i + half) of the first 2 half columns of a head.

A lane has 8 columns in a row of each 32, so that a pair is in one lane if half is a multiple of 32,
and 1 or 2 lanes apart if it is 8 or 16.
"""

import jax.numpy as jnp
import numpy as np


def misfit(h: int, half: int) -> str | None:
    """Why a lane cannot rotate heads of h columns."""
    if half % 32 == 0 and 2 * half <= h // 32 * 32:
        return None
    if half in (8, 16) and h >= 32:
        return None
    return f"{2 * half} rotated columns of {h}; 16, 32 or multiples of 64 can be"


def load_angles(m, refs, row, half: int, c, there=None):
    """Starts to load the cosines and sines of a row of [rows, half]: 8 for each piece of a lane."""
    columns = [c * 8 + 32 * i for i in range(half // 32)] or [(c * 8) % half]

    def eight(name, column):
        return [
            word
            for i in (0, 4)
            for word in m.load(refs[name], row * half + column, 4, 4, there, offset=i)
        ]

    return [
        [[m.as_float(word) for word in eight(name, column)] for name in ("cos", "sin")]
        for column in columns
    ]


def rotate(m, pieces, angles, half: int, c):
    """A lane's pieces of a head, rotated in float32 and rounded to bfloat16."""
    pieces = list(pieces)
    if half % 32:
        apart, inside = half // 8, m.const(2 * half) > c * 8
        later = (c * 8) % (2 * half) >= half
        cos, sin = angles[0]
        sin = [m.where(later, value, m.const(0.0) - value) for value in sin]
        theirs = [m.swap(word, apart) for word in pieces[0]]
        turned = _turn(m, pieces[0], theirs, cos, sin)
        pieces[0] = [m.where(inside, a, b) for a, b in zip(turned, pieces[0], strict=True)]
        return pieces
    for i, (cos, sin) in enumerate(angles):
        first, second = pieces[i], pieces[i + half // 32]
        minus = [m.const(0.0) - value for value in sin]
        pieces[i] = _turn(m, first, second, cos, minus)
        pieces[i + half // 32] = _turn(m, second, first, cos, sin)
    return pieces


def rounded(scale: float) -> float:
    """As bfloat16 has it."""
    return float(np.asarray(scale, jnp.bfloat16))


def scaled(m, words, scale: float):
    """Pairs of bfloat16 times a number."""
    return [m.pack(*(half * m.const(scale) for half in m.unpack(word))) for word in words]


def _turn(m, words, others, cos, sin):
    """words * cos + others * sin, pair by pair."""
    found = []
    for i, (word, other) in enumerate(zip(words, others, strict=True)):
        pair = [
            m.fma(a, cos[2 * i + j], b * sin[2 * i + j])
            for j, (a, b) in enumerate(zip(m.unpack(word), m.unpack(other), strict=True))
        ]
        found.append(m.pack(*pair))
    return found
