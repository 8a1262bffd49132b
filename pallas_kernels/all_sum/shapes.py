"""Real arrays that devices exchange while they decode, for tests and benchmarks."""

import dataclasses
import math

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of each device; `total` if it is added, else it is gathered."""

    shape: tuple[int, ...]
    dtype: type
    total: bool = True

    @property
    def bytes(self) -> int:
        """Of one device."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


SHAPES = {
    # A block of 8, 1 and 16 tokens of MiMo-V2.6-Pro; twice a layer.
    "pro": Shape((8, 6144), jnp.bfloat16),
    "pro-1": Shape((1, 6144), jnp.bfloat16),
    "pro-16": Shape((16, 6144), jnp.bfloat16),
    "pro-16-float32": Shape((16, 6144), jnp.float32),
    "flash": Shape((8, 4096), jnp.bfloat16),
    "nano": Shape((8, 256), jnp.bfloat16),
    # The drafter's projection of the target's features, one of eight parts.
    "pro-features": Shape((8, 768), jnp.bfloat16, total=False),
    # The arg-max over a divided vocabulary: values, and ids.
    "values": Shape((8, 1), jnp.float32, total=False),
    "ids": Shape((8, 1), jnp.int32, total=False),
    # Tokens above the thresholds of a search for top-p and top-k.
    "counts": Shape((1, 8, 24), jnp.uint32),
}
"""By name."""
