"""What an answer is handed over as: outputs, streamed pieces, and their statistics."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an answer took.

    Attributes:
      prompt_tokens: tokens of the prompt; in a session, of this turn's text.
      tokens: tokens emitted, an end-of-sequence token included.
      rounds: blocks drafted and verified.
      acceptance_length: tokens emitted by a round, the extra one included: 1 to the block's size.
      acceptance_histogram: rounds by the tokens that they emitted, from 0 to the block's size.
      tokens_per_second: tokens / wall_s; of this sequence, in a batch.
      wall_s: seconds of the launches: prefill and decoding, without compilation.
      ttft_s: seconds until the caller had the first token, without compilation. `generate` hands
        everything over at once, so that there it is wall_s.
      compile_s: seconds of compilation during this call; 0 if the program was there.
      experts: "packed" (MXFP4), "dequantized", or "dense" as stored.
      devices: of the mesh.
    """

    prompt_tokens: int
    tokens: int
    rounds: int
    acceptance_length: float
    acceptance_histogram: tuple[int, ...]
    tokens_per_second: float
    wall_s: float
    ttft_s: float
    compile_s: float
    experts: str
    devices: int

    def __str__(self) -> str:
        """One line; with the time to the first token if it came before the others."""
        first = f"first token {self.ttft_s:.2f} s, " if self.ttft_s < self.wall_s else ""
        return (
            f"{self.tokens} tokens in {self.rounds} rounds, acceptance length "
            f"{self.acceptance_length:.2f}, {self.tokens_per_second:.1f} tokens/s with prefill, "
            f"{first}compile {self.compile_s:.1f} s, experts {self.experts}, "
            f"{self.devices} device{'s' * (self.devices > 1)}"
        )


@dataclasses.dataclass(frozen=True)
class Output:
    """An answer. `str(output)` is its text.

    Attributes:
      text: without special tokens; bytes that are not UTF-8 appear as U+FFFD, ids of a padded
        vocabulary that the tokenizer lacks as nothing.
      tokens: ids of the answer, without an end-of-sequence token.
      rounds: the round, from 0 on, that emitted each of these tokens.
      finish_reason: "stop" after an end-of-sequence token, "length" at the budget or the cache's
        end.
      stats: what it took.
    """

    text: str
    tokens: tuple[int, ...]
    rounds: tuple[int, ...]
    finish_reason: str
    stats: Stats

    def __str__(self) -> str:
        """The text."""
        return self.text


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a streamed answer, whole characters only; the last one has the other fields too."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None = None
    stats: Stats | None = None

    def __str__(self) -> str:
        """The text."""
        return self.text
