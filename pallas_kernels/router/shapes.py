"""Real shapes of routers, for tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """e experts, c of them chosen, for rows of d; `wide` weights are float32, not bfloat16."""

    e: int
    d: int
    c: int
    wide: bool = False

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self.e * self.d * (4 if self.wide else 2)


SHAPES = {
    "pro": Shape(384, 6144, 8),
    "pro-wide": Shape(384, 6144, 8, wide=True),
    "flash": Shape(256, 4096, 8),
    "flash-wide": Shape(256, 4096, 8, wide=True),
    "nano": Shape(32, 256, 4, wide=True),
}
"""By name: MiMo-V2-Pro and its successors, MiMo-V2-Flash, mimo-nano."""
