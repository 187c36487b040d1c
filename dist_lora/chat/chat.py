"""One answer, or a chat that streams, by a model that lies whole on this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_lora.base.llama import Llama
from dist_lora.data.chat import encode_prompt, encode_text
from dist_lora.evaluation.generate import generate
from dist_lora.world.world import World


@dataclass(frozen=True)
class Speaker:
    """A model with what turns text into its ids and back, and what ends its answers."""

    model: Llama
    tokenizer: Any
    stop_ids: frozenset[int]
    max_new_tokens: int

    def answer(self, messages: list[dict[str, Any]], *, show: Callable[[str], None]) -> str:
        """The assistant's next turn; ``show`` is given each piece of it as it comes."""
        return self._write(encode_prompt(messages, tokenizer=self.tokenizer), show=show)

    def go_on(self, text: str, *, show: Callable[[str], None]) -> str:
        """What follows a text; ``show`` is given each piece of it as it comes."""
        return self._write(encode_text(text, tokenizer=self.tokenizer), show=show)

    def _write(self, prompt: list[int], *, show: Callable[[str], None]) -> str:
        ids: list[int] = []
        shown = ""

        def on_token(token: int) -> None:
            nonlocal shown
            ids.append(token)
            text = self.tokenizer.decode(ids)
            # A character that is cut in two by the tokens decodes to a mark that a later token replaces.
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
        )
        return str(self.tokenizer.decode(answers[0]))


def continue_text(speaker: Speaker, *, prompt: str | None) -> None:
    """Go on with ``prompt`` on stdout, or with one text after another that the terminal gives, until it is closed."""
    while (text := prompt if prompt is not None else _ask()) is not None:
        speaker.go_on(text, show=_write)
        print(flush=True)
        if prompt is not None:
            return


def chat(speaker: Speaker, *, prompt: str | None, system: str | None) -> None:
    """Answer ``prompt`` on stdout, or hold a chat on the terminal until it is closed (Ctrl-D)."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while True:
        asked = prompt if prompt is not None else _ask()
        if asked is None:
            return
        messages.append({"role": "user", "content": asked})
        answer = speaker.answer(messages, show=_write)
        print(flush=True)
        if prompt is not None:
            return
        messages.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    """The next line that is not empty; None at the end. Only a person is prompted, not a file or a pipe."""
    mark = "> " if sys.stdin.isatty() else ""
    try:
        while not (asked := input(mark).strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        if mark:
            print()
        return None
    return asked


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
