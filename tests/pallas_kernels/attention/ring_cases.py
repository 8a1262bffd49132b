"""Shapes of rings and blocks, and all of a launch's thread blocks carried out in numpy."""

import math

import numpy as np
import pytest
from attention_cases import BF16
from numpy_machine import NumpyMachine

NAMES = ("qkv", "cos", "sin", "keys", "values", "start", "live", "sink")


def run_exchanging(shape, arguments):
    """All thread blocks of a launch that takes the projection from an exchange, and leaves heads.

    What each block attends with is in shared memory only when it has waited for it.
    """
    refs = {k: x for k, x in zip(NAMES, arguments, strict=True) if x is not None}
    refs |= {name: refs[name].copy() for name in ("keys", "values")}
    qkv, heads = refs.pop("qkv"), (shape.b, shape.t, shape.n, shape.v)
    words = [~np.ascontiguousarray(qkv).reshape(-1).view(np.uint32)]
    left, before = np.zeros(math.prod(heads) // 2, np.uint32), 8
    refs["exchange"] = np.concatenate([np.zeros(before, np.uint32), *words, left])
    begin = before + words[0].size
    for block in range(shape.b * shape.k * shape.tiles):
        for name, size in shape.shared.items():
            refs[name] = np.full(size, np.nan, np.float32)

        def take(block=block):
            machine = NumpyMachine(128)
            at = dict(qkv=machine.const(before))
            shape.take(machine, machine.const(block), refs | at)

        machine = NumpyMachine(128 * shape.warpgroups, take)
        shape.run(machine, machine.const(block), refs | dict(out=machine.const(begin)))
    found = refs["exchange"][begin:]
    assert (found != 0).all() and not refs["exchange"][:before].any()
    return (~found).view(BF16).reshape(heads), refs["keys"], refs["values"]


def run(shape, arguments, backwards=False):
    """All thread blocks, one after another, in either order; what nobody writes is NaN."""
    refs = {k: x for k, x in zip(NAMES, arguments, strict=True) if x is not None}
    refs |= {name: refs[name].copy() for name in ("qkv", "keys", "values")}
    refs["out"] = np.full((shape.b, shape.t, shape.n, shape.v), np.nan, BF16)
    blocks = range(shape.b * shape.k * shape.tiles)
    for block in reversed(blocks) if backwards else blocks:
        machine = NumpyMachine(128 * shape.warpgroups)
        for name, size in shape.shared.items():
            refs[name] = np.full(size, np.nan, np.float32)
        shape.run(machine, machine.const(block), refs)
    return refs["out"], refs["keys"], refs["values"]


PRO = dict(b=1, t=8, n=16, h=192, v=128, k=1, s=135, window=128, half=32)
NANO = dict(b=2, t=8, n=8, h=48, v=32, k=4, s=135, window=128, half=8)
SMALL = dict(b=2, t=5, n=12, h=48, v=32, k=3, s=29, window=24, half=8)
CASES = [
    # One rank of eight of MiMo-V2.6-Pro, the block across the ring's end; mimo-nano.
    pytest.param(PRO, (132,), (8,), id="pro"),
    pytest.param(NANO, (0, 301), (8, 3), id="nano"),
    # Several tiles of a key/value head: blocks across the ring's end, with dead rows, empty.
    pytest.param(dict(SMALL, n=24), (27, 86), (5, 2), id="wraps"),
    pytest.param(dict(SMALL, b=3), (0, 40, 1), (1, 0, 5), id="empty"),
    # Other pairs: of lanes two apart, and in one lane.
    pytest.param(dict(SMALL, h=80, v=96, half=16), (7, 60), (5, 4), id="half16"),
    pytest.param(dict(SMALL, h=144, v=96, half=64), (7, 60), (5, 4), id="half64"),
    pytest.param(dict(SMALL, t=1, s=24), (23, 24), (1, 1), id="one"),
    pytest.param(dict(SMALL, t=16, n=6, s=39), (33, 5), (16, 11), id="sixteen"),
]
