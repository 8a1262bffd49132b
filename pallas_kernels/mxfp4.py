"""Decoding MXFP4: 4-bit e2m1 codes in blocks of 32 that share an 8-bit power-of-two scale.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 (E2M1), 5.4.1 (E8M0), 6.3.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

BLOCK = 32
"""Elements that share one scale, along the contraction dimension."""


def unpack(codes: UInt8[Array, "*rows half"]) -> UInt8[Array, "*rows full"]:
    """Splits bytes into nibbles: column 2i is the low nibble of byte i, 2i + 1 the high one."""
    pairs = jnp.stack([codes & jnp.uint8(0xF), codes >> jnp.uint8(4)], axis=-1)
    return pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def decode_e2m1(nibbles: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Values of e2m1 codes (sign, 2 exponent bits, 1 mantissa bit) as float32."""
    magnitude = (nibbles & jnp.uint8(7)).astype(jnp.uint32)
    # Codes 2 to 7 are normal numbers: shifted by 22 their bits are a float32's, but for the bias of
    # the exponent.
    normal = lax.bitcast_convert_type((magnitude << 22) + jnp.uint32(126 << 23), jnp.float32)
    small = magnitude.astype(jnp.float32) * jnp.float32(0.5)
    value = jnp.where(magnitude < 2, small, normal)
    return jnp.where(nibbles >= 8, -value, value)


def decode_e8m0(scales: UInt8[Array, "*shape"]) -> tuple[Array, Array]:
    """Two float32 factors of 2^(b - 127), both normal, so that no flush to zero can touch them."""
    low = jnp.minimum(scales, jnp.uint8(2)).astype(jnp.uint32)
    high = jnp.maximum(scales, jnp.uint8(2)).astype(jnp.uint32)
    small = lax.bitcast_convert_type((low + jnp.uint32(125)) << 23, jnp.float32)
    large = lax.bitcast_convert_type(high << 23, jnp.float32)
    return small, large


def decode(
    codes: UInt8[Array, "*rows half"], scales: UInt8[Array, "*rows blocks"], dtype=jnp.float32
) -> Float[Array, "*rows full"]:
    """Decodes packed MXFP4 along the last axis.

    Args:
      codes: two e2m1 codes a byte, the low nibble first, K/2 bytes a row.
      scales: e8m0 bytes b, one for 32 columns; the scale is 2^(b - 127). 255 (NaN) is not checked.
      dtype: of the result. Where the value is a normal float32, it is exact, in bfloat16 too.

    Raises:
      ValueError: if a row's codes do not fill whole blocks of 32, one scale each.
    """
    full = 2 * codes.shape[-1]
    if full != BLOCK * scales.shape[-1]:
        raise ValueError(
            f"MXFP4 codes of shape {codes.shape} hold {full} columns and need {full / BLOCK:g} "
            f"scales a row, one for {BLOCK} columns; the scales have shape {scales.shape}."
        )
    values = decode_e2m1(unpack(codes)).reshape(*scales.shape, BLOCK)
    small, large = decode_e8m0(scales)
    values = values * small[..., None] * large[..., None]
    return values.reshape(*codes.shape[:-1], full).astype(dtype)
