"""Random layers of a window's attention, and how far two results are apart."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mimo_jax.quant import fp8
from pallas_kernels.attention_layer import flag_words


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a layer, d wide; `unit` rows share an FP8 scale, 0 for none."""

    d: int
    n: int
    k: int
    h: int
    v: int
    half: int
    window: int
    unit: int = 0
    output_fp8: bool = False

    @property
    def rows(self) -> int:
        """Of the first projection."""
        return (self.n + self.k) * self.h + self.k * self.v

    @property
    def flags(self):
        """Words for the kernel, as they are made."""
        return jnp.zeros(flag_words(self.rows, self.n * self.v), jnp.uint32)


SHAPES = {
    "pro": Shape(6144, 16, 1, 192, 128, 32, 128, 64),
    "pro-o-fp8": Shape(6144, 16, 1, 192, 128, 32, 128, 64, True),
    "flash": Shape(4096, 8, 1, 192, 128, 32, 128, 64),
}


def make(rng, shape: Shape, b: int, t: int, start: int, live: int, slack: int = 5) -> dict:
    """Arguments of `attention_layer` by name; the ring is full of rows of the past."""

    def normal(*sizes, scale=1.0):
        return jnp.asarray(rng.normal(size=sizes) * scale, jnp.bfloat16)

    def weight(rows, columns, unit, scale=1.0):
        values = rng.normal(size=(rows, columns)).astype(np.float32) * (scale * columns**-0.5)
        if unit:
            return tuple(map(jnp.asarray, fp8.quantize(values, unit)))
        return jnp.asarray(values, jnp.bfloat16), None

    angles, s = rng.uniform(0, 7, (b, t, shape.half)), shape.window + t - 1 + slack
    qkv, qkv_scale = weight(shape.rows, shape.d, shape.unit)
    # Heads are means of many values: the result is then about as large as the stream.
    output, output_scale = weight(shape.d, shape.n * shape.v, 128 * shape.output_fp8, 8.0)
    return dict(
        h=normal(b, t, shape.d),
        norm=normal(shape.d),
        qkv=qkv,
        qkv_scale=qkv_scale,
        cos=jnp.asarray(np.cos(angles), jnp.float32),
        sin=jnp.asarray(np.sin(angles), jnp.float32),
        keys=normal(b, shape.k, s, shape.h),
        values=normal(b, shape.k, s, shape.v),
        start=jnp.full(b, start, jnp.int32),
        live=jnp.full(b, live, jnp.int32),
        sink=normal(shape.n),
        output=output,
        output_scale=output_scale,
    )


def options(shape: Shape, **more) -> dict:
    """The rest of them."""
    return dict(window=shape.window, value_scale=0.707, epsilon=1e-5, **more)


def distance(out, ref) -> float:
    """Relative norm; infinite for NaN."""
    out, ref = (np.asarray(x, np.float64) for x in (out, ref))
    found = np.linalg.norm(out - ref) / np.linalg.norm(ref)
    return np.inf if np.isnan(found) else float(found)
