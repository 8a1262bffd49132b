"""A `Machine` whose registers are numpy arrays, one element a thread: runs lane code on a CPU.

All threads go in step, so that a barrier has nothing to do: a barrier that is missing is not seen.
Memory is numpy arrays; bfloat16 is kept as ml_dtypes has it.
"""

import ml_dtypes
import numpy as np


class Shown(np.ndarray):
    """An array with a register's `equals`."""

    def equals(self, other):
        return np.equal(self, other).view(Shown)


def reg(values):
    return np.asarray(values).view(Shown)


class NumpyMachine:
    """The threads of one block."""

    def __init__(self, threads: int):
        self.threads = threads
        self.thread = reg(np.arange(threads, dtype=np.int32))

    def const(self, value):
        return reg(np.full(self.threads, value, np.int32 if isinstance(value, int) else np.float32))

    def where(self, condition, a, b):
        assert a.dtype == b.dtype
        return reg(np.where(condition, a, b))

    def minimum(self, a, b):
        return reg(np.minimum(a, b))

    def maximum(self, a, b):
        return reg(np.maximum(a, b))

    def _words(self, ref, index, width, words):
        """Flat bytes and the places of each thread's bytes."""
        flat = ref.reshape(-1).view(np.uint8)
        at = np.asarray(index, np.int64)[:, None] * width + np.arange(4 * words)
        assert flat.base is not None or flat is ref
        return flat, at

    def load(self, ref, index, width, words, where=None, other=None):
        flat, at = self._words(ref, index, width, words)
        assert np.asarray(index).dtype == np.int32
        live = np.ones(self.threads, bool) if where is None else np.asarray(where)
        assert ((at >= 0) & (at < flat.size))[live].all(), "a load outside its array"
        assert (at[live, 0] % (4 * words) == 0).all(), "a load that is not aligned"
        found = flat[np.where(live[:, None], at, 0)] * live[:, None].astype(np.uint8)
        found = np.ascontiguousarray(found).view(np.int32).reshape(self.threads, words)
        found = [reg(found[:, i].copy()) for i in range(words)]
        if other is None:
            return found
        return [self.where(where, a, b) for a, b in zip(found, other, strict=True)]

    def store(self, ref, index, width, words, where):
        flat, at = self._words(ref, index, width, len(words))
        live = np.asarray(where)
        assert ((at >= 0) & (at < flat.size))[live].all(), "a store outside its array"
        assert (at[live, 0] % (4 * len(words)) == 0).all(), "a store that is not aligned"
        bits = np.stack([np.asarray(w).view(np.int32) for w in words], axis=1)
        flat[at[live]] = np.ascontiguousarray(bits).view(np.uint8)[live]

    def load_shared(self, ref, index, count):
        return [w.view(np.float32) for w in self.load(ref, index, 4, count)]

    def store_shared(self, ref, index, values, where):
        self.store(ref, index, 4, values, where)

    def barrier(self):
        pass

    def _halves(self, words):
        """[warp, lane, register, 2] float32 of bfloat16 pairs."""
        bits = np.stack([np.asarray(w).view(np.uint32) for w in words], axis=-1)
        pairs = np.ascontiguousarray(bits)[..., None].view(np.uint16)
        return pairs.view(ml_dtypes.bfloat16).astype(np.float32).reshape(-1, 32, len(words), 2)

    def multiply(self, a, b, c):
        a, b = self._halves(a), self._halves(b)
        warps = a.shape[0]
        # Fragments: lane 4 g + q; A: (row half, column half) in the order 0, 2 | 1, 3.
        left = a.reshape(warps, 8, 4, 2, 2, 2)  # g, q, column half, row half, pair
        left = left.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 16)
        right = b.reshape(warps, 8, 4, 2, 2).transpose(0, 3, 2, 4, 1).reshape(warps, 16, 8)
        with np.errstate(all="ignore"):
            product = left @ right
        sums = product.reshape(warps, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
        return [reg((np.asarray(c[i]) + sums[:, i]).astype(np.float32)) for i in range(4)]

    def swap(self, value, mask):
        lanes = np.arange(self.threads)
        return reg(np.asarray(value)[lanes ^ mask])

    def exp2(self, x):
        return reg(np.exp2(np.asarray(x)).astype(np.float32))

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

    def to_float(self, value):
        return reg(np.asarray(value).astype(np.float32))

    def repeat(self, count, step, carry):
        for i in range(int(np.max(count))):
            new = step(self.const(i), carry)
            carry = [self.where(i < count, a, b) for a, b in zip(new, carry, strict=True)]
        return carry

    def any(self, condition):
        return reg(np.repeat(np.asarray(condition).reshape(-1, 32).any(axis=1), 32))

    def branch(self, condition, then, otherwise):
        """Both ways are taken: what `then` stores must have conditions of its own."""
        whole = np.asarray(condition).reshape(-1, 32)
        assert (whole.all(axis=1) | ~whole.any(axis=1)).all(), "a warp that takes both ways"
        found = zip(then(), otherwise, strict=True)
        return [self.where(condition, a, b) for a, b in found]
