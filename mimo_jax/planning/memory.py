"""The refusal of what cannot fit, before anything is loaded."""

import os
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from mimo_jax.decode.program import Plan, Settings
from mimo_jax.errors import MimoError
from mimo_jax.planning.groups import gigabytes
from mimo_jax.planning.sizes import abstract_mesh, longest_context, needs, total
from mimo_jax.sharding import AnyMesh

MOST_DEVICES = 64


def check_memory(
    remake: Callable[[AnyMesh], Plan], mesh: Mesh, settings: Settings, others: tuple[str, ...] = ()
) -> Plan:
    """Makes a plan for a mesh, and refuses it if its devices cannot hold it.

    Args:
      remake: makes the plan for a mesh, to find out too how many devices would do.
      mesh: where the model is to be loaded.
      settings: of the program that is sure to run.
      others: other ways to need less, for the error.

    Returns:
      the plan.

    Raises:
      MimoError: with the sizes, and with what would fit.
    """
    placed = remake(mesh)
    memory, whose = device_memory(mesh)
    if memory is None:
        return placed
    parts = needs(placed, settings)
    if total(parts) <= memory:
        return placed
    longest = longest_context(placed, settings, memory)
    devices = _enough_devices(remake, placed.shards, settings, memory)
    ways = [f"load with max_len={longest} or less"] if longest >= 2 else []
    ways += [f"use {devices} devices like these"] if devices else []
    ways += others
    if mesh.devices.flat[0].platform != "cpu":
        ways.append("let JAX use more of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION, .75 at first)")
    sizes = ", ".join(f"{name} {gigabytes(sum(part.values()))}" for name, part in parts.items())
    raise MimoError(
        f"This model needs {gigabytes(total(parts))} on each of {placed.shards} device(s) for "
        f"max_len={settings.max_len} ({sizes}), but {whose} has {gigabytes(memory)}. "
        f"What would fit: {'; '.join(ways) or 'devices with more memory'}."
    )


def check_state(placed: Plan, settings: Settings) -> None:
    """Refuses a state of sequences that the devices have no room for beside the loaded weights.

    Args:
      placed: the model's plan, on the mesh where it is.
      settings: of the program: batch, length, block.

    Raises:
      MimoError: with the sizes.
    """
    memory, whose = device_memory(placed.mesh)
    if memory is None:
        return
    parts = needs(placed, settings)
    weights = sum(parts.pop("weights").values())
    # A GPU says what is free, with the weights there; a machine how much it has in all.
    room = memory - weights if placed.mesh.devices.flat[0].platform == "cpu" else memory
    if total(parts) > room:
        raise MimoError(
            f"{settings.batch} sequence(s) of max_len={settings.max_len} need "
            f"{gigabytes(total(parts))} on each of {placed.shards} device(s), but {whose} has "
            f"{gigabytes(max(room, 0))} left: answer fewer at a time, close sessions, or load with "
            "a smaller max_len."
        )


def device_memory(mesh: Mesh) -> tuple[int | None, str]:
    """Bytes that each device of a mesh may use now, and whose they are; None if nobody says."""
    first = mesh.devices.flat[0]
    if first.platform == "cpu":
        # Virtual devices share the machine's memory.
        count = mesh.devices.size
        whose = "this machine" if count == 1 else f"1/{count} of this machine, which they share,"
        return host_memory() // count, whose
    stats = first.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None, ""
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0), f"{first.device_kind} {first.id}"


def host_memory() -> int:
    """Bytes of this machine's memory, or of the container's, if they are fewer."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory


def _enough_devices(remake, shards: int, settings: Settings, memory: int) -> int | None:
    """The least power of two of devices with that much memory each that would do."""
    devices = 2 * shards
    while devices <= MOST_DEVICES:
        try:
            if total(needs(remake(abstract_mesh(devices)), settings)) <= memory:
                return devices
        except MimoError:  # They cannot divide the model.
            pass
        devices *= 2
    return None
