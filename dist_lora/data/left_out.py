"""What of a conversation a chat template leaves out, found by marks: each text is replaced by a word of its own, and rendered.

A template is judged by what it renders, never by its text. Conversations of the same structure have the same marks, so most
records of a data set are judged by one rendering of the first of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dist_lora.data.records import Chat
from dist_lora.data.template import Renderer
from dist_lora.data.turns import REASONING, Turn
from dist_lora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A reasoning that stands in the content: many templates drop it of all but the last answers.
_THOUGHT = re.compile(r"(?P<open>\s*(?:<think>)?)(?P<thought>.*?)(?P<close></think>)(?P<rest>.*)", re.DOTALL)
# Of a message: what refers to a call. Templates check their form, and none of them is text.
_REFERENCES = ("id", "tool_call_id")


@dataclass(frozen=True)
class LeftOut:
    """What a template doesn't render of a conversation, and how it takes contents that are null.

    Args:
        refused: targets, calls, tools and texts that are lost, each as a sentence; training would be on something else.
        reported: what may be missing: the reasoning of earlier turns, keys of a message that no template knows.
        asks_for_null: whether the template tells a null content from an empty one, instead of writing "None".
    """

    refused: tuple[str, ...]
    reported: tuple[str, ...]
    asks_for_null: bool


@dataclass(frozen=True)
class _Mark:
    """A word in place of a text, and what that text is."""

    word: str
    what: str
    is_refused: bool


class _Marks:
    """A conversation in which each text is a word that nothing else contains."""

    def __init__(self, chat: Chat, *, null: str | None) -> None:
        self.marks: list[_Mark] = []
        self._names: dict[str, str] = {}  # of functions: a template may look one up among the tools
        self._builtin = chat.builtin_tools
        self._null = null
        answers = [index for index, turn in enumerate(chat.turns) if turn.role == "assistant"]
        self._last = answers[-1] if answers else -1
        self._reasons = self._last >= 0 and chat.turns[self._last].is_answer_to_learn
        tools = tuple(self._tool(tool, index) for index, tool in enumerate(chat.tools))
        turns = tuple(self._turn(turn, index) for index, turn in enumerate(chat.turns))
        self.chat = Chat(turns, tools, chat.builtin_tools)

    def _word(self, what: str, *, is_refused: bool) -> str:
        word = f"xq{len(self.marks):04d}qx"
        self.marks.append(_Mark(word, what, is_refused))
        return word

    def _turn(self, turn: Turn, index: int) -> Turn:
        where = f"the {turn.role} turn {index}"
        calls = tuple(self._call(call, f"{where}, call {number}") for number, call in enumerate(turn.tool_calls))
        extras = {key: self._extra(key, value, index, turn) for key, value in turn.extras.items()}
        return replace(turn, content=self._content(turn.content, where, index), tool_calls=calls, extras=extras)

    def _content(self, content: str | None, where: str, index: int) -> str | None:
        if content is None:
            return self._null
        thought = _THOUGHT.fullmatch(content)
        if thought is None or not thought["thought"].strip():
            return self._word(f"the text of {where}", is_refused=True) if content.strip() else content
        is_lost = index == self._last and self._reasons
        first = self._word(f"the reasoning in the text of {where}", is_refused=is_lost)
        rest = self._word(f"the text of {where}", is_refused=True) if thought["rest"].strip() else thought["rest"]
        return f"{thought['open']}{first}{thought['close']}{rest}"

    def _extra(self, key: str, value: Any, index: int, turn: Turn) -> Any:
        if key in _REFERENCES:
            return value
        is_reasoning = key in REASONING and turn.role == "assistant"
        is_refused = is_reasoning and index == self._last and self._reasons
        if key == "name" and isinstance(value, str):
            return self._name(value, f"{key} of {turn.role} turns", is_refused=False)
        what = f"{key} of the {turn.role} turn {index}" if is_refused else f"{key} of {turn.role} turns"
        return self._leaves(value, what, is_refused=is_refused)

    def _call(self, call: dict[str, Any], where: str) -> dict[str, Any]:
        function = call["function"]
        arguments = {
            key: self._leaves(value, f"the argument {key!r} of {where}", is_refused=True)
            for key, value in function["arguments"].items()
        }
        name = function["name"]
        if name not in self._builtin:  # how it is called may depend on its name, which need not be written
            name = self._name(name, f"the name of {where}", is_refused=True)
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _tool(self, tool: dict[str, Any], index: int) -> dict[str, Any]:
        inner = tool.get("function")
        holder = inner if isinstance(inner, dict) else tool
        if not isinstance(holder.get("name"), str):
            return tool
        named = {**holder, "name": self._name(holder["name"], f"tool {index}", is_refused=True)}
        return {**tool, "function": named} if isinstance(inner, dict) else named

    def _name(self, name: str, what: str, *, is_refused: bool) -> str:
        """The same word for the same name: one mark is enough to see that it comes out where it must."""
        if name not in self._names:
            self._names[name] = self._word(what, is_refused=is_refused)
        elif is_refused:
            word = self._names[name]
            self.marks = [
                replace(m, what=what, is_refused=True) if m.word == word and not m.is_refused else m for m in self.marks
            ]
        return self._names[name]

    def _leaves(self, value: Any, what: str, *, is_refused: bool) -> Any:
        if isinstance(value, dict):
            return {key: self._leaves(item, what, is_refused=is_refused) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._leaves(item, what, is_refused=is_refused) for item in value]
        if value is None or (isinstance(value, str) and not value.strip()):
            return value
        return self._word(what, is_refused=is_refused)


def left_out_of(chat: Chat, *, tokenizer: PreTrainedTokenizerBase) -> LeftOut:
    """What the tokenizer's template leaves out of a conversation.

    Raises:
        DataError: the template renders the conversation itself, but not one of its structure.
    """
    marked = _Marks(chat, null=None).chat
    # Without what refers to a call, which is another word in each record.
    messages = [_without(turn.as_message(), _REFERENCES) for turn in marked.turns]
    key = json.dumps(
        [messages, [turn.is_answer_to_learn for turn in marked.turns], marked.tools, chat.builtin_tools], default=str
    )
    template = Renderer(chat, tokenizer).template
    return _judged(_Key(key, template, [lambda: _judge(chat, tokenizer)]))


def _without(value: Any, keys: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class _Key:
    """A structure and a template, equal to those of another conversation; ``judge``, one function, is called for the first."""

    structure: str
    template: str
    judge: list[Callable[[], LeftOut]]

    def __hash__(self) -> int:
        return hash((self.structure, self.template))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and (self.structure, self.template) == (other.structure, other.template)


@lru_cache(maxsize=4096)
def _judged(key: _Key) -> LeftOut:
    return key.judge.pop()()  # taken out: the cache keeps keys, and would keep their conversations


def _judge(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> LeftOut:
    has_null = any(turn.content is None for turn in chat.turns)
    empty = _rendered(_Marks(chat, null=""), tokenizer)
    asks_for_null, marked, text = False, _Marks(chat, null=""), empty
    if has_null:
        with_null = _rendered(_Marks(chat, null=None), tokenizer)
        # Where it writes None, or fails at it, it expects a text.
        asks_for_null = with_null is not None and (empty is None or with_null.count("None") <= empty.count("None"))
        if asks_for_null:
            text = with_null
    if text is None:  # it refuses such words (a pattern, a language), though maybe not the texts themselves
        return LeftOut(tuple(_lost_texts(chat, tokenizer)), (), asks_for_null)
    missing = [mark for mark in marked.marks if mark.word not in text]
    refused = dict.fromkeys(mark.what for mark in missing if mark.is_refused)
    refused |= dict.fromkeys(_lost_calls(marked.chat, text, null=None if asks_for_null else "", tokenizer=tokenizer))
    without = replace(chat, builtin_tools=())
    if chat.builtin_tools and _rendered(_Marks(without, null=None if asks_for_null else ""), tokenizer) == text:
        refused["builtin_tools"] = None
    reported = dict.fromkeys(mark.what for mark in missing if not mark.is_refused)
    return LeftOut(tuple(refused), tuple(reported), asks_for_null)


def _lost_calls(chat: Chat, text: str, *, null: str | None, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The calls without arguments that aren't in ``text``, the rendered ``chat``: their names may stand there as tools'.

    Such a call is rendered again under another name: where the text is the same, nothing of it comes out.
    """
    turns = [replace(turn, content=null) if turn.tool_calls and not turn.content else turn for turn in chat.turns]
    for index, turn in enumerate(turns):
        for number, call in enumerate(turn.tool_calls):
            if call["function"]["arguments"]:
                continue
            other = {**call, "function": {**call["function"], "name": "xqnameqx"}}
            calls = (*turn.tool_calls[:number], other, *turn.tool_calls[number + 1 :])
            renamed = [*turns[:index], replace(turn, tool_calls=calls), *turns[index + 1 :]]
            try:
                again = Renderer(replace(chat, turns=tuple(renamed)), tokenizer).upto(len(turns))
            except DataError:  # it looks the name up
                continue
            if again == text:
                yield f"the name of the {turn.role} turn {index}, call {number}"


