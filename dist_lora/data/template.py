"""A chat template applied to a conversation: its text, and the span of each turn in it.

The template is the authority: what it renders is what is trained on. It is a program of a stranger, and may fail in any way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dist_lora.data.records import Chat
from dist_lora.data.turns import Turn
from dist_lora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = "26 Jul 2024"
"""The date that Llama 3.1's own template falls back to."""

BUNDLED: Mapping[str, tuple[str, ...]] = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    **dict.fromkeys(
        ("llama3.1", "llama3.2"),
        (
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<|python_tag|>",
        ),
    ),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
"""Our own templates, in ``templates/``, each with the special tokens that it writes."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` of a rendered text."""

    start: int
    end: int


@lru_cache(maxsize=8)
def special_ids(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Name and id of each special token, which only a template may write."""
    return {token.content: int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def added_ids(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Name and id of each token beside those of the text: special ones, and others that were added."""
    return {token.content: int(index) for index, token in tokenizer.added_tokens_decoder.items()}


@dataclass(frozen=True)
class Renderer:
    """The chat template applied to the first turns of a conversation."""

    chat: Chat
    tokenizer: PreTrainedTokenizerBase

    def upto(self, num_turns: int, *, has_prompt: bool = False) -> str:
        """The text of the first turns, and with ``has_prompt`` the generation prompt."""
        return self._render([turn.as_message() for turn in self.chat.turns[:num_turns]], has_prompt=has_prompt)

    def span(self, index: int, whole: str) -> Span:
        """The characters of ``whole`` that belong to a turn; an assistant's begin after its prompt.

        Raises:
            DataError: the template renders the turns up to this one differently when more follow.
        """
        is_answer = self.chat.turns[index].role == "assistant"
        before = self.upto(index, has_prompt=is_answer) if index else self._before_first(is_answer=is_answer)
        through = self.upto(index + 1)
        for text in (before, through):
            if not whole.startswith(text):
                same = _common_prefix(text, whole)
                raise DataError(
                    f"the chat template renders the turns up to number {index} differently when more follow "
                    f"(from character {same}: {text[same : same + 30]!r}, "
                    f"then {whole[same : same + 30]!r}), so its targets can't be determined. "
                    "Set data.train_on: last, or data.chat_template to another template"
                )
        if is_answer:
            through = _through_end_token(through, special_pattern(self.tokenizer))
        return Span(start=len(before), end=max(len(through), len(before)))

    def _before_first(self, *, is_answer: bool) -> str:
        """What comes before a first turn's content; most templates refuse to render no turn at all."""
        if not is_answer:
            return ""
        first = self.chat.turns[0]
        one, other = (self._render([Turn(first.role, text).as_message()], has_prompt=False) for text in ("0", "1"))
        return one[: _common_prefix(one, other)]

    def marked(self) -> list[Span] | None:
        """What the template itself marks as generated, with ``{% generation %}``, of the whole text; None if it marks nothing.

        Source: transformers 5.23, ``return_assistant_tokens_mask``.
        """
        if not _GENERATION.search(self.template):
            return None
        _, spans = self._apply([turn.as_message() for turn in self.chat.turns], has_prompt=False, has_spans=True)
        return [Span(start, end) for start, end in spans]

    @property
    def template(self) -> str:
        """The template's text.

        Raises:
            DataError: the tokenizer has several, and none for these tools.
        """
        try:
            return str(self.tokenizer.get_chat_template(tools=list(self.chat.tools) or None))
        except ValueError as error:
            raise DataError(f"{template_source(self.tokenizer)}: {first_line(error)}") from None

    def _render(self, messages: list[dict[str, Any]], *, has_prompt: bool) -> str:
        return self._apply(messages, has_prompt=has_prompt, has_spans=False)[0]

    def _apply(
        self, messages: list[dict[str, Any]], *, has_prompt: bool, has_spans: bool
    ) -> tuple[str, Sequence[tuple[int, int]]]:
        """The rendered text, and with ``has_spans`` the spans that the template marks in it."""
        from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.template
        names: dict[str, Any] = {**self.tokenizer.special_tokens_map, "date_string": TEMPLATE_DATE}
        if self.chat.builtin_tools:  # Llama 3.1's template asks whether it is defined
            names["builtin_tools"] = list(self.chat.builtin_tools)
        try:
            rendered: Any = render_jinja_template(
                [messages],
                tools=list(self.chat.tools) or None,
                chat_template=_FIXED_DATE + template,
                return_assistant_tokens_mask=has_spans,
                add_generation_prompt=has_prompt,
                **names,
            )
            return str(rendered[0][0]), rendered[1][0] if has_spans else ()
        except Exception as error:  # a template is a program: it may fail in any way
            source = template_source(self.tokenizer)
            if type(error) in (TemplateError, TypeError, UndefinedError):
                roles = " ".join(str(message["role"]) for message in messages)
                raise DataError(
                    f"the chat template ({source}) refuses the turns '{roles}': {error}{_several_calls(messages, source)}"
                ) from None
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise DataError(
                f"the chat template ({source}{line}) can't be used: {type(error).__name__}: {first_line(error)}. Set "
                f"data.chat_template to another: {', '.join(BUNDLED)} or a FILE"
            ) from None


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where the template in use comes from: the setting, or the model's folder."""
    return str(getattr(tokenizer, "template_source", "") or tokenizer.name_or_path)


def _several_calls(messages: Sequence[Mapping[str, Any]], source: str) -> str:
    """What to do where a turn has several calls, which most of Llama's own templates refuse."""
    several = [index for index, message in enumerate(messages) if len(message.get("tool_calls", ())) > 1]
    is_ours = any(source.endswith(f": {name}") for name in BUNDLED)
    if not several or is_ours:  # ours write several calls: something else is refused
        return ""
    return (
        f" (turn {several[0]} has {len(messages[several[0]]['tool_calls'])} calls). For several calls in a turn set "
        "data.chat_template: llama3.1 (JSON) or llama3.2 (a Python list)"
    )


# A macro shadows the global of the same name, so that no template gets the current day.
_FIXED_DATE = "{%- macro strftime_now(format) -%}" + TEMPLATE_DATE + "{%- endmacro -%}"


def _common_prefix(one: str, other: str) -> int:
    """The length of the longest common prefix."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _through_end_token(text: str, special: re.Pattern[str]) -> str:
    """The text without what follows a turn's end token: a model that stops there never writes it."""
    bare = text.rstrip()
    ends = [match.end() for match in special.finditer(bare)]
    return bare if ends and ends[-1] == len(bare) else text


@lru_cache(maxsize=8)
def _pattern_of(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the name of any special token."""
    return _pattern_of(tuple(name for name in special_ids(tokenizer) if len(name) > 1))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, shortened."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]
