"""How a checkpoint's conversations are written: its template, or MiMo's own format.

What is guaranteed of a rendered prompt: in MiMo's own format no content can become a control token,
whatever is spelled in it. With a template the same holds as far as `ChatTemplate.render` says.
"""

import dataclasses
from pathlib import Path
from typing import Any

from mimo_jax.errors import MimoError
from mimo_jax.json_files import parse_json
from mimo_jax.text import mimo_format
from mimo_jax.text.answer import THINK
from mimo_jax.text.messages import check_messages, check_tools
from mimo_jax.text.parts import Part, encode
from mimo_jax.text.template import ChatTemplate
from mimo_jax.text.tokenizer import Tokenizer

GENERATION = "generation_config.json"
SAMPLING = ("temperature", "top_p", "top_k")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    Attributes:
      parts: merged.
      in_think: whether it ends inside of a think block that the answer goes on with.
    """

    parts: tuple[Part, ...]
    in_think: bool


class ChatFormat:
    """Renders the conversations of one checkpoint.

    Args:
      tokenizer: of the checkpoint.
      template: of the checkpoint, or None for MiMo's own format.
      compact: whether tool calls of MiMo's own format are written without newlines (V2.6).
      generation: what generation_config.json holds.
      where: the checkpoint, for errors.

    Attributes:
      sampling: temperature, top_p and top_k as generation_config.json has them; its do_sample and
        max_new_tokens are not used: in MiMo's releases they contradict the others.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        *,
        compact: bool = False,
        generation: dict[str, Any] | None = None,
        where: str = "The checkpoint",
    ):
        self.tokenizer, self.template = tokenizer, template
        self.compact, self.where = compact, where
        generation = generation or {}
        self.sampling = {k: generation[k] for k in SAMPLING if generation.get(k) is not None}
        self._eos = generation.get("eos_token_id")

    @classmethod
    def open(cls, directory: Path, tokenizer: Tokenizer, compact: bool = False) -> "ChatFormat":
        """Reads what a checkpoint's directory says on conversations.

        Raises:
          MimoError: if one of its files cannot be read.
        """
        path = directory / GENERATION
        generation = parse_json(path.read_bytes(), str(path)) if path.is_file() else {}
        template = ChatTemplate.find(directory)
        return cls(
            tokenizer, template, compact=compact, generation=generation, where=str(directory)
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: <|im_end|>, <|endoftext|>, and generation_config.json's."""
        listed = self._eos if isinstance(self._eos, list) else [self._eos]
        whole = [id for id in listed if isinstance(id, int) and not isinstance(id, bool)]
        return tuple(dict.fromkeys([*self.tokenizer.eos_ids, *whole]))

    def render(
        self,
        messages: Any,
        tools: Any = None,
        *,
        thinking: bool = True,
        keep_all_reasoning: bool = True,
    ) -> Prompt:
        """A conversation up to where the assistant is to go on.

        Args:
          messages: as for `check_messages`.
          tools: as for `check_tools`.
          thinking: whether the assistant may think before it answers (`enable_thinking`).
          keep_all_reasoning: whether the reasoning of turns before the last user's message stays.

        Raises:
          MimoError: for messages or tools that are not allowed, a template that fails, or a
            tokenizer that was not made for conversations.
        """
        checked = check_messages(messages)
        tools = check_asked(tools, thinking, keep_all_reasoning)
        self.check()
        if self.template is None:
            parts = mimo_format.render(
                checked,
                tools,
                thinking=thinking,
                keep_all_reasoning=keep_all_reasoning,
                compact=self.compact,
            )
        else:
            parts = self.template.render(
                checked,
                tools,
                list(self.tokenizer.control_ids),
                enable_thinking=thinking,
                keep_all_reasoning=keep_all_reasoning,
            )
        ending = "".join(part.text for part in parts[-2:]).rstrip()
        return Prompt(tuple(parts), ending.endswith(THINK))

    def encode(self, parts: Any) -> list[int]:
        """Token ids of parts."""
        return encode(parts, self.tokenizer)

    def check(self) -> None:
        """Raises a MimoError if the checkpoint was not made for conversations."""
        if self.template is not None:
            return
        missing = [
            part.text for part in mimo_format.NEEDED if part.text not in self.tokenizer.control_ids
        ]
        if missing:
            raise MimoError(
                f"{self.where} has no chat template, and its tokenizer lacks {', '.join(missing)}: "
                "it is a base model, which goes on with a text but knows no conversations. Use "
                "engine.generate (mimo generate), or put the model's chat_template.jinja beside "
                "its config.json."
            )

    def close(self) -> None:
        """Ends the process that renders templates, if there is one."""
        if self.template is not None:
            self.template.close()


def check_asked(tools: Any, thinking: Any, keep_all_reasoning: Any) -> Any:
    """What a conversation is asked for beside its messages; returns the tools.

    Raises:
      MimoError: for what is not allowed.
    """
    for name, value in (("thinking", thinking), ("keep_all_reasoning", keep_all_reasoning)):
        if not isinstance(value, bool):
            raise MimoError(f"{name}={value!r} is not allowed: it must be True or False.")
    return check_tools(tools)
