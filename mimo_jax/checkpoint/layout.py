"""Layouts of released checkpoints, and the words for where their tensors' rows lie among ours."""

import dataclasses
from typing import NamedTuple

from mimo_jax.errors import MimoError

FP8, MXFP4 = "F8_E4M3", "U8"
PLAIN = ("BF16", "F32")
"""Stored dtypes, by their names in safetensors; `MXFP4` codes and scales are both `U8` bytes."""

BYTES = {FP8: 1, MXFP4: 1, "BF16": 2, "F32": 4}
TILE = 128
"""Rows and columns of the tiles of FP8 weights that share a scale."""

BLOCK = 32
"""Columns of MXFP4 weights that share a scale."""

SKIPPED = ("visual.", "audio_encoder.", "speech_embeddings.")
"""Beginnings of the names of tensors of other modalities, which this package does not read."""

DRAFTER_FOLDER = "dflash/"
MASK_EMBEDDING = DRAFTER_FOLDER + "mask_embedding.pt"
"""The drafter's tensors are listed under its folder: "dflash/fc.weight". The mask's embedding is
no tensor of a safetensors file: it lies in a file of its own, listed under this name."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a checkpoint stores a model. What the configuration says is not repeated here.

    Attributes:
      fused: whether attention is one `qkv_proj` in chunks, else `q_proj`, `k_proj` and `v_proj`.
      linear: dtype of attention's input projections and of dense MLPs, of the MTP layers too:
        `FP8` with a scale a tile, or a plain one.
      experts: `MXFP4`, `FP8` or a plain dtype.
      other: dtype of embedding, head, norms, sinks and output projections.
      stacked: whether FP8 scales of split K and V of full layers run through both.
      mtp_fused: `fused` for the MTP layers; as `fused` by default.
      drafter: dtype of the drafter; as `other` by default.
    """

    fused: bool
    linear: str
    experts: str
    other: str = "BF16"
    stacked: bool = True
    mtp_fused: bool | None = None
    drafter: str | None = None

    def __post_init__(self):
        if self.mtp_fused is None:
            object.__setattr__(self, "mtp_fused", self.fused)
        if self.drafter is None:
            object.__setattr__(self, "drafter", self.other)
        for name, allowed in (
            ("linear", (FP8, *PLAIN)),
            ("experts", (MXFP4, FP8, *PLAIN)),
            ("other", PLAIN),
            ("drafter", PLAIN),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise MimoError(
                    f"A checkpoint that stores {name} weights as {value!r} cannot be read; they "
                    f"must be one of {allowed}."
                )


LAYOUTS = {
    "v2-flash": Layout(fused=False, linear=FP8, experts=FP8),
    "v2.5": Layout(fused=True, linear=FP8, experts=FP8),
    "v2.6": Layout(fused=True, linear=FP8, experts=MXFP4),
    "split-bf16": Layout(fused=False, linear="BF16", experts="BF16"),
    "fused-bf16": Layout(fused=True, linear="BF16", experts="BF16"),
}
"""Layouts by name. "v2.5" is MiMo-V2.5's and V2.5-Pro's; "v2.6" is also V2.5-Pro-FP4-DFlash's,
whose router may be float32 (the configuration says it). The last two have no scales: bases, and
what transformers writes for MiMo-V2-Flash, whose names on disk are Xiaomi's split ones."""

RELEASES = {
    "mimo-v2-flash": "v2-flash",
    "mimo-v2.5": "v2.5",
    "mimo-v2.5-pro": "v2.5",
    "mimo-v2.6-flash": "v2.6",
    "mimo-v2.6-pro": "v2.6",
}
"""The layout in which each preset was released."""


class Declared(NamedTuple):
    """A stored tensor as it must be.

    Attributes:
      dtype: in safetensors' names.
      shape: as stored: two MXFP4 codes a byte.
      parameter: the one of ours that it is part of, such as "target.layers.0.attention.qkv_scale".
    """

    dtype: str
    shape: tuple[int, ...]
    parameter: str

    @property
    def elements(self) -> int:
        """Elements as stored."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return self.elements * BYTES[self.dtype]


class Run(NamedTuple):
    """Consecutive rows [start, stop) of a stored tensor, each taken `repeat` times in turn.

    Repeats occur in scales only, where one of a tile's serves several of our finer units. A vector
    counts as rows of one element.
    """

    tensor: str
    start: int
    stop: int
    repeat: int = 1

    @property
    def rows(self) -> int:
        """Rows that it makes."""
        return (self.stop - self.start) * self.repeat


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which stored rows make a parameter of shape [*lead, rows, ...].

    Attributes:
      dtype: as stored, in safetensors' names.
      shape: of the parameter, in the stored form (two MXFP4 codes a byte).
      runs: for each index of the leading dimensions, in C order, the runs that make its rows.
      lead: number of leading dimensions.
      tile: of scales: rows and columns of the weight that one value scales (the last tile of each
        may be cut off); None for everything else. The scales of a parameter have its name and
        "_scale".
    """

    dtype: str
    shape: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]
    lead: int = 0
    tile: tuple[int, int] | None = None


class Piece(NamedTuple):
    """Where rows [start, stop) of a stored tensor lie among our parameters.

    Attributes:
      start: first row of the stored tensor.
      stop: past its last row.
      parameter: which of ours.
      index: leading index in it.
      row: of its rows there, the first.
      repeat: rows of ours for one stored row; of scales all of them are equal, or the parameter
        does not fit this layout.
    """

    start: int
    stop: int
    parameter: str
    index: int
    row: int
    repeat: int


def backwards(table: dict[str, Recipe]) -> dict[str, list[Piece]]:
    """`recipes` turned around: for each stored tensor the pieces that fill it, by `start`.

    A row of scales may be filled by several pieces: units of one tile, which must then be equal.
    """
    found: dict[str, list[Piece]] = {}
    for name, recipe in table.items():
        for index, runs in enumerate(recipe.runs):
            row = 0
            for run in runs:
                piece = Piece(run.start, run.stop, name, index, row, run.repeat)
                found.setdefault(run.tensor, []).append(piece)
                row += run.rows
    return {tensor: sorted(pieces, key=lambda p: p.start) for tensor, pieces in found.items()}


def tile_count(size: int, tile: int = TILE) -> int:
    """Tiles along an axis, the last one perhaps cut off."""
    return -(-size // tile)
