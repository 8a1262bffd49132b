"""A `Machine` whose registers are numpy arrays, one element a thread: runs lane code on a CPU.

All threads go in step, so that a barrier has nothing to do: a barrier that is missing is not seen.
"""

import numpy as np
from numpy_threads import NumpyThreads, reg


class NumpyMachine(NumpyThreads):
    """The threads of one block; its shared memory is plain arrays of float32.

    What `awaited` has, pairs of arrays, comes from the second to the first with `wait`.
    """

    def __init__(self, threads: int, awaited=()):
        super().__init__(threads)
        self.awaited = awaited
        self.threads = threads
        self.thread = reg(self.every.astype(np.int32))

    def load_shared(self, ref, index, count):
        return [self.as_float(word) for word in self.load(ref, index, 4, count)]

    def store_shared(self, ref, index, values, where):
        self.store(ref, index, 4, values, where)

    def barrier(self):
        pass

    def wait(self):
        for place, values in self.awaited:
            place[...] = values

    def load_either(self, condition, one, other, width, words, offset=0):
        found = [
            self.load(ref, index, width, words, where, offset=offset)
            for (ref, index), where in ((one, condition), (other, ~condition))
        ]
        return [self.where(condition, a, b) for a, b in zip(*found, strict=True)]

    def to_float(self, value):
        return reg(np.asarray(value).astype(np.float32))

    def any(self, condition):
        return reg(np.repeat(np.asarray(condition).reshape(-1, 32).any(axis=1), 32))

    def branch(self, condition, then, otherwise):
        """Both ways are taken: what `then` stores must have conditions of its own."""
        whole = np.asarray(condition).reshape(-1, 32)
        assert (whole.all(axis=1) | ~whole.any(axis=1)).all(), "a warp that takes both ways"
        found = zip(then(), otherwise, strict=True)
        return [self.where(condition, a, b) for a, b in found]
