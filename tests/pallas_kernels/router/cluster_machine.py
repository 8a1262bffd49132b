"""A `ClusterMachine` whose registers are numpy arrays, one element a thread of a whole cluster.

All threads go in step. So that a barrier that is missing is seen all the same, each word of shared
memory remembers who wrote it and when: to read another thread's word there must have been a barrier
since, one of the cluster if it came from another block, and no word is written twice. Memory is
numpy arrays; a load or store outside of its array fails.
"""

import ml_dtypes
import numpy as np


class Shown(np.ndarray):
    """An array with a register's `equals`."""

    def equals(self, other):
        return np.equal(self, other).view(Shown)


def reg(values):
    return np.asarray(values).view(Shown)


class Shared:
    """An array in the shared memory of each block of a cluster."""

    def __init__(self, ranks, size):
        self.values = np.full((ranks, size), np.nan, np.float32)
        self.writer = np.full((ranks, size), -1)
        self.block_time, self.cluster_time = (np.zeros((ranks, size), int) for _ in range(2))


class NumpyCluster:
    """The threads of a cluster of `ranks` blocks of `threads`; barrier number `missing` is none."""

    def __init__(self, threads, ranks, missing=None):
        self.threads, self.ranks, self.size = threads, ranks, threads * ranks
        self.every = np.arange(self.size)
        self.thread = reg((self.every % threads).astype(np.int32))
        self.rank = reg((self.every // threads).astype(np.int32))
        self.active = np.ones(self.size, bool)
        self.times, self.barriers, self.missing = [0, 0], 0, missing

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
        assert np.asarray(index).dtype == np.int32
        flat = ref.reshape(-1).view(np.uint8)
        at = np.asarray(index, np.int64)[:, None] * width + np.arange(4 * words)
        assert ((at >= 0) & (at < flat.size))[live].all(), "outside its array"
        assert (at[live, 0] % (4 * words) == 0).all(), "not aligned"
        return flat, at

    def load(self, ref, index, width, words, where=None):
        live = self.active if where is None else self.active & np.asarray(where)
        flat, at = self._places(ref, index, width, words, live)
        found = flat[np.where(live[:, None], at, 0)] * live[:, None].astype(np.uint8)
        found = np.ascontiguousarray(found).view(np.int32).reshape(self.size, words)
        return [reg(found[:, i].copy()) for i in range(words)]

    def load_new(self, ref, index, where=None):
        return self.as_float(self.load(ref, index, 4, 1, where)[0])

    def store(self, ref, index, width, words, where):
        live = self.active & np.asarray(where)
        flat, at = self._places(ref, index, width, len(words), live)
        bits = np.stack([np.asarray(w).view(np.int32) for w in words], axis=1)
        flat[at[live]] = np.ascontiguousarray(bits).view(np.uint8)[live]

    # --- shared memory

    def load_shared(self, ref, index, count):
        found = np.zeros((self.size, count), np.float32)
        for thread in self.every[self.active]:
            for i in range(count):
                cell = int(self.rank[thread]), int(index[thread]) + i
                assert 0 <= cell[1] < ref.values.shape[1], "outside shared memory"
                writer = ref.writer[cell]
                if writer not in (-1, thread):
                    far = writer // self.threads != cell[0]
                    met = ref.cluster_time[cell] < self.times[1]
                    met = met or (not far and ref.block_time[cell] < self.times[0])
                    assert met, "no barrier between a store and a load"
                found[thread, i] = ref.values[cell]
        return [reg(found[:, i].copy()) for i in range(count)]

    def store_shared(self, ref, index, values, where):
        for i, value in enumerate(values):
            self.store_remote(ref, index + i, value, self.rank, where)

    def store_remote(self, ref, index, value, rank, where):
        for thread in self.every[self.active & np.asarray(where)]:
            cell = int(rank[thread]), int(index[thread])
            assert 0 <= cell[1] < ref.values.shape[1], "outside shared memory"
            assert ref.writer[cell] == -1, "shared memory is written twice"
            ref.values[cell], ref.writer[cell] = value[thread], thread
            ref.block_time[cell], ref.cluster_time[cell] = self.times

    def barrier(self, of_cluster=0):
        if self.barriers != self.missing:
            self.times = [self.times[0] + 1, self.times[1] + of_cluster]
        self.barriers += 1

    def cluster_barrier(self):
        assert self.active.all(), "a barrier of the cluster that some threads do not come to"
        self.barrier(1)

    # --- lanes

    def _warps(self, value, function):
        assert self.active.reshape(-1, 32).all(1).any()
        found = function(np.asarray(value).reshape(-1, 32), axis=1)
        return reg(np.repeat(found, 32))

    def warp_max(self, value):
        return self._warps(value, np.max)

    def warp_min(self, value):
        return self._warps(value, np.min)

    def warp_or(self, value):
        return self._warps(value, np.bitwise_or.reduce)

    def swap(self, value, mask):
        return reg(np.asarray(value)[self.every ^ mask])

    def multiply(self, a, b, c):
        def halves(words):
            bits = np.stack([np.asarray(w).view(np.uint32) for w in words], axis=-1)
            pairs = np.ascontiguousarray(bits)[..., None].view(np.uint16)
            wide = pairs.view(ml_dtypes.bfloat16).astype(np.float32)
            return wide.reshape(-1, 8, 4, len(words), 2)

        # Fragments: lane 4 g + q; A: (row half, column half) in the order 0, 2 | 1, 3.
        left = halves(a).reshape(-1, 8, 4, 2, 2, 2)
        left = left.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
        right = halves(b).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
        with np.errstate(all="ignore"):
            product = left @ right
        sums = product.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)
        return [reg((np.asarray(c[i]) + sums[:, i]).astype(np.float32)) for i in range(4)]

    # --- arithmetic

    def exp2(self, x):
        with np.errstate(over="ignore"):
            return reg(np.exp2(np.asarray(x)))

    def rsqrt(self, x):
        with np.errstate(divide="ignore"):
            return reg((1 / np.sqrt(np.asarray(x))).astype(np.float32))

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

    def bits(self, value):
        return reg(np.asarray(value).view(np.int32))

    # --- control

    def is_last(self, counter, word, blocks, flag):
        self.barrier()
        self.store_shared(flag, self.const(0), [self.const(1.0)], self.thread.equals(0))
        self.barrier()
        self.load_shared(flag, self.const(0), 1)
        before = int(counter[word])
        counter[word] = 0 if before >= blocks - 1 else before + 1
        return reg(np.full(self.size, before == blocks - 1))

    def when(self, condition, then):
        held, self.active = self.active, self.active & np.asarray(condition)
        for rank in range(self.ranks):
            own = self.active[rank * self.threads : (rank + 1) * self.threads]
            assert own.all() == own.any(), "a block of two minds"
        if self.active.any():
            then()
        self.active = held
