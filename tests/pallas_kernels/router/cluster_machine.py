"""A `ClusterMachine` whose registers are numpy arrays, one element a thread of a whole cluster.

All threads go in step. So that a barrier that is missing is seen all the same, each word of shared
memory remembers who wrote it and when: to read another thread's word there must have been a barrier
since, or a full inbox if it was sent, and no word is written twice. Memory is numpy arrays; a load
or store outside of its array fails.
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
        self.time, self.inbox = np.zeros((ranks, size), int), np.full((ranks, size), -1)


class NumpyCluster:
    """The threads of a cluster of `ranks` blocks of `threads`; barrier number `missing` is none."""

    def __init__(self, threads, ranks, missing=None):
        self.threads, self.ranks, self.size = threads, ranks, threads * ranks
        self.every = np.arange(self.size)
        self.thread = reg((self.every % threads).astype(np.int32))
        self.rank = reg((self.every // threads).astype(np.int32))
        self.active = np.ones(self.size, bool)
        self.time, self.barriers, self.missing = 0, 0, missing
        self.sizes, self.received, self.met, self.warp_time = [], set(), False, 0
        self.stored, self.begun = -1, False

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

    def load_new(self, ref, index):
        return self.as_float(self.load(ref, index, 4, 1)[0])

    def store(self, ref, index, width, words, where):
        live = self.active & np.asarray(where)
        flat, at = self._places(ref, index, width, len(words), live)
        bits = np.stack([np.asarray(w).view(np.int32) for w in words], axis=1)
        flat[at[live]] = np.ascontiguousarray(bits).view(np.uint8)[live]
        self.stored = self.time

    def prefetch(self, ref, index, where):
        self._places(ref, index, 4, 1, np.asarray(where))

    # --- shared memory

    def load_shared(self, ref, index, count):
        found = np.zeros((self.size, count), np.float32)
        for thread in self.every[self.active]:
            for i in range(count):
                cell = int(self.rank[thread]), int(index[thread]) + i
                assert 0 <= cell[1] < ref.values.shape[1], "outside shared memory"
                self._check_order(ref, cell, thread)
                found[thread, i] = ref.values[cell]
        return [reg(found[:, i].copy()) for i in range(count)]

    def _check_order(self, ref, cell, thread):
        writer, inbox = ref.writer[cell], ref.inbox[cell]
        if inbox >= 0:
            assert (cell[0], inbox) in self.received, "sent and not received"
        elif writer not in (-1, thread):
            assert writer // self.threads == cell[0]
            same_warp = writer // 32 == thread // 32
            since = self.warp_time if same_warp else self.time
            assert ref.time[cell] < max(self.time, since), "no barrier between a store and a load"

    def store_shared(self, ref, index, values, where):
        for i, value in enumerate(values):
            self._store(ref, index + i, value, self.rank, where, -1)

    def _store(self, ref, index, value, rank, where, inbox):
        for thread in self.every[self.active & np.asarray(where)]:
            cell = int(rank[thread]), int(index[thread])
            assert 0 <= cell[1] < ref.values.shape[1], "outside shared memory"
            assert ref.writer[cell] == -1, "shared memory is written twice"
            ref.values[cell], ref.writer[cell] = value[thread], thread
            ref.time[cell], ref.inbox[cell] = self.time, inbox
            if inbox >= 0:
                self.sizes[inbox][cell[0]] -= 1

    def open_inboxes(self, told, sizes):
        assert self.active.all() and 2 * len(sizes) <= told.values.shape[1]
        self.sizes = [[size] * self.ranks for size in sizes]

    def begin(self):
        self.begun = True

    def meet_cluster(self):
        assert self.begun and self.active.all(), (
            "a barrier of the cluster that some threads do not come to"
        )
        self._meet(lambda: setattr(self, "met", True))

    def send(self, ref, index, value, rank, inbox, where):
        assert self.met, "a block may not have begun that something is sent to"
        self._store(ref, index, value, rank, where, inbox[1])

    def receive(self, inbox):
        ranks = set(np.asarray(self.rank)[self.active].tolist())
        assert all(self.sizes[inbox[1]][rank] == 0 for rank in ranks), (
            "waits for ever, or too short"
        )
        self._meet(lambda: self.received.update((rank, inbox[1]) for rank in ranks))

    def barrier(self):
        blocks = self.active.reshape(self.ranks, -1)
        assert (blocks.all(1) == blocks.any(1)).all(), "a barrier that some threads do not come to"
        self._meet(lambda: setattr(self, "time", self.time + 1))

    def meet_warp(self):
        self._meet(lambda: setattr(self, "warp_time", self.time + 1))

    def _meet(self, happens):
        if self.barriers != self.missing:
            happens()
        self.barriers += 1

    # --- lanes

    def _warps(self, value, function):
        assert self.active.reshape(-1, 32).all(1).any()
        found = function(np.asarray(value).reshape(-1, 32), axis=1)
        return reg(np.repeat(found, 32))

    def warp_max(self, value):
        return self._warps(value, np.max)

    def warp_min(self, value):
        return self._warps(value, np.min)

    def of_lane(self, value, lane):
        return self._warps(value, lambda rows, axis: rows[:, lane])

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
        assert self.stored < self.time, "no barrier between stores and their count"
        self.store_shared(flag, self.const(0), [self.const(1.0)], self.thread.equals(0))
        self.barrier()
        self.load_shared(flag, self.const(0), 1)
        before = int(counter[word])
        counter[word] = 0 if before >= blocks - 1 else before + 1
        return reg(np.full(self.size, before == blocks - 1))

    def repeat(self, count, step, carry):
        for i in range(int(count[0])):
            carry = step(self.const(i), carry)
        return carry

    def when(self, condition, then):
        held, self.active = self.active, self.active & np.asarray(condition)
        warps = self.active.reshape(-1, 32)
        assert (warps.all(1) == warps.any(1)).all(), "a warp of two minds"
        if self.active.any():
            then()
        self.active = held
