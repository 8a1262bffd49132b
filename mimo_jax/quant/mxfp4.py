"""MXFP4 weights: quantise, pack, check, dequantise, and fake-quantise for training.

The format is OCP Microscaling (MX) v1.0 MXFP4: blocks of 32 e2m1 elements (section 5.3.3) along
the last axis, each with an e8m0 scale byte b of value 2^(b - 127) (section 5.4.1). What is traced
here rounds the bits of float32 with integer operations: XLA flushes subnormals to zero on CPUs, and
float4 casts are slow or absent on some backends. Tests hold it to ml_dtypes' casts, bit for bit.

Non-finite weights are never coded silently. Called with arrays, the functions raise. Under
`jax.jit`, where nothing can raise, a block with a NaN or an infinity gets scale byte 255 (e8m0's
NaN), which `validate` refuses and which `dequantize` and `fake_quantize` make non-finite values of.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt8

from mimo_jax.errors import MimoError
from pallas_kernels.mxfp4 import BLOCK, decode, decode_e2m1, decode_e8m0
from pallas_kernels.mxfp4 import unpack as _unpack

RULES = ("floor", "mse")
"""How a block's shared exponent is chosen: OCP's, or the one of least squared error beside it."""

MIN_SCALE, MAX_SCALE = 2, 252
"""The scale bytes that `quantize` writes: with these, all 16 codes are zero or normal float32."""

NAN_SCALE = 255
"""The e8m0 NaN, which marks a block that had a non-finite weight."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
# Midpoints between neighbouring e2m1 magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6. Ties go to the even
# code: up where the lower neighbour is odd, which is to exceed the float just below the midpoint.
_MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32).view(np.int32)
_STEPS_UP = _MIDPOINTS - np.array([0, 1, 0, 1, 0, 1, 0], np.int32)


def quantize(
    w: Float[Array, "*rows k"], rule: str = "floor"
) -> tuple[UInt8[Array, "*rows half"], UInt8[Array, "*rows blocks"]]:
    """Quantises to packed MXFP4, blocks of 32 along the last axis, rounding to nearest even.

    Args:
      w: float32 or bfloat16 weights; k is a multiple of 32.
      rule: the shared exponent. "floor" is floor(log2(amax)) - 2 (OCP MX v1.0, section 6.3); "mse"
        is the one of that, its predecessor and its successor with the least squared error, the
        floor rule's on a tie. Both are kept within scale bytes `MIN_SCALE` to `MAX_SCALE`; in a
        block of magnitudes below 2^-127 every code is zero.

    Returns:
      codes: two e2m1 codes a byte, the even column in the low nibble, [..., k/2].
      scales: e8m0 bytes, [..., k/32]; `NAN_SCALE` for non-finite blocks, under jit only.

    Raises:
      MimoError: on another dtype, an unfit k, an unknown rule, or (not under jit) non-finite
        weights.
    """
    _check_weights(w, rule)
    nibbles, scales = _nearest(_blocks(w), rule)
    return pack(nibbles.reshape(w.shape)), scales


def dequantize(
    codes: UInt8[Array, "*rows half"], scales: UInt8[Array, "*rows blocks"], dtype=jnp.float32
) -> Float[Array, "*rows full"]:
    """Decodes packed MXFP4, exactly, wherever the value is zero or a normal float32.

    Args:
      codes: as from `quantize`.
      scales: as from `quantize`; `validate` says whether all values are exact.
      dtype: float32 or bfloat16, which both hold every such value; no other does (for float64 see
        `dequantize_float64`).

    Raises:
      MimoError: if the shapes do not fit each other, or on another dtype.
    """
    _check_shapes(codes, scales)
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise MimoError(
            f"MXFP4 cannot be dequantised to dtype={jnp.dtype(dtype)}; allowed are float32 and "
            "bfloat16, which have its range. Cast the float32 result if another dtype is meant."
        )
    return decode(codes, scales, dtype)


def dequantize_float64(codes: np.ndarray | Array, scales: np.ndarray | Array) -> np.ndarray:
    """Decodes packed MXFP4 on the host through ml_dtypes, exactly for all codes and scales.

    Args:
      codes: bytes, [..., k/2].
      scales: bytes, [..., k/32]; 255 gives NaN.

    Returns:
      float64 values, [..., k].

    Raises:
      MimoError: if the shapes do not fit each other.
    """
    _check_shapes(codes, scales)
    codes, scales = np.asarray(codes), np.asarray(scales)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return (values * factors[..., None]).reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def dequantize_on_host(codes: np.ndarray, scales: np.ndarray, dtype) -> np.ndarray:
    """Decodes packed MXFP4 in numpy, exactly for what `validate` passes.

    Args:
      codes: bytes, [..., k/2].
      scales: bytes, [..., k/32].
      dtype: float32 or bfloat16.

    Returns:
      values, [..., k].
    """
    bits = np.take(_quads(), np.ascontiguousarray(codes).view(np.uint16)).view(np.uint16)
    bits = bits.reshape(*scales.shape, BLOCK)
    # A power of two is added to the exponents, but to those of zeros.
    shift = (scales.astype(np.uint16) - np.uint16(127)) << np.uint16(7)
    bits += shift[..., None] * ((bits & np.uint16(0x7FFF)) != 0)
    bits = bits.reshape(*codes.shape[:-1], -1)
    if dtype == ml_dtypes.bfloat16:
        return bits.view(ml_dtypes.bfloat16)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(dtype, copy=False)


