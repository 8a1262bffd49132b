"""Answers to conversations: decoded, taken apart as they come, and kept in the caches for more."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from mimo_jax.decode.batch import Decoding, check_room
from mimo_jax.decode.options import Options
from mimo_jax.decode.output import Stats
from mimo_jax.errors import MimoError
from mimo_jax.text.answer import AnswerParser, ToolCall
from mimo_jax.text.chat import GENERATION, ChatFormat, Prompt, check_asked
from mimo_jax.text.messages import check_message
from mimo_jax.text.parts import Part, decode, merge, remainder
from mimo_jax.text.tokenizer import Detokenizer

_log = logging.getLogger("mimo_jax")


@dataclasses.dataclass(frozen=True)
class ChatOutput:
    """An assistant's answer. `str(output)` is its content.

    Attributes:
      content: what is for the user.
      reasoning: what the model thought before.
      tool_calls: functions that it asks to be called, values as it wrote them.
      problems: what was malformed or not closed, in words; malformed calls are in the content.
      text: all that it wrote, control tokens such as <think> spelled out.
      tokens: ids of the answer, without an end-of-sequence token.
      finish_reason: "stop", "tool_calls" (stopped, to wait for results), "length" at the budget or
        the cache's end, "cancelled" where a stream was closed.
      stats: what it took; prompt_tokens counts those that were not in the caches already.
    """

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    problems: tuple[str, ...]
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    stats: Stats

    def __str__(self) -> str:
        """The content."""
        return self.content

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message for the history, its reasoning and its calls included."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
                for c in self.tool_calls
            ]
        return message


@dataclasses.dataclass(frozen=True)
class ChatDelta:
    """A part of a streamed answer; the last one has the whole in `output`."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    output: ChatOutput | None = None


class Turn:
    """One answer while it is decoded. Its prompt must have been appended to the decoding."""

    def __init__(self, decoding: Decoding, in_think: bool):
        self._decoding = decoding
        self._parser = AnswerParser(in_think)
        self._detokenizer = Detokenizer(decoding.engine.tokenizer, controls=True)
        self._texts: list[str] = []
        self._shown = 0
        self._output: ChatOutput | None = None

    def deltas(self, every: int | None) -> Iterator[ChatDelta]:
        """Decodes as `Decoding.step` does; the last delta has the output."""
        decoding = self._decoding
        while True:
            decoding.step(every)
            delta = self._take_in()
            if decoding.over:
                yield dataclasses.replace(delta, output=self.finish())
                return
            yield delta

    def _take_in(self) -> ChatDelta:
        """What the tokens that are new add to the answer."""
        decoding = self._decoding
        fresh = decoding.answer(0, self._shown)
        self._shown += len(fresh)
        found = self._say(self._detokenizer.push(decoding.engine._spelled(fresh)))
        if not decoding.over:
            return found
        last = self._end()
        return ChatDelta(
            found.content + last.content,
            found.reasoning + last.reasoning,
            found.tool_calls + last.tool_calls,
        )

    def _say(self, text: str) -> ChatDelta:
        self._texts.append(text)
        delta = self._parser.push(text)
        return ChatDelta(delta.content, delta.reasoning, delta.tool_calls)

    def _end(self) -> ChatDelta:
        """What was kept back: half of a character, or of a control token."""
        text = self._detokenizer.finish()
        self._texts.append(text)
        delta = self._parser.finish(text)
        return ChatDelta(delta.content, delta.reasoning, delta.tool_calls)

    def finish(self) -> ChatOutput:
        """The answer as it is now: over, or cancelled here."""
        if self._output is not None:
            return self._output
        decoding = self._decoding
        if not decoding.over:
            self._end()
        answer, output = self._parser.answer, decoding.outputs()[0]
        reason = output.finish_reason if decoding.over else "cancelled"
        if reason == "stop" and answer.tool_calls:
            reason = "tool_calls"
        self._output = ChatOutput(
            content=answer.content,
            reasoning=answer.reasoning,
            tool_calls=answer.tool_calls,
            problems=answer.problems,
            text="".join(self._texts),
            tokens=decoding.answer(0)[: self._shown],
            finish_reason=reason,
            stats=output.stats,
        )
        return self._output


