"""Repacks MXFP4 matrices from the checkpoint's order into that in which the kernel uses them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt32

Host = Array | np.ndarray
"""Packing runs on either: numpy in, numpy out."""
TILE_ROWS = 16
"""Rows of one tensor-core tile (mma m16n8k16)."""
GROUP = 64
"""Columns whose codes one lane holds in 16 bytes: the granule of a warp's work."""
MEET, CLAIM, DONE = 0, 32, 64
"""Words where thread blocks meet, claim work, and count what is done of each slot."""
MOST_SLOTS = 128
BARRIER_WORDS = DONE + MOST_SLOTS
"""Zeros when made, and after each launch, but for bit 31 of the word where blocks meet."""

# Where the code of (column pair a, row half h) lies in a lane's word, if its column is even:
# (first bit of the code, how many, place in the word). An odd column's lies 16 bits further on,
# around the end. The kernel brings the sign to bit 15 and the magnitude to bits 8:6 (a bfloat16's
# exponent and first mantissa bit) of a half: as they are, by two rotations, and for the last by a
# product that moves three pieces at once; see README.md.
_FIELDS = {
    (0, 0): ((3, 1, 15), (0, 3, 6)),
    (0, 1): ((3, 1, 5), (0, 3, 28)),
    (1, 0): ((3, 1, 2), (0, 3, 25)),
    (1, 1): ((3, 1, 1), (2, 1, 0), (0, 2, 3)),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one matrix [rows, columns] is cut: fixed by its shape alone, so that sums have one order.

    A unit is `row_warps` tiles of 16 rows over all columns. Its warps form a grid: `row_warps`
    tiles by `column_warps` slices of the columns. A unit arrives in `parts` stages, each with an
    equal part of every slice.
    """

    rows: int
    columns: int
    row_warps: int
    column_warps: int
    parts: int

    def __post_init__(self):
        for name, whole, piece in (
            ("rows", self.rows, TILE_ROWS * self.row_warps),
            ("columns", self.columns, GROUP * self.column_warps * self.parts),
            ("warps", self.warps, 4),
        ):
            if whole % piece:
                raise ValueError(
                    f"{name}={whole} is not a multiple of {piece}, which {self} needs."
                )

    @property
    def warps(self) -> int:
        """Consumer warps of a thread block."""
        return self.row_warps * self.column_warps

    @property
    def units(self) -> int:
        """Units of one expert's matrix."""
        return self.rows // (TILE_ROWS * self.row_warps)

    @property
    def slice_columns(self) -> int:
        """Columns a warp sums over."""
        return self.columns // self.column_warps

    @property
    def part_columns(self) -> int:
        """Columns of a slice that one stage brings."""
        return self.slice_columns // self.parts

    @property
    def code_words(self) -> int:
        """32-bit words of codes in a stage."""
        return self.warps * self.part_columns * TILE_ROWS // 8

    @property
    def stage_words(self) -> int:
        """32-bit words of a stage: codes, then scales, 1 to 16."""
        return self.code_words * 17 // 16

    @property
    def stage_shape(self) -> tuple[int, int]:
        """A stage as the copy engine takes it: rows of at most 512 bytes, at most 256 of them."""
        width = math.gcd(self.stage_words, 128)
        return self.stage_words // width, width

    @property
    def packed_shape(self) -> tuple[int, int, int]:
        """Shape of one expert's packed matrix, in 32-bit words."""
        return self.units * self.parts, *self.stage_shape


def plan_for(rows: int, columns: int, *, parts: int | None = None) -> Plan:
    """The plan for a matrix: slices of at most 512 columns, 8, 12 or 16 warps.

    Raises:
      ValueError: if no plan fits the shape.
    """
    candidates = []
    for column_warps in range(max(1, -(-columns // 512)), 17):
        for warps in (12, 16, 8):
            row_warps = warps // column_warps
            even = warps % column_warps == 0 and columns % (column_warps * GROUP) == 0
            if even and rows % (TILE_ROWS * row_warps) == 0:
                slice_columns = columns // column_warps
                # A stage under 16 KB costs more in waiting than it saves.
                halve = slice_columns % (2 * GROUP) == 0 and warps * slice_columns >= 6144
                candidates.append(Plan(rows, columns, row_warps, column_warps, parts or 1 + halve))
    if candidates:
        # Enough units to spread over the SMs; then as few slices to add up as can be.
        return next(
            (p for p in candidates if p.units >= 16), max(candidates, key=lambda p: p.units)
        )
    raise ValueError(
        f"No plan for a matrix of {rows} rows and {columns} columns: rows must be a multiple of 16 "
        "times, columns of 64 times the warps along them (8, 12 or 16 in all). Use "
        "implementation='reference'."
    )


def interleave(gate_up: Host) -> Host:
    """[..., 2, f, k] to [..., 2 f, k]: 8 gate rows, their 8 up rows; one lane holds both."""
    *lead, _, f, k = gate_up.shape
    if f % 8:
        raise ValueError(f"gate_up has expert width {f}; the kernel needs a multiple of 8.")
    return _swap(gate_up.reshape(*lead, 2, f // 8, 8, k), -4, -3).reshape(*lead, 2 * f, k)


def deinterleave(rows: Host) -> Host:
    """Inverse of `interleave`."""
    *lead, f2, k = rows.shape
    return _swap(rows.reshape(*lead, f2 // 16, 2, 8, k), -4, -3).reshape(*lead, 2, f2 // 2, k)


def pack(
    codes: UInt8[Host, "*e rows half"], scales: UInt8[Host, "*e rows blocks"], plan: Plan
) -> UInt32[Host, "*e stages r w"]:
    """Checkpoint order to kernel order; numpy in, numpy out. `unpack` is its exact inverse."""
    xp = np if isinstance(codes, np.ndarray) else jnp
    lead, p = codes.shape[:-2], plan
    if (*codes.shape[-2:], scales.shape[-1]) != (p.rows, p.columns // 2, p.columns // 32):
        raise ValueError(f"codes {codes.shape} and scales {scales.shape} do not fit {plan}.")
    # One byte is the column pair (even, odd); axes: unit, tile, half, g | slice, part, group,
    # block, c, step, pair a.
    byte = codes.reshape(
        -1, p.units, p.row_warps, 2, 8, p.column_warps, p.parts, p.part_columns // GROUP, 2, 4, 2, 2
    )
    # To unit, part, tile, slice, group, g, c, block, step, (a, half).
    byte = byte.transpose(0, 1, 6, 2, 5, 7, 4, 9, 8, 10, 11, 3)
    words = xp.zeros(byte.shape[:-2], xp.uint32)
    for (a, half), pieces in _FIELDS.items():
        for odd in (0, 1):
            code = (byte[..., a, half] >> xp.uint8(4 * odd)).astype(xp.uint32)
            for first, count, place in pieces:
                bits = (code >> first) & ((1 << count) - 1)
                words = words | (bits << ((place + 16 * odd) % 32))
    scale = scales.reshape(
        -1, p.units, p.row_warps, 2, 8, p.column_warps, p.parts, p.part_columns // 32
    )
    scale = scale.transpose(0, 1, 6, 2, 5, 4, 3, 7).reshape(words.shape[0], -1, 4)
    scale = scale.astype(xp.uint32)
    scale = scale[..., 0] | scale[..., 1] << 8 | scale[..., 2] << 16 | scale[..., 3] << 24
    stages = (words.shape[0], p.units * p.parts)
    joined = [words.reshape(*stages, p.code_words), scale.reshape(*stages, -1)]
    return xp.concatenate(joined, axis=-1).reshape(*lead, *p.packed_shape)


def unpack(packed: UInt32[Host, "*e stages r w"], plan: Plan) -> tuple[Host, Host]:
    """Kernel order back to the checkpoint's codes and scales."""
    codes, scales = unpack_stages(packed.reshape(-1, plan.stage_words), plan)
    lead, p = packed.shape[:-3], plan
    # From unit, part, tile, slice, half, g, columns of the part.
    codes = codes.reshape(
        -1, p.units, p.parts, p.row_warps, p.column_warps, 2, 8, p.part_columns // 2
    )
    scales = scales.reshape(*codes.shape[:-1], p.part_columns // 32)
    order = (0, 1, 3, 5, 6, 4, 2, 7)
    return (
        codes.transpose(order).reshape(*lead, p.rows, p.columns // 2),
        scales.transpose(order).reshape(*lead, p.rows, p.columns // 32),
    )


def unpack_stages(
    stages: UInt32[Host, "n words"], plan: Plan
) -> tuple[UInt8[Host, "n warps 16 half"], UInt8[Host, "n warps 16 blocks"]]:
    """Codes and scales of whole stages, warp by warp, in the checkpoint's packing of a row."""
    xp = np if isinstance(stages, np.ndarray) else jnp
    p, n = plan, stages.shape[0]
    words = stages[:, : p.code_words].reshape(n, p.warps, p.part_columns // GROUP, 8, 4, 2, 2)
    halves = []
    for half in (0, 1):
        pairs = []
        for a in (0, 1):
            pair = xp.zeros_like(words)
            for odd in (0, 1):
                for first, count, place in _FIELDS[a, half]:
                    bits = (words >> ((place + 16 * odd) % 32)) & ((1 << count) - 1)
                    pair = pair | bits << (first + 4 * odd)
            pairs.append(pair)
        halves.append(xp.stack(pairs, -1))
    # n, warp, group, g, c, block, step, a, half -> n, warp, half, g, group, block, c, step, a
    codes = xp.stack(halves, -1).transpose(0, 1, 8, 3, 2, 5, 4, 6, 7).astype(xp.uint8)
    scale = stages[:, p.code_words :]
    scale = xp.stack([(scale >> (8 * i)) & 255 for i in range(4)], -1).astype(xp.uint8)
    scale = scale.reshape(n, p.warps, 8, 2, p.part_columns // 32).transpose(0, 1, 3, 2, 4)
    return (
        codes.reshape(n, p.warps, TILE_ROWS, p.part_columns // 2),
        scale.reshape(n, p.warps, TILE_ROWS, p.part_columns // 32),
    )


def _swap(array, i, j):
    return (np if isinstance(array, np.ndarray) else jnp).swapaxes(array, i, j)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelWeights:
    """One layer's experts in the kernel's order.

    Attributes:
      gate_up: stages of 32-bit words.
      down: likewise.
      barrier: where thread blocks of a launch meet. Zeros when made; the kernel writes to it, and
        leaves it fit for the next use, so that no kernel must clear it before each launch.
      gate_up_plan: how the matrix is cut.
      down_plan: likewise.
    """

    gate_up: UInt32[Array, "e stages r w"]
    down: UInt32[Array, "e stages2 r2 w2"]
    barrier: UInt32[Array, " b"]
    gate_up_plan: Plan = dataclasses.field(metadata=dict(static=True))
    down_plan: Plan = dataclasses.field(metadata=dict(static=True))


def pack_experts(
    weights,
    gate_up_plan: Plan | None = None,
    down_plan: Plan | None = None,
    *,
    more_words: int = 0,
):
    """`ExpertWeights` in MXFP4 to `KernelWeights`, once, when a checkpoint is opened or converted.

    Args:
      weights: in a checkpoint's order.
      gate_up_plan: how the matrix is cut; by default as `plan_for` says.
      down_plan: likewise.
      more_words: of `barrier`, for other kernels.

    Raises:
      ValueError: if the weights are dense, or no plan fits their shape.
    """
    if weights.gate_up_scale is None:
        raise ValueError(
            "Dense expert weights cannot be packed for the kernel: it reads MXFP4 only."
        )
    _, _, f, half = weights.gate_up.shape
    gate_up_plan = gate_up_plan or plan_for(2 * f, 2 * half)
    down_plan = down_plan or plan_for(2 * half, f)
    xp = np if isinstance(weights.gate_up, np.ndarray) else jnp
    return KernelWeights(
        pack(interleave(weights.gate_up), interleave(weights.gate_up_scale), gate_up_plan),
        pack(weights.down, weights.down_scale, down_plan),
        xp.zeros(BARRIER_WORDS + more_words, xp.uint32),
        gate_up_plan,
        down_plan,
    )


def unpack_experts(weights: KernelWeights) -> tuple[Host, Host, Host, Host]:
    """The fields of the `ExpertWeights` that were packed, in order: exact, and usable under jit."""
    gate_up, gate_up_scale = unpack(weights.gate_up, weights.gate_up_plan)
    down, down_scale = unpack(weights.down, weights.down_plan)
    return deinterleave(gate_up), down, deinterleave(gate_up_scale), down_scale
