"""What an engine does with conversations: `chat`, `chat_stream` and `chat_session`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimo_jax.decode.chat import ChatDelta, ChatOutput, ChatSession, chat_deltas, check_every
from mimo_jax.decode.options import MOST_ENDS
from mimo_jax.errors import MimoError
from mimo_jax.text.chat import ChatFormat


class Conversing:
    """The Engine's side of conversations, a base of it.

    Args:
      directory: of the checkpoint, where its chat template and generation_config.json are; None
        for MiMo's own format.
    """

    def __init__(self, directory: Path | None = None):
        self._directory = directory
        self._format: ChatFormat | None = None

    def chat(
        self,
        messages: Any,
        *,
        tools: Any = None,
        thinking: bool = True,
        keep_all_reasoning: bool = True,
        **options: Any,
    ) -> ChatOutput:
        """Answers a conversation.

        It is written as the checkpoint's chat template says, or in MiMo's own format if there is
        none; the answer ends at <|im_end|>, <|endoftext|> or what generation_config.json lists.

        Args:
          messages: dicts with "role" (system, user, assistant or tool) and "content"; append
            `output.message` and what comes next for another turn.
          tools: that the model may ask to be called: dicts {"type": "function", "function":
            {"name", "description", "parameters"}}, the parameters a JSON schema.
          thinking: whether it may reason before it answers.
          keep_all_reasoning: False leaves out the reasoning of earlier turns.
          **options: as for `generate`, but max_tokens is by default what the cache has room for,
            and temperature, top_p and top_k are those of the checkpoint's generation_config.json,
            if it has one.

        Raises:
          MimoError: for messages, tools or an option that are not allowed, a chat template that
            fails, or a checkpoint that knows no conversations.
        """
        prompt = self._chat_prompt(messages, tools, thinking, keep_all_reasoning)
        return list(chat_deltas(self, prompt, options, self.max_len))[-1].output

    def chat_stream(
        self,
        messages: Any,
        *,
        tools: Any = None,
        thinking: bool = True,
        keep_all_reasoning: bool = True,
        every: int | None = None,
        **options: Any,
    ) -> Iterator[ChatDelta]:
        """Answers a conversation piece by piece: what `chat` answers, as it comes.

        Stop iterating, or close the iterator, to cancel.

        Args:
          messages: as for `chat`, and so are the others but for `every`.
          tools: see there.
          thinking: see there.
          keep_all_reasoning: see there.
          every: tokens that a delta is made of at least, but for the last; by default see
            `Engine.stream`.
          **options: see there.

        Returns:
          an iterator of deltas: more content, more reasoning, tool calls that are complete. The
          last one has the whole in `output`.

        Raises:
          MimoError: as `chat`, at once.
        """
        check_every(every)
        prompt = self._chat_prompt(messages, tools, thinking, keep_all_reasoning)
        return chat_deltas(self, prompt, options, every)

    def chat_session(
        self,
        *,
        system: str | None = None,
        tools: Any = None,
        thinking: bool = True,
        keep_all_reasoning: bool = True,
    ) -> ChatSession:
        """Starts a conversation that keeps its messages and its caches between turns.

        Args:
          system: the system message's text; by default what the template has.
          tools: as for `chat`, and so are the others.
          thinking: see there.
          keep_all_reasoning: see there.
        """
        self._check_open()
        return ChatSession(
            self,
            system=system,
            tools=tools,
            thinking=thinking,
            keep_all_reasoning=keep_all_reasoning,
        )

    @property
    def chat_stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer in a conversation."""
        ids = tuple(dict.fromkeys([*self.eos_ids, *self._chat_format().stop_ids]))
        if len(ids) > MOST_ENDS:
            raise MimoError(
                f"{self._directory} has {len(ids)} tokens that end an answer, {ids}; at most "
                f"{MOST_ENDS} are possible: shorten eos_token_id in its generation_config.json."
            )
        return ids

    def _chat_prompt(self, messages: Any, tools: Any, thinking: bool, keep: bool) -> Any:
        self._check_open()
        return self._chat_format().render(
            messages, tools, thinking=thinking, keep_all_reasoning=keep
        )

    def _chat_format(self) -> ChatFormat:
        """How the checkpoint's conversations are written; read when first needed."""
        if self._format is None:
            # Of the releases, V2.6 alone has such a router, and writes calls without newlines.
            compact = self.config.moe_router_dtype == "bfloat16"
            if self._directory is None:
                self._format = ChatFormat(self.tokenizer, compact=compact)
            else:
                self._format = ChatFormat.open(self._directory, self.tokenizer, compact)
        return self._format

    def _close_format(self) -> None:
        """Ends the process that renders templates, if there is one."""
        if self._format is not None:
            self._format.close()