def _rendered(marks: _Marks, tokenizer: PreTrainedTokenizerBase) -> str | None:
    render = Renderer(marks.chat, tokenizer)
    try:
        return render.upto(len(marks.chat.turns))
    except DataError:
        return None


def _lost_texts(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts and names that are not in the rendered conversation, where marks can't be rendered."""
    text = Renderer(chat, tokenizer).upto(len(chat.turns))
    for index, turn in enumerate(chat.turns):
        if turn.content and turn.content.strip() not in text:
            yield f"the text of the {turn.role} turn {index}"
        for number, call in enumerate(turn.tool_calls):
            name = call["function"]["name"]
            if name not in text and name not in chat.builtin_tools:
                yield f"the {turn.role} turn {index}, call {number}"


class LeftOutError(DataError):
    """A part of a conversation that the chat template doesn't render, and that training can't be without."""

    def __init__(self, refused: Sequence[str], *, source: str) -> None:
        self.refused = tuple(refused)
        kinds = " ".join(refused)
        what = "calls" if "call " in kinds else "tools" if "tool " in kinds else "it"
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        super().__init__(
            f"{', '.join(refused[:3])}{more}: lost, the chat template ({source}) doesn't render "
            f"{'them' if len(refused) > 1 else 'it'}. Set data.chat_template to a FILE whose template renders {what} (the "
            "model's own is used where it is not set), or put it into a text that it renders"
        )
