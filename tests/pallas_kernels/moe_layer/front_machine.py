"""A `FrontMachine` whose registers are numpy arrays, one element a thread of a block."""

import numpy as np
from cluster_machine import NumpyCluster
from numpy_threads import reg

SIGN = np.int32(-(2**31))


class NumpyFront(NumpyCluster):
    """The threads of a block that multiply; barrier number `missing` is none.

    `told` are the places of what was stored for other blocks.
    """

    def __init__(self, threads, missing=None):
        super().__init__(threads, ranks=1, missing=missing)
        self.told = []

    def times(self, a, b):
        pairs = zip(self.unpack(a), self.unpack(b), strict=True)
        return self.pack(*(reg(np.asarray(x) * np.asarray(y)) for x, y in pairs))

    def raised(self, word):
        return self.pack(*(reg(np.asarray(x) * np.float32(2.0**64)) for x in self.unpack(word)))

    def store_new(self, ref, index, word, where):
        self.store(ref, index, 4, [word], where)
        self.told += np.asarray(index)[np.asarray(where)].tolist()

    def await_marked(self, ref, index, count, pitch, mark):
        found = [self.load(ref, index, 4, 1, offset=pitch * i)[0] for i in range(count)]
        words = [np.asarray(word) ^ np.asarray(mark) for word in found]
        assert all((word[self.active] >= 0).all() for word in words), "waits for ever"
        return [reg(word) for word in words]