def chat_options(engine: Any, options: Mapping[str, Any], length: int) -> Options:
    """A caller's options over the checkpoint's defaults.

    Args:
      engine: the Engine.
      options: of the caller.
      length: tokens of the whole prompt: an answer may be as long as the cache has room for.

    Raises:
      MimoError: for an option that is not allowed.
    """
    sizes = engine.block, engine.config.vocab_size
    given, found = {k: v for k, v in options.items() if v is not None}, engine._chat_format()
    theirs = {name: value for name, value in found.sampling.items() if name not in given}
    try:
        Options.check(*sizes, theirs)
    except MimoError as error:
        raise MimoError(f"{found.where}/{GENERATION} cannot be used: {error}") from None
    room = {"max_tokens": max(engine.max_len - length, 1)}
    return Options.check(*sizes, room | theirs | given)


def chat_deltas(
    engine: Any, prompt: Prompt, options: Mapping[str, Any], every: int | None
) -> Iterator[ChatDelta]:
    """Answers a prompt that nothing is held of; options are checked at once.

    Args:
      engine: the Engine.
      prompt: rendered.
      options: of the caller.
      every: tokens that a delta is made of at least; None: see `Engine.stream`.

    Raises:
      MimoError: for options that are not allowed, or a prompt that the cache has no room for.
    """
    tokens = engine._chat_format().encode(prompt.parts)
    checked = chat_options(engine, options, len(tokens))
    check_room(engine.max_len, len(tokens))
    return _deltas(engine, tokens, prompt.in_think, checked, every)


def _deltas(
    engine: Any, tokens: list[int], in_think: bool, options: Options, every: int | None
) -> Iterator[ChatDelta]:
    decoding = Decoding(engine, 1, engine.chat_stop_ids)
    try:
        decoding.append([tokens], options)
        yield from Turn(decoding, in_think).deltas(every)
    finally:
        decoding.release()