@cache
def _quads() -> np.ndarray:
    """The four bfloat16 values of each two bytes, as one integer: gathered much faster than one."""
    nibbles = np.arange(1 << 16, dtype=np.uint32)[:, None] >> np.array([0, 4, 8, 12], np.uint32)
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(ml_dtypes.bfloat16)
    return values[nibbles & 15].view(np.uint64)[:, 0]


def fake_quantize(w: Float[Array, "*rows k"], rule: str = "floor") -> Float[Array, "*rows k"]:
    """What MXFP4 would keep of `w`: exactly `dequantize(*quantize(w, rule))`, in w's dtype.

    Its gradient is straight-through: that of the identity. Arguments and errors as for `quantize`;
    under jit a block with a non-finite weight comes out non-finite.
    """
    _check_weights(w, rule)
    return _fake_quantize(w, rule)


def pack(nibbles: UInt8[Array, "*rows k"]) -> UInt8[Array, "*rows half"]:
    """Packs 4-bit codes (values 0 to 15) two a byte, the even column in the low nibble.

    Raises:
      MimoError: if k is odd.
    """
    if nibbles.shape[-1] % 2:
        raise MimoError(
            f"Codes of shape {nibbles.shape} have an odd number of columns; bytes hold two codes "
            "each. Pad the last axis."
        )
    pairs = nibbles.reshape(*nibbles.shape[:-1], nibbles.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << jnp.uint8(4))


def unpack(codes: UInt8[Array, "*rows half"]) -> UInt8[Array, "*rows full"]:
    """Undoes `pack`: one 4-bit code a byte, [..., k]."""
    return _unpack(codes)


