"""Time lines of the expert kernel: what its stamps mean, and when."""

from typing import Any

import numpy as np

EVENTS = {
    "finisher": ("begins", "gate/up done", "grid met", "down done", "grid met again", "sum done"),
    "producer": ("begins", "list known", "gate/up issued", "down issued"),
    "consumer": ("gate/up begins", "gate/up done", "down begins", "down done"),
}
"""What a time line's stamps mean, by role, in the kernel's numbering."""


def read_stamps(stamps: np.ndarray) -> dict[str, Any]:
    """Nanoseconds since the first block began, by role and event, and all of them by block.

    Args:
      stamps: [blocks, warpgroups, events, (nanoseconds of the device, clocks of the SM)].
    """
    groups = stamps.shape[1]
    places = {"consumer": 0, "finisher": groups - 2, "producer": groups - 1}
    start = min(stamps[:, places[role], 0, 0].min() for role in ("finisher", "producer"))
    found: dict[str, Any] = {"events": {}, "blocks": {}}
    for role, place in places.items():
        for number, event in enumerate(EVENTS[role]):
            since = stamps[:, place, number, 0] - start
            found["events"][f"{role}: {event}"] = {
                name: float(function(since))
                for name, function in (("first", np.min), ("median", np.median), ("last", np.max))
            }
            found["blocks"][f"{role}: {event}"] = since.tolist()
    return found