class ChatSession:
    """A conversation that remembers: its messages, and in the caches what was read and said.

    Made by `Engine.chat_session`. A turn reads only what is new, if the conversation as it is now
    rendered begins with what the caches hold; otherwise (a template that drops earlier reasoning,
    for one) it reads everything anew, and says so in the log at debug level.

    Example:
      session = engine.chat_session(system="Answer in one sentence.")
      print(session.send("What is a monad?"))
      for delta in session.stream("And a comonad?"):
          print(delta.content, end="", flush=True)
    """

    def __init__(
        self,
        engine: Any,
        *,
        system: str | None,
        tools: Any,
        thinking: bool,
        keep_all_reasoning: bool,
    ):
        self._engine = engine
        self._format: ChatFormat = engine._chat_format()
        self._format.check()
        check_asked(tools, thinking, keep_all_reasoning)
        self._ask = {
            "tools": tools,
            "thinking": thinking,
            "keep_all_reasoning": keep_all_reasoning,
        }
        self._decoding: Decoding | None = None
        self._held: list[Part] | None = []
        self._turn = 0
        self.reset(system)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A copy of the conversation so far."""
        return [dict(message) for message in self._messages]

    def reset(self, system: str | None = None) -> None:
        """Forgets the conversation, and begins another with this system message, if any."""
        given = {"role": "system", "content": system}
        self._messages = [] if system is None else [check_message(given, "the system message")]
        self._turn += 1

    def send(self, message: Any, **options: Any) -> ChatOutput:
        """Answers a message in the light of all before it.

        Args:
          message: a user's text, or a message, or a list of them: such as tools' results,
            {"role": "tool", "content": "..."}.
          **options: as for `Engine.chat`.

        Raises:
          MimoError: for a message or an option that is not allowed, or if the cache has no room;
            the conversation then stays as it was.
        """
        return list(self._begin(message, options, self._engine.max_len))[-1].output

    def stream(
        self, message: Any, *, every: int | None = None, **options: Any
    ) -> Iterator[ChatDelta]:
        """The same, piece by piece.

        Close the iterator to stop the answer: what was said stays in the conversation.

        Args:
          message: as for `send`.
          every: tokens that a delta is made of at least; by default see `Engine.stream`.
          **options: as for `Engine.chat`.

        Raises:
          MimoError: as `send`, for messages and options at once.
        """
        check_every(every)
        return self._begin(message, options, every)

    def __enter__(self) -> "ChatSession":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the caches back; the conversation can go on, and reads everything anew."""
        if self._decoding is not None:
            self._decoding.release()
        self._decoding, self._held = None, []

    def _begin(
        self, message: Any, options: Mapping[str, Any], every: int | None
    ) -> Iterator[ChatDelta]:
        """Checks all that can be checked before the answer begins."""
        if isinstance(message, str):
            message = {"role": "user", "content": message}
        added = list(message) if isinstance(message, list | tuple) else [message]
        history = [*self._messages, *added]
        prompt = self._format.render(history, **self._ask)
        history = [check_message(m, f"messages[{i}]") for i, m in enumerate(history)]
        checked = chat_options(self._engine, options, 0)
        budget = options.get("max_tokens")
        return self._run(history, prompt, checked, budget, every, self._turn)

    def _run(
        self,
        history: list,
        prompt: Prompt,
        options: Options,
        budget: int | None,
        every: int | None,
        turn: int,
    ) -> Iterator[ChatDelta]:
        self._check_turn(turn)
        decoding = self._append(prompt, options, budget)
        self._turn = turn = self._turn + 1
        run = Turn(decoding, prompt.in_think)
        try:
            for delta in run.deltas(every):
                yield delta
                self._check_turn(turn)
        finally:
            # Also when the answer was stopped: by closing the stream, or by Ctrl-C in a launch.
            if turn == self._turn:
                self._keep(history, prompt, run, decoding)

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise MimoError("The conversation went on while this stream was open: ask anew.")

    def _append(self, prompt: Prompt, options: Options, budget: int | None) -> Decoding:
        """Puts what the caches do not hold yet after what they hold."""
        rest = None
        if self._decoding is not None and self._held is not None:
            rest = remainder(self._held, prompt.parts)
        if not rest:
            if self._held:
                _log.debug("The conversation does not begin with what is held: it is read anew.")
            self.close()
            self._decoding = Decoding(self._engine, 1, self._engine.chat_stop_ids)
            rest = prompt.parts
        tokens = self._format.encode(rest)
        if budget is None:
            room = self._engine.max_len - len(self._decoding.tokens[0]) - len(tokens)
            options = dataclasses.replace(options, max_tokens=max(room, 1))
        self._decoding.append([tokens], options)
        # Until the answer is kept, what the caches hold is known to nobody.
        self._held = None
        return self._decoding

    def _keep(self, history: list, prompt: Prompt, run: Turn, decoding: Decoding) -> None:
        """Makes the answer a part of the conversation, and notes what the caches hold."""
        said = decoding.tokens[0][int(decoding.starts[0]) :]
        if said:
            self._messages = [*history, run.finish().message]
        if decoding.state is None or not said:
            self.close()
        else:
            self._held = merge([*prompt.parts, *decode(said, self._engine.tokenizer)])


def check_every(every: Any) -> None:
    """Raises a MimoError unless it is a whole number of tokens, 1 or more, or None."""
    if every is None:
        return
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise MimoError(
            f"every={every!r} is not allowed: it must be a whole number, 1 or more, or None."
        )
