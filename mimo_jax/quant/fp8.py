"""FP8 weights: e4m3 codes with a float32 scale for each tile; decoded, checked and quantised.

A weight is its code times its tile's scale, in float32, and then rounded to the dtype that one
computes in. Scales are any positive numbers, not only powers of two. Tiles are 128 columns wide and
`unit` rows high, the last ones cut off: 128 rows as released checkpoints store them, or as few as
heads and tiles of a fused projection have in common (see `mimo_jax.model.attention`).

Source: the e4m3 of OCP 8-bit Floating Point Specification (OFP8) v1.0, section 5: 448 is the
largest value, there are no infinities, and codes 0x7F and 0xFF are NaN.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from mimo_jax.errors import MimoError

TILE = 128
"""Rows and columns of a tile as checkpoints store it."""

MAX = 448.0
"""The largest e4m3 value: some code of every quantised tile that is not all zero has it."""

CODES = jnp.float8_e4m3fn
MIN_SCALE = 2.0**-117
MAX_SCALE = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max) / MAX
"""With scales between these, every weight is zero or a normal number, in bfloat16 too."""

_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def tiles(size: int, tile: int = TILE) -> int:
    """Tiles along an axis, the last one perhaps cut off."""
    return -(-size // tile)


def decode(
    codes: Float[Array, "*lead r c"], scales: Float[Array, "*lead tr tc"], unit: int, dtype
) -> Float[Array, "*lead r c"]:
    """Decodes weights where they are used, traced or not.

    Args:
      codes: float8_e4m3fn.
      scales: float32, one for `unit` rows and 128 columns.
      unit: rows that share a scale.
      dtype: float32 or bfloat16; what `decode_on_host` gives, bit for bit.
    """
    rows, columns = codes.shape[-2:]
    wide = jnp.repeat(jnp.repeat(scales, unit, axis=-2), TILE, axis=-1)
    values = codes.astype(jnp.float32) * wide[..., :rows, :columns]
    if dtype == jnp.bfloat16:
        # Without this XLA may leave the rounding out where a product takes float32 anyway.
        values = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return values.astype(dtype)


def decode_on_host(codes: np.ndarray, scales: np.ndarray, unit: int, dtype) -> np.ndarray:
    """Decodes weights [..., r, c] in numpy; arguments and values as of `decode`."""
    rows, columns = codes.shape[-2:]
    values = _VALUES[codes.view(np.uint8)]
    wide = np.repeat(np.repeat(scales, unit, axis=-2)[..., :rows, :], TILE, axis=-1)
    values *= wide[..., :columns]
    return values.astype(dtype, copy=False)


def quantize(w: np.ndarray, unit: int = TILE) -> tuple[np.ndarray, np.ndarray]:
    """Quantises tiles so that the largest weight of each becomes 448, rounding to nearest even.

    Args:
      w: float32 or bfloat16 weights [..., r, c].
      unit: rows of a tile.

    Returns:
      codes: float8_e4m3fn, [..., r, c].
      scales: float32, [..., ceil(r / unit), ceil(c / 128)]; 1 for a tile of zeros.

    Raises:
      MimoError: on another dtype or non-finite weights.
    """
    if w.dtype not in (np.float32, ml_dtypes.bfloat16) or w.ndim < 2:
        raise MimoError(
            f"Weights of dtype {w.dtype} and shape {w.shape} cannot be quantised to FP8: give "
            "matrices of float32 or bfloat16."
        )
    w = w.astype(np.float32, copy=False)
    if not np.isfinite(w).all():
        raise MimoError(
            f"Weights of shape {w.shape} have {int((~np.isfinite(w)).sum())} non-finite values; "
            "FP8 scales cannot hold them. Find where they come from first."
        )
    rows, columns = w.shape[-2:]
    amax = tile_max(np.abs(w), unit)
    scales = np.clip(amax / np.float32(MAX), np.float32(MIN_SCALE), np.float32(MAX_SCALE))
    scales = np.where(amax == 0, np.float32(1), scales)
    wide = np.repeat(np.repeat(scales, unit, axis=-2)[..., :rows, :], TILE, axis=-1)
    values = np.clip(w / wide[..., :columns], -MAX, MAX)
    return values.astype(ml_dtypes.float8_e4m3fn), scales


def quantize_on_device(
    w: Float[Array, "*lead r c"], unit: int = TILE
) -> tuple[Float[Array, "*lead r c"], Float[Array, "*lead tr tc"]]:
    """What `quantize` gives, traced or not, but for the last bit of XLA's divisions.

    That weights are finite is not checked.
    """
    *lead, rows, columns = w.shape
    wide = w.astype(jnp.float32)
    padding = [(0, 0)] * len(lead) + [(0, -rows % unit), (0, -columns % TILE)]
    cut = (*lead, tiles(rows, unit), unit, tiles(columns), TILE)
    amax = jnp.pad(jnp.abs(wide), padding).reshape(cut).max(axis=(-3, -1))
    scales = jnp.where(amax == 0, 1.0, jnp.clip(amax / MAX, MIN_SCALE, MAX_SCALE))
    spread = jnp.repeat(jnp.repeat(scales, unit, axis=-2), TILE, axis=-1)[..., :rows, :columns]
    return jnp.clip(wide / spread, -MAX, MAX).astype(CODES), scales


def tile_max(values: np.ndarray, unit: int = TILE) -> np.ndarray:
    """The largest value of each tile of `unit` rows and 128 columns: [..., tiles, tiles]."""
    *lead, rows, columns = values.shape
    whole = rows // unit * unit
    # Not reduceat along rows, which is many times slower.
    tall = values[..., :whole, :].reshape(*lead, whole // unit, unit, columns).max(axis=-2)
    if whole < rows:
        rest = values[..., whole:, :].max(axis=-2, keepdims=True)
        tall = np.concatenate([tall, rest], axis=-2)
    return np.maximum.reduceat(tall, np.arange(0, columns, TILE), axis=-1)


def validate(codes: np.ndarray, scales: np.ndarray, name: str = "FP8 weights") -> MimoError | None:
    """Looks, on the host, for codes and scales that cannot be trusted.

    Args:
      codes: float8_e4m3fn, of any shape.
      scales: float32, of any shape.
      name: what to call the tensor in the error.

    Returns:
      None, or the error to raise, which names the first NaN code, or scale that is not a positive
      number of a size with which every weight is a normal number.
    """
    nan = (codes.view(np.uint8) & np.uint8(0x7F)) == 0x7F
    if nan.any():
        where = _first(nan)
        return MimoError(
            f"{name}: the code at {where} is NaN; {int(nan.sum())} such codes in all. The file is "
            "damaged, or was written from non-finite weights: fetch or quantise it again."
        )
    bad = ~((scales >= np.float32(MIN_SCALE)) & (scales <= np.float32(MAX_SCALE)))
    if bad.any():
        where = _first(bad)
        return MimoError(
            f"{name}: the scale at {where} is {float(scales[where]):g}; scales are positive, from "
            f"{MIN_SCALE:g} to {MAX_SCALE:g}. {int(bad.sum())} such scales in all. The file is "
            "damaged, or its scales are stored in another form: fetch it again."
        )
    return None


def _first(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))
