"""How a few-token linear is cut: rows and columns among thread blocks, warps and copies.

Nothing here depends on the number of tokens: the plan is the order in which a row's products are
added, and so its bits.
"""

import dataclasses
import functools
import math

from pallas_kernels.roles import consumer_registers
from pallas_kernels.shared_memory import shared_bytes

SEGMENT = 128
"""Columns whose products are summed by themselves; FP8's tiles are as wide."""
TILE = 8
"""Rows of the weights that a warp multiplies at a time."""
_SHARED_BYTES = 226 * 1024
"""Of 227 KB that a thread block can have; the rest is for barriers."""
_MOST_STAGES = 16
_MOST_COLUMNS = 512
"""Of a warp's slice: 8 rows of x are then 64 registers."""
_OTHER_REGISTERS = 48
"""Of a warp that multiplies, besides x."""
FINISHER_REGISTERS = 48


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a matrix of `rows` x `columns` is cut.

    The columns are divided among `split` thread blocks; each block's come in `parts`, and each part
    is divided among `warps` warps: a warp's slice is a piece of each part. The rows are divided
    among groups of `split` blocks, evenly; the last group may share rows with the one before, which
    both then write. A *step* is 8 x `tiles` rows, a *stage* one part of a step for all warps: one
    copy.

    Attributes:
      rows: outputs.
      columns: inputs.
      itemsize: bytes of a weight: 2 for bfloat16, 1 for FP8.
      split: blocks that share the rows of a group.
      warps: that multiply, a multiple of 4.
      parts: of a block's columns. With one, and no split, a stage is contiguous.
      tiles: of 8 rows, in a step.
      ctas: thread blocks, at most; a multiple of `split`.
    """

    rows: int
    columns: int
    itemsize: int
    split: int = 1
    warps: int = 12
    parts: int = 1
    tiles: int = 1
    ctas: int = 132

    def __post_init__(self):
        if (misfit := self.misfit()) is not None:
            raise ValueError(f"{self} cannot be: {misfit}.")

    def misfit(self) -> str | None:
        """Why a matrix cannot be cut like this, or None."""
        cuts = self.split * self.warps * self.parts
        whole = 64 // self.itemsize  # Columns of one load of 16 bytes by each of 4 lanes.
        if self.warps % 4 or self.warps > 24:
            return f"{self.warps} warps are not a multiple of 4, at most 24"
        if self.ctas % self.split:
            return f"{self.ctas} blocks are not a multiple of {self.split}"
        if self.columns % (cuts * whole):
            return f"{self.columns} columns are not {cuts} pieces of a multiple of {whole}"
        columns = self.part_columns
        if self.itemsize == 1 and columns % SEGMENT and SEGMENT % columns:
            return f"pieces of {columns} columns cross borders of tiles of {SEGMENT}"
        if self.parts * self.tiles > 8:
            return f"{self.parts} parts of {self.tiles} tiles are more than 8 loops to unroll"
        if not self.tokens:
            return f"8 rows of {self.slice_columns} columns are too many registers"
        if self.stages < min(2, self.copies):
            return f"a stage is {self.stage_bytes} bytes, and two do not fit shared memory"
        return None

    @property
    def slice_columns(self) -> int:
        """Columns of a warp."""
        return self.columns // (self.split * self.warps)

    @property
    def part_columns(self) -> int:
        """Columns of a warp in one stage."""
        return self.slice_columns // self.parts

    @property
    def segment(self) -> int:
        """Columns of a partial sum, which FP8's scale multiplies."""
        return math.gcd(SEGMENT, self.part_columns)

    @property
    def segments(self) -> int:
        """Of a slice."""
        return self.slice_columns // self.segment

    @property
    def block_rows(self) -> int:
        """Rows of a thread block."""
        return -(-self.rows // (self.ctas // self.split))

    @property
    def groups(self) -> int:
        """Groups of blocks with rows of their own."""
        return -(-self.rows // self.block_rows)

    @property
    def step_rows(self) -> int:
        """Rows of a step."""
        return TILE * self.tiles

    @property
    def steps(self) -> int:
        """Of a block."""
        return -(-self.block_rows // self.step_rows)

    @property
    def last_rows(self) -> int:
        """Rows of a block's last step."""
        return self.block_rows - (self.steps - 1) * self.step_rows

    @property
    def copies(self) -> int:
        """Stages that a block copies in all."""
        return self.steps * self.parts

    @property
    def stage_shape(self) -> tuple[int, int, int]:
        """Rows, warps, columns."""
        return self.step_rows, self.warps, self.part_columns

    @property
    def stage_bytes(self) -> int:
        """Of shared memory."""
        return self.step_rows * self.warps * self.part_columns * self.itemsize

    @property
    def sums_floats(self) -> int:
        """Of a buffer of sums of a step, for 16 tokens."""
        return self.tiles * self.warps * 32 * 4

    @property
    def stages(self) -> int:
        """Of the ring: all that a block copies, or what fits."""
        norm = 2 * self.columns + 2048  # Of a norm, if there is one.
        left = _SHARED_BYTES - 2 * 4 * self.sums_floats - norm * (self.split == 1)
        return min(self.copies, _MOST_STAGES, left // shared_bytes(self.stage_bytes))

    @property
    def once(self) -> bool:
        """Whether all copies of a block fit the ring, so that none has to wait."""
        return self.stages == self.copies

    @property
    def contiguous(self) -> bool:
        """Whether a stage is contiguous in memory."""
        return self.split == 1 and self.parts == 1

    @property
    def registers(self) -> int:
        """Of a thread that multiplies."""
        return consumer_registers(self.warps // 4, FINISHER_REGISTERS)

    @property
    def tokens(self) -> int:
        """Rows of x in a launch at most, by the registers that they take: 0, 8 or 16."""
        eights = (self.registers - _OTHER_REGISTERS) // (self.slice_columns // 8)
        return 8 * min(2, max(0, eights))


MEASURED: dict[tuple[int, int, int], tuple[int, int, int, int]] = {
    (3392, 6144, 1): (1, 12, 2, 1),  # 18.0 us instead of 18.8
    (6144, 2048, 2): (1, 16, 1, 2),  # 15.6 instead of 17.4
    (4096, 6144, 2): (1, 12, 4, 1),  # 26.1 instead of 27.5
    (768, 30720, 2): (12, 20, 1, 1),  # 23.5 instead of 29.7
}
"""Rows, columns, bytes of a weight: split, warps, parts and tiles that were faster than by the
rule, on an H100 (27 November 2026; microseconds of a layer of the benchmark, glue included)."""


@functools.cache
def plan_for(rows: int, columns: int, itemsize: int) -> Plan | None:
    """The plan of a matrix: what was measured, or by a rule; None if there is none.

    By the rule it has as few splits as registers allow, and stages of at most 48 KB, where they can
    be; of several tiles if they are then at most 16 KB.
    """
    if (cut := MEASURED.get((rows, columns, itemsize))) is not None:
        return Plan(rows, columns, itemsize, *cut)
    for split in (1, 2, 3, 4, 6, 12):
        for warps in (12, 20, 16, 8, 4):
            for limit in (48 << 10, 1 << 20):
                for parts in (1, 2, 3, 4):
                    plan = _try(rows, columns, itemsize, split, warps, parts)
                    if plan is not None and plan.stage_bytes <= limit:
                        return _taller(plan)
    return None


def _try(*cut) -> Plan | None:
    try:
        plan = Plan(*cut)
    except ValueError:
        return None
    return plan if plan.slice_columns <= _MOST_COLUMNS else None


def _taller(plan: Plan) -> Plan:
    """With several tiles a step, where stages are small and a block's rows are as many."""
    for tiles in (2, 4):
        if tiles * TILE > plan.block_rows + TILE or 2 * plan.stage_bytes > 1 << 14:
            break
        plan = dataclasses.replace(plan, tiles=tiles)
    return plan
