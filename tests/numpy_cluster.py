"""A machine of clusters whose registers are numpy arrays, one element a thread of a whole cluster.

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

    def store(self, ref, index, width, words, where, offset=0):
        super().store(ref, index, width, words, where, offset)
        self.stored = self.time

    def prefetch(self, ref, index, width, where):
        self._places(ref, index, width, 1, np.asarray(where))

    # --- shared memory

    def load_shared(self, ref, index, count):
        threads = self.every[self.active]
        found = np.zeros((self.size, count), np.float32)
        for i in range(count):
            cells = self._cells(ref, self.rank, index + i, threads)
            self._check_order(ref, cells, threads)
            found[threads, i] = ref.values[cells]
        return [reg(found[:, i].copy()) for i in range(count)]

    def _cells(self, ref, rank, index, threads):
        """Block and place of each thread's word."""
        place = np.asarray(index)[threads]
        assert ((place >= 0) & (place < ref.values.shape[1])).all(), "outside shared memory"
        return np.asarray(rank)[threads], place

    def _check_order(self, ref, cells, threads):
        writer, inbox = ref.writer[cells], ref.inbox[cells]
        told = set(zip(cells[0][inbox >= 0].tolist(), inbox[inbox >= 0].tolist(), strict=True))
        assert told <= self.received, "sent and not received"
        theirs = (inbox < 0) & (writer != -1) & (writer != threads)
        assert (writer // self.threads == cells[0])[theirs].all()
        warp_time = max(self.time, self.warp_time)
        since = np.where(writer // 32 == threads // 32, warp_time, self.time)
        assert (ref.time[cells] < since)[theirs].all(), "no barrier between a store and a load"

    def store_shared(self, ref, index, values, where):
        for i, value in enumerate(values):
            self._store(ref, index + i, value, self.rank, where, -1)

    def _store(self, ref, index, value, rank, where, inbox):
        threads = self.every[self.active & np.asarray(where)]
        cells = self._cells(ref, rank, index, threads)
        once = len(set(zip(*(x.tolist() for x in cells), strict=True))) == len(threads)
        assert once and (ref.writer[cells] == -1).all(), "shared memory is written twice"
        ref.values[cells], ref.writer[cells] = np.asarray(value)[threads], threads
        ref.time[cells], ref.inbox[cells] = self.time, inbox
        if inbox >= 0:
            for block, count in zip(*np.unique(cells[0], return_counts=True), strict=True):
                self.sizes[inbox][block] -= count

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

    def send(self, ref, index, values, rank, inbox, where):
        assert self.met, "a block may not have begun that something is sent to"
        for i, value in enumerate(values):
            self._store(ref, index + i, value, rank, where, inbox[1])

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

    def branch(self, condition, then, otherwise):
        found = []
        self.when(condition, lambda: found.extend(then()))
        return [
            self.where(condition, *pair) for pair in zip(found or otherwise, otherwise, strict=True)
        ]
