"""A thread block's shared memory, as Pallas divides it."""

_BEGIN = 1024


def shared_bytes(*sizes: int) -> int:
    """What arrays of so many bytes take: Pallas begins each at a multiple of 1024."""
    return sum(-(-size // _BEGIN) * _BEGIN for size in sizes)
