"""What users hold: an engine that answers prompts, its sessions, and outputs with statistics."""

import logging
import operator
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.config import ModelConfig
from mimo_jax.decode.batch import CHUNKS, Decoding, check_room
from mimo_jax.decode.chat import check_every
from mimo_jax.decode.conversing import Conversing
from mimo_jax.decode.options import Options
from mimo_jax.decode.output import Output, Piece
from mimo_jax.decode.program import Plan, Settings, make_program, state_maker
from mimo_jax.decode.state import State
from mimo_jax.drafter_config import AnyDrafterConfig
from mimo_jax.errors import MimoError
from mimo_jax.planning.memory import check_state
from mimo_jax.text.messages import check_text
from mimo_jax.text.tokenizer import Tokenizer

DRAFTERS = {"dflash": "drafter", "mtp": "mtp"}
"""Kinds of drafter, and the parts of a checkpoint that have their parameters."""

Prompt = str | Sequence[SupportsIndex] | np.ndarray | jax.Array
"""Text, or token ids."""

_log = logging.getLogger("mimo_jax")


class Engine(Conversing):
    """A model on a mesh, ready to answer. Made by `load`; not for several threads at once.

    Programs are compiled when first needed, one for each batch size and prefill chunk; options
    never compile anew.

    Attributes:
      config: of the target.
      drafter: of the drafter, DFlash or MTP, or None.
      tokenizer: of the checkpoint.
      max_len: tokens that a sequence may have, prompt included.
      experts: "packed", "dequantized" or "dense".
    """

    def __init__(
        self,
        plan: Plan,
        params: Any,
        tokenizer: Tokenizer,
        *,
        max_len: int,
        experts: str,
        dtype: Any,
        progress: bool,
        directory: Path | None = None,
    ):
        self.config: ModelConfig = plan.config
        self.drafter: AnyDrafterConfig | None = plan.drafter
        self.tokenizer = tokenizer
        self.max_len = max_len
        self.experts = experts
        self._plan, self._params, self._dtype = plan, params, dtype
        self._progress = progress
        Conversing.__init__(self, directory)
        self._programs: dict[tuple[int, int], Any] = {}
        self._makers: dict[int, Any] = {}
        self._idle: tuple[int, State] | None = None
        self._decodings: weakref.WeakSet[Decoding] = weakref.WeakSet()

    @property
    def block(self) -> int:
        """Rows of a verified block: the anchor and the drafts; 1 without a drafter."""
        return 1 if self.drafter is None else self.drafter.block_size

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return self._plan.shards

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(self.config.eos_token_ids or self.tokenizer.eos_ids)

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """Answers a prompt, or a batch of prompts together, in one launch.

        Args:
          prompt: text or token ids, or a list of them.
          **options: max_tokens=256; temperature=0.0 (greedy); top_p=1.0; top_k=0 (all); seed=0;
            speculative=True (False: the same program without drafts); max_draft=None (drafted
            tokens to verify a round, 0 to block - 1); ignore_eos=False.

        Returns:
          an Output; for a list of prompts a list of them. Sampled noise is keyed by the seed, the
          prompt's place in the list and the position.

        Raises:
          MimoError: for an option or a prompt that is not allowed.
        """
        checked = Options.check(self.block, self.config.vocab_size, options)
        prompts, single = self._prompts(prompt)
        decoding = Decoding(self, len(prompts))
        try:
            decoding.append(prompts, checked)
            decoding.advance(decoding.limits)
            outputs = decoding.outputs()
        finally:
            decoding.release()
        return outputs[0] if single else outputs

    def stream(
        self, prompt: Prompt, *, every: int | None = None, **options: Any
    ) -> Iterator[Piece]:
        """Answers a prompt piece by piece: the text and tokens of `generate`, as they come.

        Stop iterating, or close the iterator, to cancel.

        Args:
          prompt: text or token ids.
          every: tokens that a piece has at least, but for the last: the program pauses after the
            round that reaches them. By default after the first, and then after about as many as
            come in a fifth of a second.
          **options: as for `generate`.

        Returns:
          an iterator of pieces. Their texts hold whole characters; joined, they are the answer's.

        Raises:
          MimoError: at once, for an option or a prompt that is not allowed.
        """
        check_every(every)
        checked = Options.check(self.block, self.config.vocab_size, options)
        tokens = self._encode(prompt)
        check_room(self.max_len, len(tokens))
        return self._pieces(tokens, every, checked)

    def _pieces(self, tokens: list[int], every: int | None, options: Options) -> Iterator[Piece]:
        decoding = Decoding(self, 1)
        try:
            decoding.append([tokens], options)
            yield from decoding.pieces(every)
        finally:
            decoding.release()

    def session(self) -> "Session":
        """Starts a conversation that keeps its caches between turns."""
        self._check_open()
        return Session(self)

    def close(self) -> None:
        """Frees the parameters and caches, sessions' too; the engine cannot be used any more."""
        self._close_format()
        for decoding in list(self._decodings):
            decoding.drop()
        if self._params is not None:
            for leaf in jax.tree.leaves((self._params, self._idle)):
                if isinstance(leaf, jax.Array):
                    leaf.delete()
        self._params = self._idle = None
        self._programs.clear()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Engine({self.config.num_hidden_layers} layers, block {self.block}, max_len "
            f"{self.max_len}, experts {self.experts}, {self.devices} device(s))"
        )

    def summary(self) -> str:
        """A few lines on the model, its memory and its mesh."""
        self._check_open()
        config, leaves = self.config, jax.tree.leaves(self._params)
        first = self._plan.mesh.devices.flat[0]
        held = sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == first)
        moe, full = sum(config.moe_layer_freq), config.hybrid_layer_pattern.count(0)
        drafter = "none"
        if self.drafter is not None:
            kind = next(kind for kind, part in DRAFTERS.items() if part == self.drafter.part)
            drafter = f"{kind}, {self.drafter.num_hidden_layers} layers"
        return "\n".join(
            [
                f"layers      {config.num_hidden_layers}: {full} full attention, {moe} with "
                f"{config.n_routed_experts} experts, {config.num_experts_per_tok} active",
                f"drafter     {drafter}, block {self.block}",
                f"parameters  {sum(x.nbytes for x in leaves) / 1e6:.1f} MB, {held / 1e6:.1f} MB a "
                f"device; experts {self.experts}, others {jnp.dtype(self._dtype).name}",
                f"devices     {self.devices} x {first.device_kind} ({self._plan.layout} layout)",
                f"max_len     {self.max_len}",
            ]
        )

    def _check_open(self) -> None:
        if self._params is None:
            raise MimoError("This engine was closed: load the checkpoint again.")

    def _prompts(self, prompt: Any) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether it was a single one."""
        ids = token_ids(prompt)
        if isinstance(prompt, str) or ids:
            return [self._encode(prompt)], True
        if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence) or not prompt:
            raise MimoError(
                f"prompt={prompt!r} is not allowed: it must be a str, token ids, or a list of at "
                "least one of these."
            )
        return [self._encode(p) for p in prompt], False

    def _encode(self, prompt: Any) -> list[int]:
        tokens = token_ids(prompt)
        if isinstance(prompt, str):
            check_text(prompt, "The prompt")
            tokens = list(self.tokenizer.encode(prompt))
        elif tokens is None:
            raise MimoError(f"prompt={prompt!r} is not allowed: it must be a str or token ids.")
        vocab = self.config.vocab_size
        strange = [token for token in tokens if not 0 <= token < vocab]
        if strange:
            raise MimoError(f"token id {strange[0]} is not in the vocabulary: 0 to {vocab - 1}.")
        if not tokens:
            raise MimoError("The prompt is empty: give at least one character to go on from.")
        return tokens

    def _spelled(self, tokens: Sequence[int]) -> list[int]:
        """Tokens that have text: vocabularies are padded, with ids that the tokenizer lacks."""
        return [token for token in tokens if token < self.tokenizer.vocab_size]

    def _program(self, batch: int, chunk: int, state: State, request: Any) -> tuple[Any, float]:
        """The compiled program, and the seconds that compiling took now."""
        if (batch, chunk) in self._programs:
            return self._programs[batch, chunk], 0.0
        settings = Settings(batch, self.max_len, self.block, chunk, self._dtype)
        self._say(f"Compiling for a batch of {batch}, prefill chunks of {chunk} ...")
        start = time.perf_counter()
        program = make_program(self._plan, settings)
        compiled = program.lower(self._params, state, request).compile()
        seconds = time.perf_counter() - start
        kept = ", cached for the next time" if jax.config.jax_compilation_cache_dir else ""
        self._say(f"Compiled in {seconds:.1f} s{kept}.")
        self._programs[batch, chunk] = compiled
        return compiled, seconds

    def _take(self, batch: int) -> State:
        """A state for that many sequences: the last one given back, if it fits, or a new one."""
        self._check_open()
        idle, self._idle = self._idle, None
        if idle is not None and idle[0] == batch:
            return idle[1]
        del idle  # Before the next is made: both may not fit.
        settings = Settings(batch, self.max_len, self.block, CHUNKS[-1], self._dtype)
        check_state(self._plan, settings)
        if batch not in self._makers:
            self._makers[batch] = state_maker(self._plan, settings)
        return self._makers[batch]()

    def _say(self, message: str) -> None:
        if self._progress:
            print(message, file=sys.stderr, flush=True)


def token_ids(prompt: Any) -> list[int] | None:
    """A sequence or an array of whole numbers as a list; None if it is something else."""
    if isinstance(prompt, np.ndarray | jax.Array):
        ids = np.asarray(prompt)  # At once: JAX hands out elements one by one.
        return ids.tolist() if ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) else None
    if isinstance(prompt, str | bytes | bytearray):
        return None
    try:
        values = list(prompt)
        flags = any(isinstance(value, bool | np.bool_) for value in values)
        return None if flags else [operator.index(value) for value in values]
    except TypeError:
        return None


class Session:
    """A conversation: what was said stays in the caches, the drafter's too.

    Made by `Engine.session`.

    Its text is one growing sequence, end-of-sequence tokens included: each turn's answer is what
    `generate` would give for everything before it.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._decoding: Decoding | None = Decoding(engine, 1)
        self._turn = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens so far: every turn's text and answer."""
        return tuple(self._open().tokens[0])

    def send(self, text: Prompt, **options: Any) -> Output:
        """Adds text and answers it.

        If it is interrupted, the text was not added.

        Args:
          text: or token ids.
          **options: as for `Engine.generate`.

        Raises:
          MimoError: for an option that is not allowed, or text that the cache has no room for; the
            session then stays as it was.
        """
        decoding, tokens, checked = self._checked(text, options)
        self._turn += 1
        decoding.append([tokens], checked)
        decoding.advance(decoding.limits)
        return decoding.outputs()[0]

    def stream(self, text: Prompt, *, every: int | None = None, **options: Any) -> Iterator[Piece]:
        """The same, piece by piece.

        Close the iterator to stop the answer: what was said stays in the session.

        Args:
          text: as for `send`.
          every: as for `Engine.stream`.
          **options: as for `Engine.generate`.

        Raises:
          MimoError: as `send`, at once; and at the next piece if the session went on meanwhile.
        """
        check_every(every)
        _, tokens, checked = self._checked(text, options)
        return self._pieces(tokens, checked, every, self._turn)

    def _checked(self, text: Prompt, options: dict) -> tuple[Decoding, list[int], Options]:
        """What is needed to answer a text, or an error."""
        engine, decoding = self._engine, self._open()
        checked = Options.check(engine.block, engine.config.vocab_size, options)
        tokens = engine._encode(text)
        check_room(engine.max_len, len(tokens), held=len(decoding.tokens[0]))
        return decoding, tokens, checked

    def _pieces(
        self, tokens: list[int], options: Options, every: int | None, turn: int
    ) -> Iterator[Piece]:
        self._check_turn(turn)
        self._turn = turn = turn + 1
        decoding = self._open()
        decoding.append([tokens], options)
        for piece in decoding.pieces(every):
            yield piece
            if piece.stats is None:
                self._check_turn(turn)

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise MimoError("The session went on while this stream was open: ask anew.")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the caches back; the session cannot be used any more."""
        if self._decoding is not None:
            self._decoding.release()
            self._decoding = None

    def _open(self) -> Decoding:
        if self._decoding is None:
            raise MimoError("This session was closed: start another with engine.session().")
        return self._decoding
