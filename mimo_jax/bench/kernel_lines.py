"""Time lines of the expert kernel: what its stamps mean, and when."""

from typing import Any

import numpy as np

EVENTS = {
    "finisher": ("begins", "gate/up done", "down done", "grid met", "sum done"),
    "producer": ("begins", "list known", "gate/up issued", "down issued"),
    "consumer": ("first stage there", "gate/up done", "down done"),
}
"""What a time line's stamps mean, by role, in the kernel's numbering."""


def read_stamps(stamps: np.ndarray) -> dict[str, Any]:
    """Nanoseconds since the first block began, by role and event, and all of them by block.

    The device's time says when a block began, and its SM's clocks how long after that an event
    came: the device's time may go by steps of a microsecond.

    Args:
      stamps: [blocks, warpgroups, events, (nanoseconds of the device, clocks of the SM)].
    """
    groups = stamps.shape[1]
    places = {"consumer": 0, "finisher": groups - 2, "producer": groups - 1}
    began = stamps[:, places["finisher"], 0]
    ended = stamps[:, places["finisher"], EVENTS["finisher"].index("down done")]
    nanoseconds, clocks = ((ended - began) % 2**32).sum(axis=0)
    found: dict[str, Any] = {"GHz": float(clocks / nanoseconds), "events": {}, "blocks": {}}
    for role, place in places.items():
        for number, event in enumerate(EVENTS[role]):
            # Events of other warpgroups may come before the finisher begins.
            later = (stamps[:, place, number, 1] - began[:, 1] + 2**31) % 2**32 - 2**31
            since = began[:, 0] - began[:, 0].min() + later * nanoseconds / clocks
            found["events"][f"{role}: {event}"] = {
                name: float(function(since))
                for name, function in (("first", np.min), ("median", np.median), ("last", np.max))
            }
            found["blocks"][f"{role}: {event}"] = [round(float(value)) for value in since]
    return found
