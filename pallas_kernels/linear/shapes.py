"""Real shapes of few-token linears, for tests and benchmarks: one rank of eight, and mimo-nano."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A matrix of n outputs and d inputs; `unit` rows share an FP8 scale, 0 for bfloat16."""

    n: int
    d: int
    unit: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 1 if self.unit else 2

    @property
    def bytes(self) -> int:
        """Of weights and scales."""
        scales = 4 * (self.n // self.unit) * (self.d // 128) if self.unit else 0
        return self.n * self.d * self.itemsize + scales


SHAPES = {
    # MiMo-V2.6-Pro.
    "pro-qkv": Shape(3392, 6144, 64),
    "pro-o": Shape(6144, 2048),
    "pro-o-fp8": Shape(6144, 2048, 128),
    "pro-head": Shape(19072, 6144),
    "pro-up": Shape(2 * 2048, 6144, 128),
    "pro-down": Shape(6144, 2048, 128),
    # Its drafter.
    "pro-draft-features": Shape(768, 5 * 6144),
    "pro-draft-q": Shape(2048, 6144),
    "pro-draft-kv": Shape(256, 6144),
    "pro-draft-o": Shape(6144, 2048),
    "pro-draft-up": Shape(2 * 2048, 6144),
    "pro-draft-down": Shape(6144, 2048),
    # MiMo-V2.6-Flash and its drafter.
    "flash-qkv": Shape(1856, 4096, 64),
    "flash-o": Shape(4096, 1024),
    "flash-head": Shape(19072, 4096),
    "flash-up": Shape(2 * 2048, 4096, 128),
    "flash-down": Shape(4096, 2048, 128),
    "flash-draft-features": Shape(512, 5 * 4096),
    "flash-draft-q": Shape(1024, 4096),
    "flash-draft-kv": Shape(256, 4096),
    # mimo-nano on one device.
    "nano-qkv-full": Shape(2 * (4 * 48 + 48 + 32), 256),
    "nano-qkv": Shape(4 * (2 * 48 + 48 + 32), 256),
    "nano-o": Shape(256, 256),
    "nano-up": Shape(2 * 768, 256),
    "nano-down": Shape(256, 768),
    "nano-head": Shape(3072, 256),
    "nano-draft-features": Shape(256, 5 * 256),
    "nano-draft-up": Shape(2 * 448, 256),
}
"""By name. "up" is gate and up in one."""
