"""A `ClusterMachine` whose registers are numpy arrays, one element a thread of a whole cluster.

So that a barrier that is missing is seen, though all threads go in step, each word of shared memory
remembers who wrote it and when: to read another thread's word there must have been a barrier since,
or a full inbox if it was sent, and no word is written twice.
"""

import numpy as np
from numpy_threads import NumpyThreads, reg


class Shared:
    """An array in the shared memory of each block of a cluster."""

    def __init__(self, ranks, size):
        self.values = np.full((ranks, size), np.nan, np.float32)
        self.writer = np.full((ranks, size), -1)
        self.time, self.inbox = np.zeros((ranks, size), int), np.full((ranks, size), -1)


class NumpyCluster(NumpyThreads):
    """The threads of a cluster of `ranks` blocks of `threads`; barrier number `missing` is none."""

    def __init__(self, threads, ranks, missing=None):
        super().__init__(threads * ranks)
        self.threads, self.ranks = threads, ranks
        self.thread = reg((self.every % threads).astype(np.int32))
        self.rank = reg((self.every // threads).astype(np.int32))
        self.time, self.barriers, self.missing = 0, 0, missing
        self.sizes, self.received, self.met, self.warp_time = [], set(), False, 0
        self.stored, self.begun = -1, False

    # --- global memory

    def load_new(self, ref, index):
        return self.as_float(self.load(ref, index, 4, 1)[0])

    def store(self, ref, index, width, words, where):
        super().store(ref, index, width, words, where)
        self.stored = self.time

    def prefetch(self, ref, index, width, where):
        self._places(ref, index, width, 1, np.asarray(where))

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

    # --- arithmetic

    def exp2(self, x):
        with np.errstate(over="ignore"):
            return super().exp2(x)

    def rsqrt(self, x):
        with np.errstate(divide="ignore"):
            return reg((1 / np.sqrt(np.asarray(x))).astype(np.float32))

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

    def when(self, condition, then):
        held, self.active = self.active, self.active & np.asarray(condition)
        warps = self.active.reshape(-1, 32)
        assert (warps.all(1) == warps.any(1)).all(), "a warp of two minds"
        if self.active.any():
            then()
        self.active = held
