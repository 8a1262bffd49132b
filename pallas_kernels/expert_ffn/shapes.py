"""Real shapes of expert FFNs, for tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """One device's share of a layer: model width d, expert width f, e experts, c choices each."""

    d: int
    f: int
    e: int
    c: int

    def tensor_parallel(self, ranks: int) -> "Shape":
        """Each expert's width cut among the ranks."""
        return dataclasses.replace(self, f=self.f // ranks)

    def expert_parallel(self, ranks: int) -> "Shape":
        """Whole experts dealt to the ranks."""
        return dataclasses.replace(self, e=self.e // ranks)


PRO = Shape(d=6144, f=2048, e=384, c=8)
"""MiMo-V2-Pro and its successors."""
FLASH = Shape(d=4096, f=2048, e=256, c=8)
"""MiMo-V2-Flash."""
NANO = Shape(d=256, f=256, e=32, c=4)
"""mimo-nano, the model in checkpoints/."""

SHAPES = {
    "pro": PRO,
    "pro-tp2": PRO.tensor_parallel(2),
    "pro-tp4": PRO.tensor_parallel(4),
    "pro-tp8": PRO.tensor_parallel(8),
    "pro-ep8": PRO.expert_parallel(8),
    "flash": FLASH,
    "flash-tp2": FLASH.tensor_parallel(2),
    "flash-tp4": FLASH.tensor_parallel(4),
    "flash-tp8": FLASH.tensor_parallel(8),
    "flash-ep8": FLASH.expert_parallel(8),
    "nano": NANO,
}
