"""A `Machine` whose registers are numpy arrays, one element a thread: runs lane code on a CPU.

All threads go in step, so that a barrier has nothing to do: a barrier that is missing is not seen.
"""

import numpy as np
from numpy_threads import NumpyThreads, reg


class NumpyMachine(NumpyThreads):
    """The threads of one block; its shared memory is plain arrays of float32."""

    def __init__(self, threads: int, waited=None):
        super().__init__(threads)
        self.waited = waited
        self.threads = threads
        self.thread = reg(self.every.astype(np.int32))

    def load_shared(self, ref, index, count):
        return [self.as_float(word) for word in self.load(ref, index, 4, count)]

    def store_shared(self, ref, index, values, where):
        self.store(ref, index, 4, values, where)

    def barrier(self):
        pass

    def wait(self):
        """What is waited for happens only now."""
        self.waited()

    def publish(self, ref, index, words, where):
        assert all((np.asarray(word) != -1).all() for word in words), "a word that says nothing"
        self.store(ref, index, 4, [reg(~np.asarray(word)) for word in words], where)

    def await_words(self, ref, indices):
        found = [self.load(ref, index, 4, 4) for index in indices]
        assert all((np.asarray(w) != 0).all() for words in found for w in words), "it would hang"
        return [[reg(~np.asarray(word)) for word in words] for words in found]

    def load_shared_words(self, ref, index, words, where=None, other=None):
        return self.load(ref, index, 4, words, where, other)

    def store_shared_words(self, ref, index, words):
        self.store(ref, index, 4, words, self.every >= 0)

    def exclusive_or(self, a, b):
        return reg(np.asarray(a) ^ np.asarray(b))

    def copy(self, target, to, source, index, where):
        self.store(target, to, 4, self.load(source, index, 2, 4, where), where)

    def await_copies(self):
        pass

    def meet_warp(self):
        pass

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
