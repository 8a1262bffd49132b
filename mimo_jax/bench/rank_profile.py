"""Device time of a round by its parts: the profiler's kernels laid beside the compiled program.

Kernels are known by the names of the instructions that they were made for, and instructions with
the same text share one: a kernel's n-th run in a round belongs to the n-th of them. Kernels of
libraries and copies have names of their own: their place among the others tells what they are for.
"""

import collections
import dataclasses
import glob
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mimo_jax.bench.hlo import GROUPS, Launch

OPTIONS = {"xla_enable_command_buffers_during_profiling": True}
"""XLA's compiler option without which it leaves CUDA graphs off while it is profiled."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A kernel's run: its name, begin and duration in microseconds."""

    name: str
    begin: float
    us: float


def record(function: Callable[[], Any]) -> list[Event]:
    """What the GPU, the first of several, ran for a call, in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(function())
        events = []
        for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
            for plane in jax.profiler.ProfileData.from_file(path).planes:
                for line in plane.lines if plane.name.endswith("GPU:0") else ():
                    if "Stream" in line.name:
                        events += [
                            Event(e.name, e.start_ns / 1e3, e.duration_ns / 1e3)
                            for e in line.events
                        ]
    return sorted(events, key=lambda event: event.begin)


def split(events: Sequence[Event], launches: Sequence[Launch], rounds: int) -> dict[str, Any]:
    """Microseconds of a round by part, and how sure that is.

    Args:
      events: of whole rounds, in the order of time.
      launches: of a round, in the order of the program.
      rounds: that were recorded.

    Returns:
      "us" by group; "kernels" a round; "launches" that the program has; "busy_us", a round's time
      in which some kernel ran; "span_us", from a round's first to its last; "unsure_us", of kernels
      whose runs are not as many as the program's launches; "names", the most expensive kernels:
      name, group, runs and microseconds a round.
    """
    places = _places(events, launches, rounds)
    us = dict.fromkeys(GROUPS, 0.0)
    names: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    unsure = 0.0
    for event, (launch, sure) in zip(events, places, strict=True):
        group = launch.group if launch else GROUPS[-1]
        us[group] += event.us / rounds
        unsure += 0.0 if sure else event.us / rounds
        names[event.name, group].append(event.us)
    top = sorted(names.items(), key=lambda item: -sum(item[1]))[:40]
    return {
        "us": us,
        "kernels": len(events) / rounds,
        "launches": len(launches),
        "busy_us": _busy(events) / rounds,
        "span_us": (max(e.begin + e.us for e in events) - events[0].begin) / rounds,
        "unsure_us": unsure,
        "names": [
            [name, group, len(times) / rounds, sum(times) / rounds] for (name, group), times in top
        ],
    }


def _places(events, launches, rounds) -> list[tuple[Launch | None, bool]]:
    """Each event's launch, and whether that is sure."""
    classes: dict[str, list[int]] = collections.defaultdict(list)
    of_name: dict[str, str] = {}
    for index, launch in enumerate(launches):
        classes[launch.same].append(index)
        of_name[_plain(launch.name)] = launch.same
        if launch.kind.startswith("mosaic"):
            of_name[_plain(launch.same)] = launch.same
    kinds = [_class_of(event.name, of_name) for event in events]
    runs = collections.Counter(kinds)
    seen: collections.Counter = collections.Counter()
    matched: list[int | None] = []
    for kind in kinds:
        matched.append(None if kind is None else classes[kind][seen[kind] % len(classes[kind])])
        seen[kind] += 1
    found: list[tuple[Launch | None, bool]] = []
    for kind, index in zip(kinds, _filled(matched, launches, runs), strict=True):
        sure = kind is not None and runs[kind] == rounds * len(classes[kind])
        found.append((None if index is None else launches[index], sure))
    return found


def _filled(matched: list[int | None], launches, runs) -> list[int | None]:
    """Indices of launches, those of events without a known name guessed from their neighbours'.

    Such an event belongs to the next launch of which no kernel is known, if it comes before that of
    the next known event; else to the one before.
    """
    unknown = [i for i, launch in enumerate(launches) if launch.same not in runs]
    bounds: list[int] = []
    bound = len(launches)
    for index in reversed(matched):
        bound = bound if index is None else index
        bounds.append(bound)
    filled: list[int | None] = []
    last = -1
    for index, bound in zip(matched, reversed(bounds), strict=True):
        if index is None:
            here = [i for i in unknown if last < i < bound]
            if bound <= last:
                # The next known event is of the next round.
                here = [i for i in unknown if i > last] + [i for i in unknown if i < bound]
            last = here[0] if here else last
            filled.append(last if last >= 0 else None)
        else:
            last = index
            filled.append(index)
    return filled


def _class_of(name: str, of_name: dict[str, str]) -> str | None:
    """The instructions that a kernel may belong to; None for those of libraries and copies."""
    plain = _plain(name)
    if plain in of_name:
        return of_name[plain]
    # A Mosaic kernel's name may have something around it.
    held = [same for known, same in of_name.items() if known in plain and known == _plain(same)]
    return held[0] if held else None


def _plain(name: str) -> str:
    return re.sub(r"[.\-]", "_", name)


def _busy(events: Sequence[Event]) -> float:
    """Microseconds in which at least one kernel ran."""
    total = end = 0.0
    for event in events:
        begin = max(event.begin, end)
        total += max(0.0, event.begin + event.us - begin)
        end = max(end, event.begin + event.us)
    return total
