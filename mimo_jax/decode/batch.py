"""A batch of sequences being decoded: the state on the devices, and what the host knows of it."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mimo_jax.decode.options import Options
from mimo_jax.decode.output import Output, Piece, Stats
from mimo_jax.decode.state import State
from mimo_jax.errors import MimoError
from mimo_jax.text.tokenizer import Detokenizer

CHUNKS = (64, 256)
"""Rows of a prefill pass: the least that holds the longest prompt, else the last."""
PIECE_S = 0.2
"""Seconds that a stream's pieces take by themselves: often enough to read along, and to stop.

Between two of them the device waits for the host's next launch, 7 ms for 70 layers on an H200.
"""

_log = logging.getLogger("mimo_jax")


class Decoding:
    """Sequences being decoded together: `append` prompts, `advance`, read the `outputs`, `release`.

    Args:
      engine: the Engine that lends the state and compiles the programs.
      batch: number of sequences.
      eos_ids: tokens that end an answer; the engine's by default.
    """

    def __init__(self, engine: Any, batch: int, eos_ids: tuple[int, ...] | None = None):
        self.engine = engine
        self.eos_ids = engine.eos_ids if eos_ids is None else eos_ids
        self.state: State | None = engine._take(batch)
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.done = np.zeros(batch, bool)
        # Rows that the caches have: of what was appended, none before a launch has read it.
        self.cached = np.zeros(batch, np.int32)
        engine._decodings.add(self)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens present in each sequence."""
        return _lengths(self.tokens)

    @property
    def over(self) -> bool:
        """Whether every sequence ended or is at its limit."""
        return bool((self.done | (self.lengths >= self.limits)).all())

    def append(self, prompts: list[list[int]], options: Options) -> None:
        """Adds a prompt to each sequence, for an answer with these options."""
        self.engine._check_open()
        max_len = self.engine.max_len
        for tokens, prompt in zip(self.tokens, prompts, strict=True):
            check_room(max_len, len(prompt), held=len(tokens))
        tokens = [own + prompt for own, prompt in zip(self.tokens, prompts, strict=True)]
        starts = _lengths(tokens)
        if self.state is None:
            # A launch was interrupted, and the caches were lost with it: all is read anew.
            self.state, self.cached = self.engine._take(len(tokens)), np.zeros_like(self.cached)
        self.state = self._uploaded(tokens, starts)
        self.tokens, self.starts, self.options = tokens, starts, options
        self.prompt_tokens = [len(prompt) for prompt in prompts]
        self.wanted = starts.astype(np.int64) + options.max_tokens
        self.limits = np.minimum(self.wanted, max_len).astype(np.int32)
        self.done = np.zeros_like(self.done)
        longest = int((starts - 1 - self.cached).max())
        self.chunk = next((c for c in CHUNKS if longest <= c), CHUNKS[-1])
        self.compile_s = self.wall_s = 0.0
        self.ttft_s: float | None = None
        # The first token comes as soon as there is one.
        self._stride = 1

    def _uploaded(self, tokens: list[list[int]], starts: np.ndarray) -> State:
        """The state with tokens and counters as they are now; the caches stay where they are.

        Rows that an earlier sequence left are not seen: a row's position follows from `cached`.
        """
        state = self.state
        rows = np.zeros(state.tokens.shape, np.int32)
        for row, own in zip(rows, tokens, strict=True):
            row[: len(own)] = own
        fields = {
            "tokens": rows,
            "length": starts,
            "cached": self.cached.copy(),
            "done": np.zeros_like(self.done),
            "round_of": np.full(state.round_of.shape, -1, np.int32),
            "histogram": np.zeros(state.histogram.shape, np.int32),
        }
        places: dict[str, NamedSharding] = {name: getattr(state, name).sharding for name in fields}
        return dataclasses.replace(state, **jax.device_put(fields, places))

    def after(self, every: int) -> np.ndarray:
        """Lengths at which to pause when each sequence has so many more tokens."""
        return np.minimum(self.lengths + min(every, self.engine.max_len), self.limits)

    def step(self, every: int | None) -> None:
        """Decodes at least so many tokens more; by itself, as many as likely take `PIECE_S`."""
        before, since = int(self.lengths.max()), self.wall_s
        self.advance(self.after(self._stride if every is None else every))
        fresh, seconds = int(self.lengths.max()) - before, self.wall_s - since
        if seconds > 0:
            self._stride = max(1, int(fresh * PIECE_S / seconds))

    def advance(self, pauses: np.ndarray) -> None:
        """Decodes until each sequence is over or has at least that length: one launch.

        If it fails before anything was emitted, nothing was appended.
        """
        try:
            self._launch(pauses)
        except BaseException:  # Ctrl-C while it compiles, too.
            if (self.lengths == self.starts).all():
                before = zip(self.tokens, self.prompt_tokens, strict=True)
                self.tokens = [tokens[: len(tokens) - count] for tokens, count in before]
            raise

    def _launch(self, pauses: np.ndarray) -> None:
        engine = self.engine
        engine._check_open()
        request = self.options.request(self.limits, pauses, self.eos_ids, engine._plan.mesh)
        batch = len(self.tokens)
        program, seconds = engine._program(batch, self.chunk, self.state, request)
        self.compile_s += seconds
        # The state is donated: until it is back there is none, also if this is interrupted.
        state, self.state = self.state, None
        start = time.perf_counter()
        state = program(engine._params, state, request)
        rows, lengths, self.done, self.histogram, self.rounds = jax.device_get(
            (state.tokens, state.length, state.done, state.histogram, state.round_of)
        )
        self.wall_s += time.perf_counter() - start
        self.ttft_s = self.wall_s if self.ttft_s is None else self.ttft_s
        for own, row, length in zip(self.tokens, rows, lengths.tolist(), strict=True):
            own.extend(row[len(own) : length].tolist())
        # Last: what the caches hold must not be ahead of what is known.
        self.state, self.cached = state, lengths - 1

    def pieces(self, every: int | None) -> Iterator[Piece]:
        """Decodes the only sequence, and hands it over as it comes: whole characters."""
        detokenizer, shown = Detokenizer(self.engine.tokenizer), 0
        while True:
            self.step(every)
            fresh = self.answer(0, shown)
            shown += len(fresh)
            text = detokenizer.push(self.engine._spelled(fresh))
            if self.over:
                output = self.outputs()[0]
                text += detokenizer.finish()
                yield Piece(text, fresh, output.finish_reason, output.stats)
                return
            yield Piece(text, fresh)

    def answer(self, index: int, shown: int = 0) -> tuple[int, ...]:
        """Tokens emitted since `append`, without the first ones and an end-of-sequence token."""
        emitted = self.tokens[index][int(self.starts[index]) + shown :]
        return tuple(emitted[:-1] if self.done[index] else emitted)

    def outputs(self) -> list[Output]:
        """The answers so far."""
        return [self._output(index) for index in range(len(self.tokens))]

    def _output(self, index: int) -> Output:
        tokens, done = self.answer(index), bool(self.done[index])
        limit, engine = int(self.limits[index]), self.engine
        if not done and len(self.tokens[index]) == limit < self.wanted[index]:
            _log.warning(
                "The cache's end stopped an answer after %d of max_tokens=%d tokens: load with a "
                "max_len above %d for more.",
                len(tokens),
                self.options.max_tokens,
                engine.max_len,
            )
        detokenizer = Detokenizer(engine.tokenizer)
        text = detokenizer.push(engine._spelled(tokens)) + detokenizer.finish()
        start = int(self.starts[index])
        rounds = tuple(self.rounds[index, start : start + len(tokens)].tolist())
        return Output(text, tokens, rounds, "stop" if done else "length", self._stats(index))

    def _stats(self, index: int) -> Stats:
        histogram = tuple(self.histogram[index].tolist())
        emitted, rounds = sum(i * n for i, n in enumerate(histogram)), sum(histogram)
        return Stats(
            prompt_tokens=self.prompt_tokens[index],
            tokens=emitted,
            rounds=rounds,
            acceptance_length=emitted / rounds if rounds else 0.0,
            acceptance_histogram=histogram,
            tokens_per_second=emitted / self.wall_s if self.wall_s else 0.0,
            wall_s=self.wall_s,
            ttft_s=self.ttft_s or 0.0,
            compile_s=self.compile_s,
            experts=self.engine.experts,
            devices=self.engine.devices,
        )

    def release(self) -> None:
        """Gives the state back for the next answer."""
        if self.state is not None and self.engine._params is not None:
            self.engine._idle = (len(self.tokens), self.state)
        self.state = None

    def drop(self) -> None:
        """Frees the state at once."""
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()
        self.state = None


def check_room(max_len: int, prompt: int, held: int = 0) -> None:
    """Raises a MimoError unless a prompt of so many tokens fits a cache, and one of an answer.

    Args:
      max_len: tokens of the cache.
      prompt: tokens of the prompt.
      held: tokens before it.
    """
    if held + prompt >= max_len:
        before = f" after the {held} that the session holds" if held else ""
        raise MimoError(
            f"The prompt has {prompt} tokens{before}; the cache holds {max_len}, one of them for "
            "the answer. Shorten it, or load with a larger max_len."
        )


def _lengths(tokens: list[list[int]]) -> np.ndarray:
    return np.array([len(own) for own in tokens], np.int32)
