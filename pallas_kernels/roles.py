"""The roles of a streaming kernel's warpgroups, and each one's share of the registers."""

import typing
from typing import Any

from jax import lax

PRODUCER_REGISTERS = 24


@typing.runtime_checkable
class Roles(typing.Protocol):
    """A block of `consumers` warpgroups that multiply, one that finishes and one that copies."""

    consumers: int

    def produce(self, refs: dict[str, Any]) -> None:
        """Copies what the others work on into the ring of stages."""

    def consume(self, refs: dict[str, Any]) -> None:
        """Multiplies stage after stage, and leaves sums."""

    def finish(self, refs: dict[str, Any]) -> None:
        """Adds up sums and writes results."""


def run_roles(block: Roles, refs: dict[str, Any], consumer: int, finisher: int) -> None:
    """Each warpgroup takes its role: the first ones consume, then one finishes, one produces.

    Args:
      block: the roles.
      refs: memory by name.
      consumer: registers of a consumer's thread.
      finisher: of a finisher's.
    """
    # Loaded with the first kernel: this module also tells plans what a producer takes.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    role, groups = lax.axis_index("wg"), block.consumers

    @pl.when(role == groups + 1)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        block.produce(refs)

    @pl.when(role == groups)
    def _():
        plgpu.set_max_registers(finisher, action="decrease")
        block.finish(refs)

    @pl.when(role < groups)
    def _():
        plgpu.set_max_registers(consumer, action="increase")
        block.consume(refs)
