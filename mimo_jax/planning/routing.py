"""How many experts a few tokens need, if each chooses its own uniformly: exact expectations."""

import math

import numpy as np


def distinct_experts(experts: int, choices: int, tokens: int) -> float:
    """How many different experts the tokens choose, in expectation.

    Args:
      experts: of a layer.
      choices: different experts that each token chooses.
      tokens: that choose.

    Example:
      >>> distinct_experts(384, 8, 1)
      8.0
    """
    return experts * (1.0 - (1.0 - choices / experts) ** tokens)


def busiest_device(experts: int, choices: int, tokens: int, devices: int) -> float:
    """Chosen experts of the device that has most of them, in expectation.

    Of all sets of as many experts, each is equally likely to be the chosen one. So the largest
    number on a device, of `experts / devices` whole ones each, follows from counting the sets that
    have at most m on any.

    Args:
      experts: of a layer; `devices` divides it.
      choices: different experts that each token chooses.
      tokens: that choose.
      devices: that hold them.
    """
    sizes = _union_sizes(experts, choices, tokens)
    most = int(np.flatnonzero(sizes)[-1])
    each = experts // devices
    expected = 0.0
    for bound in range(each):
        # The expectation is the sum of the probabilities that there are more than m on a device.
        within = _sets_within(bound, each, devices, most)
        share = [count / math.comb(experts, size) for size, count in enumerate(within)]
        expected += float(sizes[: most + 1] @ (1.0 - np.array(share)))
    return expected


def _sets_within(bound: int, each: int, devices: int, most: int) -> list[int]:
    """Sets of 0, 1, ..., `most` experts that have at most `bound` on every device."""
    one = np.array([math.comb(each, m) for m in range(min(bound, most) + 1)], dtype=object)
    sets = np.ones(1, dtype=object)
    for _ in range(devices):
        sets = np.convolve(sets, one)[: most + 1]
    return [*sets.tolist(), *[0] * (most + 1 - len(sets))]


def _union_sizes(experts: int, choices: int, tokens: int) -> np.ndarray:
    """Probability that the tokens choose 0, 1, ..., all different experts."""
    sizes = np.zeros(experts + 1)
    sizes[0] = 1.0
    ways = math.comb(experts, choices)
    for _ in range(tokens):
        after = np.zeros_like(sizes)
        for size in np.flatnonzero(sizes).tolist():
            for new in range(min(choices, experts - size) + 1):
                sets = math.comb(experts - size, new) * math.comb(size, choices - new)
                after[size + new] += sizes[size] * (sets / ways)
        sizes = after
    return sizes
