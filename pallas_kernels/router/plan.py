"""How the router is cut: experts among clusters of thread blocks, columns among a cluster's blocks.

Nothing here depends on the number of tokens: the plan is the order in which a row's products are
added, and so its bits.
"""

import dataclasses
import functools

TILE = 8
"""Experts that a warp multiplies at a time."""
PIECE = 32
"""Columns that a warp loads at a time: 8, one load of 16 bytes, for each of 4 lanes."""
_CLUSTERS = 16
"""With 8 blocks each they fill an H200, whose clusters lie within a group of 16 or 18 SMs."""
_LEAST_COLUMNS = 512
"""Of a block: fewer are not worth a cluster."""
_MOST_COLUMNS = 128
"""Of a warp: its weights are held in registers."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where weights of `experts` rows and `columns` columns are cut.

    Attributes:
      experts: rows.
      columns: of a row.
      ranks: thread blocks of a cluster, each of which has as many columns.
      warps: of a block, likewise; a multiple of 4.
      tiles: of 8 experts, that a cluster has.
    """

    experts: int
    columns: int
    ranks: int
    warps: int
    tiles: int

    def __post_init__(self):
        if self.columns % (self.ranks * self.warps * PIECE) or self.warps % 4:
            raise ValueError(f"{self} cannot be: no multiples of {PIECE} columns and 4 warps.")

    @property
    def width(self) -> int:
        """Columns of a warp."""
        return self.columns // (self.ranks * self.warps)

    @property
    def rows(self) -> int:
        """Experts of a cluster."""
        return TILE * self.tiles

    @property
    def clusters(self) -> int:
        """Clusters of the grid."""
        return -(-self.experts // self.rows)

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps


@functools.cache
def plan_for(experts: int, columns: int) -> Plan | None:
    """The plan of a shape; None if there is none."""
    tiles = -(-experts // (TILE * _CLUSTERS))
    for ranks in (8, 4, 2, 1):
        own = columns // ranks
        if columns % ranks or (ranks > 1 and own < _LEAST_COLUMNS):
            continue
        for warps in (16, 12, 8, 4):
            if own % (warps * PIECE) == 0 and own // warps <= _MOST_COLUMNS:
                return Plan(experts, columns, ranks, warps, tiles)
    return None