def validate(
    codes: np.ndarray | Array, scales: np.ndarray | Array, name: str = "MXFP4 weights"
) -> MimoError | None:
    """Looks, on the host, for values that float32 arithmetic cannot be trusted with.

    Args:
      codes: bytes, [..., k/2].
      scales: bytes, [..., k/32].
      name: what to call the tensor in the error.

    Returns:
      None if every value is zero or a normal float32; otherwise the error to raise, which names the
      first bad block: a NaN scale, or a product that overflows float32 or is subnormal in it.

    Raises:
      MimoError: if the shapes do not fit each other.
    """
    _check_shapes(codes, scales)
    scales = np.asarray(scales)
    suspects = np.argwhere((scales < MIN_SCALE) | (scales > MAX_SCALE))
    if not len(suspects):
        return None
    blocks = np.asarray(codes).reshape(*scales.shape, BLOCK // 2)
    at = tuple(suspects.T)
    values = np.abs(dequantize_float64(blocks[at], scales[at][:, None]))
    limits = np.finfo(np.float32)
    trusted = (values == 0) | ((values >= limits.tiny) & (values <= limits.max))
    bad = np.flatnonzero(~trusted.all(axis=-1))
    if not len(bad):
        return None
    where = tuple(int(i) for i in suspects[bad[0]])
    value = values[bad[0]][~trusted[bad[0]]][0]
    return MimoError(
        f"{name}: the block at {where} has scale byte {int(scales[where])} and a value of "
        f"magnitude {value:g}, which is not a normal float32 (2^-126 to just under 2^128); scale "
        f"bytes {MIN_SCALE} to {MAX_SCALE} are always good. {len(bad)} such blocks in all. The "
        "file is damaged, or was written from non-finite weights: fetch or quantise it again."
    )


def _check_weights(w, rule):
    if rule not in RULES:
        raise MimoError(f"rule={rule!r} is not a way to choose MXFP4 scales; use one of {RULES}.")
    if w.dtype not in (jnp.float32, jnp.bfloat16):
        raise MimoError(
            f"Weights of dtype {w.dtype} cannot be quantised to MXFP4 without a silent cast; "
            "allowed are float32 and bfloat16. Cast them first."
        )
    if w.ndim == 0 or w.shape[-1] % BLOCK:
        raise MimoError(
            f"Weights of shape {w.shape} do not divide into blocks of {BLOCK} along the last axis. "
            f"Pad it to a multiple of {BLOCK}, or move the contracted axis last."
        )
    if not isinstance(w, jax.core.Tracer) and not bool(jnp.isfinite(w).all()):
        count = int((~jnp.isfinite(w)).sum())
        raise MimoError(
            f"Weights of shape {w.shape} have {count} non-finite values; MXFP4 has codes for "
            "finite ones only. Find where they come from, or replace them (jnp.nan_to_num) first."
        )


def _check_shapes(codes, scales):
    for name, array in (("codes", codes), ("scales", scales)):
        if array.dtype != np.uint8 or array.ndim == 0:
            raise MimoError(
                f"MXFP4 {name} are uint8 arrays with at least one axis, not {array.dtype} of shape "
                f"{array.shape}; view the stored bytes as uint8."
            )
    expected = (*codes.shape[:-1], 2 * codes.shape[-1] // BLOCK)
    if scales.shape != expected or 2 * codes.shape[-1] % BLOCK:
        raise MimoError(
            f"MXFP4 codes of shape {codes.shape} do not fit scales of shape {scales.shape}: a row "
            f"has {BLOCK // 2} bytes of codes a byte of scale. Are they of the same tensor?"
        )


def _blocks(w):
    """Bits of w as float32, as int32 blocks [..., k/32, 32]."""
    bits = lax.bitcast_convert_type(w.astype(jnp.float32), jnp.int32)
    return bits.reshape(*w.shape[:-1], w.shape[-1] // BLOCK, BLOCK)


@partial(jax.jit, static_argnames="rule")
def _nearest(
    bits: Int32[Array, "*rows 32"], rule: str
) -> tuple[UInt8[Array, "*rows 32"], UInt8[Array, "*rows"]]:
    """Unpacked codes and scale bytes of blocks given as bits of float32."""
    magnitude = bits & _MAGNITUDE
    # As integers, magnitudes of floats sort as they do as numbers, subnormal or not.
    largest = magnitude.max(axis=-1)
    # Biased exponents: the scale's is the largest element's less 2, as the codes reach 1.5 * 2^2.
    scale = jnp.clip((largest >> 23) - 2, MIN_SCALE, MAX_SCALE)
    code = _round(magnitude, scale)
    if rule == "mse":
        code, scale = _least_error(magnitude, scale, code)
    nibble = code | (lax.shift_right_logical(bits, np.int32(31)) << 3)
    scale = jnp.where(largest >= _INFINITY, NAN_SCALE, scale)
    return nibble.astype(jnp.uint8), scale.astype(jnp.uint8)


def _round(
    magnitude: Int32[Array, "*rows 32"], scale: Int32[Array, "*rows"]
) -> Int32[Array, "*rows 32"]:
    """Codes 0 to 7 of the e2m1 magnitudes nearest to magnitude / 2^(scale - 127), saturating."""
    shift = (scale - 127) << 23
    code = jnp.zeros_like(magnitude)
    for i, midpoint in enumerate(_STEPS_UP):
        step = shift + midpoint
        if i == 0:
            # A quarter of the smallest scale is 2^-127, a subnormal, of other bits.
            step = jnp.maximum(step, np.int32(1 << 22))
        code = code + (magnitude > step[..., None]).astype(code.dtype)
    return code


def _least_error(magnitude, scale, code):
    """The best of three neighbouring scales for each block, and its codes."""
    # Errors in units of the floor rule's scale, so that no weight's error leaves float32's range.
    _, unit = decode_e8m0((254 - scale).astype(jnp.uint8))
    exact = lax.bitcast_convert_type(magnitude, jnp.float32) * unit[..., None]

    def error(candidate):
        ratio = lax.bitcast_convert_type((candidate - scale + 127) << 23, jnp.float32)
        rounded = _round(magnitude, candidate)
        values = decode_e2m1(rounded.astype(jnp.uint8)) * ratio[..., None]
        return rounded, jnp.square(values - exact).sum(axis=-1)

    _, least = error(scale)
    best = scale
    for neighbour in (scale - 1, scale + 1):
        candidate = jnp.clip(neighbour, MIN_SCALE, MAX_SCALE)
        candidate_code, candidate_error = error(candidate)
        better: Bool[Array, "*rows"] = candidate_error < least
        code = jnp.where(better[..., None], candidate_code, code)
        best = jnp.where(better, candidate, best)
        least = jnp.minimum(least, candidate_error)
    return code, best


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _fake_quantize(w, rule):
    nibbles, scales = _nearest(_blocks(w), rule)
    small, large = decode_e8m0(scales)
    values = decode_e2m1(nibbles) * small[..., None] * large[..., None]
    return values.reshape(w.shape).astype(w.dtype)


@_fake_quantize.defjvp
def _straight_through(rule, primals, tangents):
    return _fake_quantize(primals[0], rule), tangents[0]
