"""Sizes of a call of attention; real shapes, for tests and benchmarks."""

import dataclasses


def sizes_of(q, keys, values) -> tuple[int, ...]:
    """b, t, n, h, v, k, s, as `ring.Ring` has them."""
    return *q.shape, values.shape[3], *keys.shape[1:3]


def block_sizes_of(qkv, keys, values) -> tuple[int, ...]:
    """The same of a block as it was projected: each key/value head's queries, key and value."""
    (b, k, s, h), v, t = keys.shape, values.shape[3], qkv.shape[1]
    return b, t, k * ((qkv.shape[3] - v) // h - 1), h, v, k, s


def places_misfit(rows: int, *sizes: int) -> str | None:
    """Why lanes, which count in 32 bits, cannot number a cache's elements, rows of such sizes."""
    if rows * max(sizes) < 2**31:
        return None
    return f"a cache of {rows} rows of {max(sizes)}; their product must be less than 2^31"


@dataclasses.dataclass(frozen=True)
class Shape:
    """One device's share of a layer: n query heads of h, k key/value heads, values of v.

    `window` None is full attention.
    """

    n: int
    h: int
    v: int
    k: int
    window: int | None
    sink: bool

    def tensor_parallel(self, ranks: int) -> "Shape":
        """The heads dealt to the ranks; key/value heads repeat where there are fewer."""
        return dataclasses.replace(self, n=self.n // ranks, k=max(1, self.k // ranks))

    def rows(self, max_len: int, block: int) -> int:
        """Rows of a cache: a ring's, or a multiple of 64 that holds a block past the end."""
        if self.window is not None:
            return self.window + block - 1
        return -(-(max_len + block) // 64) * 64


PRO_WINDOW = Shape(n=128, h=192, v=128, k=8, window=128, sink=True)
PRO_FULL = Shape(n=128, h=192, v=128, k=8, window=None, sink=False)
"""MiMo-V2-Pro and its successors: 60 layers with a window, 10 without."""
FLASH_WINDOW = Shape(n=64, h=192, v=128, k=8, window=128, sink=True)
FLASH_FULL = Shape(n=64, h=192, v=128, k=4, window=None, sink=False)
"""MiMo-V2-Flash."""
NANO_WINDOW = Shape(n=8, h=48, v=32, k=4, window=128, sink=True)
NANO_FULL = Shape(n=8, h=48, v=32, k=2, window=None, sink=False)
"""mimo-nano, the model in checkpoints/."""

SHAPES = {
    "pro-window": PRO_WINDOW,
    "pro-full": PRO_FULL,
    "pro-tp8-window": PRO_WINDOW.tensor_parallel(8),
    "pro-tp8-full": PRO_FULL.tensor_parallel(8),
    "flash-window": FLASH_WINDOW,
    "flash-full": FLASH_FULL,
    "flash-tp8-window": FLASH_WINDOW.tensor_parallel(8),
    "flash-tp8-full": FLASH_FULL.tensor_parallel(8),
    "nano-window": NANO_WINDOW,
    "nano-full": NANO_FULL,
}
