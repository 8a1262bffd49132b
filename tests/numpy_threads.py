"""Threads whose registers are numpy arrays, one element a thread: what runs lane code on a CPU.

The base of the stand-ins for a `Machine`. All threads go in step. Memory is numpy arrays; bfloat16
is kept as ml_dtypes has it. A load or store outside of its array fails, and one not aligned.
"""

import ml_dtypes
import numpy as np


class Shown(np.ndarray):
    """An array with a register's `equals`."""

    def equals(self, other):
        return np.equal(self, other).view(Shown)


def reg(values):
    return np.asarray(values).view(Shown)


class NumpyThreads:
    """`size` threads; those not `active` touch no memory."""

    def __init__(self, size: int):
        self.size, self.every = size, np.arange(size)
        self.active = np.ones(size, bool)

    def const(self, value):
        return reg(np.full(self.size, value, np.int32 if isinstance(value, int) else np.float32))

    def where(self, condition, a, b):
        assert a.dtype == b.dtype
        return reg(np.where(condition, a, b))

    def minimum(self, a, b):
        return reg(np.minimum(a, b))

    def maximum(self, a, b):
        return reg(np.maximum(a, b))

    # --- global memory

    def _places(self, ref, index, width, words, live):
        """Flat bytes, and the places of each thread's bytes."""
        assert np.asarray(index).dtype == np.int32
        flat = ref.reshape(-1).view(np.uint8)
        at = np.asarray(index, np.int64)[:, None] * width + np.arange(4 * words)
        assert ((at >= 0) & (at < flat.size))[live].all(), "outside its array"
        assert (at[live, 0] % (4 * words) == 0).all(), "not aligned"
        return flat, at

    def load(self, ref, index, width, words, where=None, other=None, offset=0):
        index = index + np.int32(offset)
        live = self.active if where is None else self.active & np.asarray(where)
        flat, at = self._places(ref, index, width, words, live)
        found = flat[np.where(live[:, None], at, 0)] * live[:, None].astype(np.uint8)
        found = np.ascontiguousarray(found).view(np.int32).reshape(self.size, words)
        found = [reg(found[:, i].copy()) for i in range(words)]
        if other is None:
            return found
        return [self.where(where, a, b) for a, b in zip(found, other, strict=True)]

    def load_either(self, condition, one, other, width, words, offset=0, where=None):
        where = True if where is None else where
        found = [
            self.load(ref, index, width, words, chosen & where, offset=offset)
            for (ref, index), chosen in ((one, condition), (other, ~condition))
        ]
        return [self.where(condition, a, b) for a, b in zip(*found, strict=True)]

    def store(self, ref, index, width, words, where, offset=0):
        index = index + np.int32(offset)
        live = self.active & np.asarray(where)
        flat, at = self._places(ref, index, width, len(words), live)
        assert np.may_share_memory(flat, ref), "a store to a copy"
        bits = np.stack([np.asarray(w).view(np.int32) for w in words], axis=1)
        flat[at[live]] = np.ascontiguousarray(bits).view(np.uint8)[live]

    def touch(self, ref, index, width, where):
        self.load(ref, index, width, 1, where)

    # --- lanes

    def swap(self, value, mask):
        return reg(np.asarray(value)[self.every ^ mask])

    def multiply(self, a, b, c):
        # Fragments: lane 4 g + q; A: (row half, column half) in the order 0, 2 | 1, 3.
        left = _pairs(a).reshape(-1, 8, 4, 2, 2, 2)  # g, q, column half, row half, pair
        left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
        right = _pairs(b).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
        with np.errstate(all="ignore"):
            product = left @ right
        sums = product.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
        return [reg((np.asarray(c[i]) + sums[:, i]).astype(np.float32)) for i in range(4)]

    # --- arithmetic

    def exp2(self, x):
        return reg(np.exp2(np.asarray(x)).astype(np.float32))

    def rsqrt(self, x):
        with np.errstate(divide="ignore"):
            return reg((1 / np.sqrt(np.asarray(x))).astype(np.float32))

    def whole(self, x):
        return reg(np.rint(np.asarray(x)).astype(np.float32))

    def fma(self, a, b, c):
        wide = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
        return reg(wide.astype(np.float32))

    def pack(self, low, high):
        pair = np.stack([np.asarray(low), np.asarray(high)], axis=-1).astype(ml_dtypes.bfloat16)
        return reg(np.ascontiguousarray(pair).view(np.int32).reshape(-1))

    def halves(self, a, b, high):
        a, b = (np.asarray(x).view(np.uint32) for x in (a, b))
        found = (a >> 16) | (b & 0xFFFF0000) if high else (a & 0xFFFF) | (b << 16)
        return reg(found.astype(np.uint32).view(np.int32))

    def unpack(self, word):
        bits = np.asarray(word).view(np.uint32)
        return reg((bits << 16).view(np.float32)), reg((bits & 0xFFFF0000).view(np.float32))

    def as_float(self, word):
        return reg(np.asarray(word).view(np.float32))

    # --- control

    def repeat(self, count, step, carry):
        for i in range(int(np.max(count))):
            new = step(self.const(i), carry)
            carry = [self.where(i < count, a, b) for a, b in zip(new, carry, strict=True)]
        return carry


def _pairs(words):
    """[warp, g, q, register, 2] float32 of pairs of bfloat16."""
    bits = np.stack([np.asarray(w).view(np.uint32) for w in words], axis=-1)
    pairs = np.ascontiguousarray(bits)[..., None].view(np.uint16)
    wide = pairs.view(ml_dtypes.bfloat16).astype(np.float32)
    return wide.reshape(-1, 8, 4, len(words), 2)
