"""One answer, or a streamed chat, from a model that is not sharded."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_lora.base.llama import Llama
from dist_lora.data.chat import encode_instruction, encode_prompt, encode_text
from dist_lora.errors import ConfigError, DataError
from dist_lora.evaluation.generate import generate
from dist_lora.world.world import World

log = logging.getLogger("dist_lora")


@dataclass(frozen=True)
class ChatModel:
    """A model with its tokenizer and the ids that end its answers."""

    model: Llama
    tokenizer: Any
    stop_ids: frozenset[int]
    max_new_tokens: int

    def answer(self, messages: list[dict[str, Any]], *, show: Callable[[str], None]) -> str:
        """The assistant's next turn; ``show`` is called with each piece of it as it is generated."""
        return self._write(encode_prompt(messages, tokenizer=self.tokenizer), show=show)

    def complete(self, text: str, *, is_instruction: bool = False, show: Callable[[str], None]) -> str:
        """The continuation of a text, or the response to an instruction; ``show`` is called with each piece of it."""
        encode = encode_instruction if is_instruction else encode_text
        return self._write(encode(text, tokenizer=self.tokenizer), show=show)

    def _write(self, prompt: list[int], *, show: Callable[[str], None]) -> str:
        context = self.model.shape.context
        if len(prompt) >= context:
            raise ConfigError(
                f"the prompt has {len(prompt):,} tokens, and the model's context is {context:,} (max_position_embeddings "
                "in its config.json): no answer fits. Shorten the prompt, or begin a new chat"
            )
        ids: list[int] = []
        shown = ""

        def on_token(token: int) -> None:
            nonlocal shown
            ids.append(token)
            text = self.tokenizer.decode(ids)
            # A character split between two tokens decodes to U+FFFD until the second one has come.
            if not text.endswith("\ufffd"):
                show(text[len(shown) :])
                shown = text

        answers = generate(
            self.model,
            [prompt],
            stop_ids=self.stop_ids,
            max_new_tokens=self.max_new_tokens,
            world=World.alone(self.model.inv_freq.device),
            on_token=on_token,
            is_checked=True,
        )
        if len(prompt) + len(answers[0]) >= context and len(answers[0]) < self.max_new_tokens:
            log.warning(f"the answer was ended at {len(answers[0]):,} tokens: the model's context is {context:,}")
        return str(self.tokenizer.decode(answers[0]))


def continue_text(model: ChatModel, *, prompt: str | None, is_instruction: bool = False) -> None:
    """Continue ``prompt`` on stdout, or one text after another from the terminal, until it is closed (Ctrl-D)."""
    while (text := prompt if prompt is not None else _ask()) is not None:
        model.complete(text, is_instruction=is_instruction, show=_write)
        print(flush=True)
        if prompt is not None:
            return


def chat(model: ChatModel, *, prompt: str | None, system: str | None) -> None:
    """Answer ``prompt`` on stdout, or hold a chat on the terminal until it is closed (Ctrl-D)."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while True:
        request = prompt if prompt is not None else _ask()
        if request is None:
            return
        messages.append({"role": "user", "content": request})
        answer = model.answer(messages, show=_write)
        print(flush=True)
        if prompt is not None:
            return
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    """The next line that is not empty; None at the end. A terminal is shown a prompt, a file or pipe is not."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        while not (text := input(prompt).strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        if prompt:
            print()
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"standard input isn't UTF-8: byte 0x{error.object[error.start]:02x}") from None
    return text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
