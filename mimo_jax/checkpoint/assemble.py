"""Makes parameters, or one device's part of them, out of the rows of stored tensors."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoint.layout import BYTES, MXFP4, Recipe
from mimo_jax.checkpoint.manifest import CODES
from mimo_jax.errors import MimoError
from mimo_jax.quant import fp8, mxfp4

SCALE = "_scale"

Index = tuple[slice, ...]
"""A slice for each dimension of an array, as JAX gives it to whoever makes a shard."""

Span = tuple[int, int]


class Assembler:
    """Reads parameters by the table of `xiaomi.recipes`, any part of them at a time.

    Codes are checked whenever they are read: NaN, and scales that arithmetic cannot be trusted
    with, are refused by the stored tensor's name.

    Example:
      assembler = Assembler(recipes(config, None, "v2.6"), files.read)
      assembler.stored("target.layers.0.attention.qkv")  # FP8 codes, [groups, rows, d]
      assembler.values("target.layers.0.attention.qkv", np.float32)

    Args:
      table: from `recipes`.
      read: gives a stored tensor by name; may be a view of its file, and is copied from at once.
    """

    def __init__(self, table: dict[str, Recipe], read: Callable[[str], np.ndarray]):
        self.table, self._read = table, read
        self._quantized: dict[Any, np.ndarray] = {}

    def tensors(self, name: str) -> list[str]:
        """Stored tensors that a parameter is made of, those of its scales not among them."""
        runs = itertools.chain.from_iterable(self.table[name].runs)
        return list(dict.fromkeys(run.tensor for run in runs))

    def nbytes(self, name: str) -> int:
        """Bytes of a parameter in its stored form."""
        recipe = self.table[name]
        return math.prod(recipe.shape) * BYTES[recipe.dtype]

    def make(self, name: str, dtype: Any, index: Index | None = None) -> np.ndarray:
        """A part of a parameter with the dtype that it is to have.

        Args:
          name: of the parameter.
          dtype: that of the stored codes or scales gives them as they are; a float dtype decodes
            and casts; uint8 quantises what is stored otherwise to MXFP4, by `quant.mxfp4`.
          index: slices of its dimensions in the form that is asked for; all by default.

        Raises:
          MimoError: if codes or scales are damaged, or nothing stored can become that.
        """
        dtype = np.dtype(dtype)
        recipe = self.table.get(name)
        if recipe is not None and dtype == self._read(recipe.runs[0][0].tensor).dtype:
            return self.stored(name, index)
        if dtype == np.uint8:
            return self._quantize(name, index)
        if recipe is None or dtype in CODES:
            raise MimoError(f"{name} cannot be made as {dtype.name}: it is not stored so.")
        return self.values(name, dtype, index)

    def stored(self, name: str, index: Index | None = None) -> np.ndarray:
        """A part of a parameter in its stored form: codes stay codes, two MXFP4 ones a byte.

        Args:
          name: of the parameter, a key of the table.
          index: slices of its dimensions as the table's `Recipe.shape` has them; all by default.

        Returns:
          an array of its own.
        """
        recipe = self.table[name]
        per = self._per(name)

        def part(number: int, rows: Span, columns: Span | None) -> np.ndarray:
            if name + SCALE not in self.table:
                return self._rows(name, number, rows, columns)
            first, last = columns
            codes, _, (row, column) = self._tiles(name, number, rows, (first * per, last * per))
            return codes[row:, column // per :][:, : last - first]

        return self._assemble(name, recipe.shape, self._dtype(name), index, part)

    def values(self, name: str, dtype: Any, index: Index | None = None) -> np.ndarray:
        """A part of a parameter as float32 or bfloat16, decoded if it is stored as codes.

        Args:
          name: of the parameter, a key of the table.
          dtype: float32 or bfloat16.
          index: slices of its dimensions, in numbers and not in bytes; all by default.

        Returns:
          an array of its own.
        """
        dtype = np.dtype(dtype)
        *most, last = self.table[name].shape
        scale = self.table.get(name + SCALE)

        def part(number: int, rows: Span, columns: Span | None) -> np.ndarray:
            if scale is None:
                return self._rows(name, number, rows, columns).astype(dtype)
            codes, scales, (row, column) = self._tiles(name, number, rows, columns)
            if codes.dtype == np.uint8:
                decoded = mxfp4.dequantize_on_host(codes, scales, dtype)
            else:
                decoded = fp8.decode_on_host(codes, scales, scale.tile[0], dtype)
            return decoded[row:, column:][:, : columns[1] - columns[0]]

        return self._assemble(name, (*most, last * self._per(name)), dtype, index, part)

    def _assemble(self, name: str, shape, dtype, index: Index | None, part) -> np.ndarray:
        """Fills an array, one leading index after the other; `part` gives rows and columns."""
        lead = self.table[name].lead
        index = index or (slice(None),) * len(shape)
        spans = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
        out = np.empty([stop - start for start, stop in spans], dtype)
        columns = spans[lead + 1] if len(spans) > lead + 1 else None
        for at in np.ndindex(out.shape[:lead]):
            place = tuple(start + i for (start, _), i in zip(spans, at, strict=False))
            number = int(np.ravel_multi_index(place, shape[:lead])) if lead else 0
            out[at] = part(number, spans[lead], columns)
        return out

    def _rows(self, name: str, number: int, rows: Span, columns: Span | None) -> np.ndarray:
        """Rows of one leading index, as stored; a view where they are one run."""
        pieces, place = [], 0
        for run in self.table[name].runs[number]:
            begin, end = max(rows[0], place), min(rows[1], place + run.rows)
            if begin < end:
                tensor = self._read(run.tensor)
                tensor = tensor if columns is None else tensor[:, slice(*columns)]
                if run.repeat == 1:
                    pieces.append(tensor[run.start + begin - place : run.start + end - place])
                else:
                    pieces.append(tensor[run.start + (np.arange(begin, end) - place) // run.repeat])
            place += run.rows
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _tiles(
        self, name: str, number: int, rows: Span, columns: Span
    ) -> tuple[np.ndarray, np.ndarray, Span]:
        """Codes and scales of the whole tiles that hold a part, and where it begins in them."""
        high, wide = self.table[name + SCALE].tile
        per = self._per(name)
        row, column = rows[0] // high * high, columns[0] // wide * wide
        last = min(-(-columns[1] // wide) * wide, self.table[name].shape[-1] * per)
        codes = self._rows(name, number, (row, rows[1]), (column // per, last // per))
        scales = self._rows(
            name + SCALE,
            number,
            (row // high, -(-rows[1] // high)),
            (column // wide, -(-last // wide)),
        )
        validate = mxfp4.validate if codes.dtype == np.uint8 else fp8.validate
        error = validate(codes, scales, self.table[name].runs[number][0].tensor)
        if error is not None:
            raise error
        return codes, scales, (rows[0] - row, columns[0] - column)

    def _quantize(self, name: str, index: Index | None) -> np.ndarray:
        """MXFP4 codes, or their scales, of what is stored otherwise; both are computed at once."""
        base = name.removesuffix(SCALE)
        wanted = mxfp4.BLOCK if name.endswith(SCALE) else 2
        if base not in self.table:
            raise MimoError(f"{base} is not in the checkpoint, so that {name} cannot be made.")
        shape = self.table[base].shape
        index = index or (slice(None),) * len(shape)
        spans = [
            part.indices(size)[:2]
            for part, size in zip(index, (*shape[:-1], shape[-1] // wanted), strict=True)
        ]
        first, last = (at * wanted for at in spans.pop())
        key = (name, *spans, first, last)
        if key not in self._quantized:
            parts = tuple(slice(*span) for span in spans)
            shapes = [stop - start for start, stop in spans]
            codes = np.empty((*shapes, (last - first) // 2), np.uint8)
            scales = np.empty((*shapes, (last - first) // mxfp4.BLOCK), np.uint8)
            lead = self.table[base].lead
            for at in np.ndindex(codes.shape[:lead]):
                here = tuple(slice(s + i, s + i + 1) for (s, _), i in zip(spans, at, strict=False))
                columns = (*here, *parts[lead:], slice(first, last))
                values = self.values(base, np.float32, columns)[(0,) * lead]
                codes[at], scales[at] = mxfp4.quantize(jnp.asarray(values))
            both = {base: codes, base + SCALE: scales}
            self._quantized |= {(n, *key[1:]): array for n, array in both.items()}
        return self._quantized.pop(key)

    def _per(self, name: str) -> int:
        """Numbers in a stored element."""
        coded = self.table[name].dtype == MXFP4 and self.table[name].tile is None
        return 2 if coded else 1

    def _dtype(self, name: str) -> np.dtype:
        return self._read(self.table[name].runs[0][0].tensor).dtype
