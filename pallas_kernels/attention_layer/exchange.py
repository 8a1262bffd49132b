"""Where thread blocks leave what others of the same launch read: words that are their own flags.

A word of two bfloat16 is left as its complement, and 0 says that it is not there yet: no result is
0xFFFF twice, for a NaN is rounded to 0x7FFF. So who reads looks at the very words that it needs,
until all are there. Nobody waits for stores to be seen before a flag is set, and no flag is read
before its data. (NCCL's protocol LL pairs each word with a flag; TensorRT-LLM's one-shot sums take
-0 for "not there".)

There are two halves. A launch exchanges in one, and clears the other, which the launch before it
used; so the words are fit for the next. Which half it is, bit 31 of the first word says. All
blocks add to that word once, together 2^31: the last one flips the bit, when all know what it was.
"""

import dataclasses
import typing

MOST_TOKENS = 8
"""Rows of all sequences together."""
_BEGIN = 32
"""Words before the halves: the first is not in one line of the cache with them."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What a launch exchanges.

    Attributes:
      rows: of the projection: columns of what it gives.
      columns: of the heads.
      word: the first of the flags that it takes, a multiple of 4.
    """

    rows: int
    columns: int
    word: int = 0

    @property
    def half(self) -> int:
        """Words of a half, whatever the number of tokens: another launch may have more."""
        return MOST_TOKENS * (self.rows + self.columns) // 2

    @property
    def end(self) -> int:
        """The word after the last."""
        return self.word + _BEGIN + 2 * self.half

    @property
    def halves(self) -> int:
        """The first word of the first half."""
        return self.word + _BEGIN

    @property
    def heads(self) -> int:
        """The first word of the heads in it; the projection comes before."""
        return self.halves + MOST_TOKENS * self.rows // 2

    def misfit(self) -> str | None:
        """Why such words cannot be exchanged."""
        if self.rows % 8 or self.columns % 8 or self.word % 4:
            return f"{self}: rows and columns must be multiples of 8, the word one of 4"
        return None


def flag_words(rows: int, columns: int) -> int:
    """Words that `attention_layer` takes of its flags.

    Args:
      rows: of the first projection.
      columns: of the output projection.
    """
    return Exchange(rows, columns).end


class Left(typing.NamedTuple):
    """An array in the exchange, in the place of a reference to one; rows of tokens.

    Attributes:
      flags: all words.
      turn: shared memory: 0 or 1, the half.
      first: the array's first word in the first half.
      half: words from there to the second.
      columns: of a row.
    """

    flags: typing.Any
    turn: typing.Any
    first: int
    half: int
    columns: int
