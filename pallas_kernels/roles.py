"""The roles of a streaming kernel's warpgroups, and each one's share of the registers."""

import typing
from typing import Any

from jax import lax

PRODUCER_REGISTERS = 24


def consumer_registers(groups: int, finisher: int) -> int:
    """Of a thread that multiplies, in so many warpgroups: what a launch gives, less the others'."""
    launched = 65536 // (128 * (groups + 2)) // 8 * 8 * (groups + 2)
    return min(232, (launched - PRODUCER_REGISTERS - finisher) // groups // 8 * 8)


@typing.runtime_checkable
class Roles(typing.Protocol):
    """A block of `consumers` warpgroups that multiply and one that copies."""

    consumers: int

    def produce(self, refs: dict[str, Any]) -> None:
        """Copies what the others work on into the ring of stages."""

    def consume(self, refs: dict[str, Any]) -> None:
        """Multiplies stage after stage; leaves sums to a finisher, if there is one."""


@typing.runtime_checkable
class FinishingRoles(Roles, typing.Protocol):
    """The same with a warpgroup that finishes."""

    def finish(self, refs: dict[str, Any]) -> None:
        """Adds up sums and writes results."""


def run_roles(
    block: Roles | FinishingRoles,
    refs: dict[str, Any],
    consumer: int,
    finisher: int | None = None,
    producer: int = PRODUCER_REGISTERS,
) -> None:
    """Each warpgroup takes its role: the first ones consume, then one may finish, one produces.

    Args:
      block: the roles.
      refs: memory by name.
      consumer: registers of a consumer's thread.
      finisher: of a finisher's; None without one.
      producer: of a producer's.
    """
    # Loaded with the first kernel: this module also tells plans what a producer takes.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    role, groups = lax.axis_index("wg"), block.consumers

    @pl.when(role == groups + (finisher is not None))
    def _():
        plgpu.set_max_registers(producer, action="decrease")
        block.produce(refs)

    if finisher is not None:

        @pl.when(role == groups)
        def _():
            plgpu.set_max_registers(finisher, action="decrease")
            block.finish(refs)

    @pl.when(role < groups)
    def _():
        plgpu.set_max_registers(consumer, action="increase")
        block.consume(refs)
