"""A mailbox: where a device's threads find what the other devices' threads send them."""

import dataclasses

MOST_BYTES = 16 * 6144 * 4
"""Of an array, by default: 16 tokens of the widest model in float32."""
MOST_DEVICES = 8
EMPTY = 0xFFFFFFFF
"""A word that nobody sends."""
THREADS = 128
"""Of a thread block."""
WORDS = 4
"""Of a slot: what one thread sends to one device, 16 bytes."""
RANK = 16
"""The word that holds the device's rank; before it are the addresses of all mailboxes."""
_HEADER = 64
PHASES = 2


@dataclasses.dataclass(frozen=True)
class Mail:
    """The words of a mailbox.

    Header: the addresses of `devices` mailboxes, 64 bits each, the next rank's first and this
    device's last; the rank. Then for each thread, of all thread blocks, how often it has exchanged.
    Then slots: one for each phase, sender and thread.

    Attributes:
      devices: that exchange.
      threads: of all blocks, at most.
    """

    devices: int
    threads: int

    @classmethod
    def holding(cls, devices: int, most_bytes: int) -> "Mail":
        """For arrays of at most so many bytes."""
        blocks = -(-most_bytes // (4 * WORDS * THREADS))
        return cls(devices, blocks * THREADS)

    @classmethod
    def of(cls, words: int, devices: int) -> "Mail":
        """The mailbox that has so many words."""
        threads, rest = divmod(words - _HEADER, 1 + PHASES * devices * WORDS)
        if rest or threads < THREADS or threads % THREADS:
            raise ValueError(f"{words} words are no mailbox of {devices} devices.")
        return cls(devices, threads)

    @property
    def counts(self) -> int:
        """The first thread's count."""
        return _HEADER

    @property
    def slots(self) -> int:
        """The first slot's first word."""
        return _HEADER + self.threads

    @property
    def words(self) -> int:
        """Of the whole mailbox."""
        return self.slots + PHASES * self.devices * self.threads * WORDS

    def slot(self, phase: int, sender: int, thread: int) -> int:
        """The first word of a slot."""
        place = (phase * self.devices + sender) * self.threads + thread
        return self.slots + WORDS * place
