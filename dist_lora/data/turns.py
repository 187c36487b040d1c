"""The messages of a conversation, in OpenAI's and ShareGPT's spellings, and the tools that its assistant may call.

A turn keeps all keys of its message for the chat template, but for the few that say whether it is trained on. Nothing here
knows files or tokenizers; an error says where in the record the fault is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from dist_lora.data.json_text import parse_json
from dist_lora.errors import DataError

Role = Literal["system", "user", "assistant", "tool", "ipython"]

MAX_DEPTH = 100
"""Templates, and all that walks a record, recurse once per level."""

TRAIN_FLAGS = ("weight", "train", "loss", "loss_mask", "loss_scale", "trainable", "training")
"""Keys by which OpenAI, axolotl, ms-swift, LLaMA-Factory and verl say whether a turn is trained on."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's reasoning; transformers 5.23 gives a template all of them where a message has one."""

EXAMPLE = '{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}'

_ROLES: Mapping[str, Role] = {
    **{role: role for role in cast(tuple[Role, ...], ("system", "user", "assistant", "tool", "ipython"))},
    "function": "tool",
}
_SHAREGPT_ROLES: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# What would have to be seen or heard, and isn't text.
_OTHER_MEDIA = ("images", "image", "videos", "video", "audios", "audio", "audio_url", "image_url")


@dataclass(frozen=True)
class Turn:
    """One message.

    Args:
        content: None where the record says null, which a template may ask for beside tool calls.
        is_trained: false where the record says so by one of ``TRAIN_FLAGS``.
        is_asked: true where it says so expressly that it is trained on.
        is_context: of a prompt of messages, which is trained on only where everything is.
        extras: all other keys of the message, as a template reads them: ``name``, ``tool_call_id``, ``reasoning_content``.
    """

    role: Role
    content: str | None
    tool_calls: tuple[dict[str, Any], ...] = ()
    is_trained: bool = True
    extras: Mapping[str, Any] = field(default_factory=dict)
    is_asked: bool = False
    is_context: bool = False

    @property
    def is_answer_to_learn(self) -> bool:
        """Whether it is trained on where answers alone are, if it is one."""
        return self.is_trained and not self.is_context

    def as_message(self) -> dict[str, Any]:
        """The message as a chat template reads it: without empty keys (templates test with ``in``)."""
        message: dict[str, Any] = {"role": self.role, "content": self.content, **self.extras}
        if self.tool_calls:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        return message


def depth(value: object) -> int:
    """The depth of nested containers, counted no further than just above ``MAX_DEPTH``."""
    deepest, inside = 0, [value]
    while inside and deepest <= MAX_DEPTH:
        deepest += 1
        containers = [value for value in inside if isinstance(value, dict | list | tuple)]
        inside = [part for value in containers for part in (value.values() if isinstance(value, dict) else value)]
    return deepest


def shown(value: object) -> str:
    """A value as messages show it, shortened."""
    if value is None:
        return "null"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # keys or a depth that JSON can't have
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def text_of(value: object, where: str) -> str:
    """``value``; raises DataError unless it is a string."""
    if not isinstance(value, str):
        raise DataError(f"{where} is {shown(value)}; a string is expected")
    return value


def decoded(value: object, where: str) -> object:
    """The value of a JSON string, as CSV and parquet store nested columns."""
    if not isinstance(value, str):
        return value
    try:
        inner = parse_json(value)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is the string {shown(value)}, which is not JSON") from None
    if depth(inner) > MAX_DEPTH:
        raise DataError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    return inner


def read_turns(value: object, where: str) -> tuple[Turn, ...]:
    """The turns of a list of messages, or of its JSON text.

    Raises:
        DataError: the first thing wrong with them, by its path in the record, which begins with ``where``.
    """
    items = decoded(value, where)
    if not isinstance(items, list):
        raise DataError(f"{where} is {shown(items)}; a list of messages is expected, e.g. {EXAMPLE}")
    if not items:
        raise DataError(f"{where} is an empty list; at least one message is expected")
    return tuple(_read_turn(_object_of(item, f"{where}[{i}]"), f"{where}[{i}]") for i, item in enumerate(items))


def _object_of(item: object, where: str) -> object:
    """An object that a columnar file may have stored as its JSON text; anything else as it is."""
    return decoded(item, where) if isinstance(item, str) and item.lstrip()[:1] == "{" else item


def _read_turn(item: object, where: str) -> Turn:
    if not isinstance(item, dict):
        raise DataError(f"{where} is {shown(item)}; an object with role and content is expected")
    message = {key: value for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        return _read_sharegpt_turn(message, where)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{where}.role is {shown(role)}; one of {', '.join(_ROLES)} is expected")
    return _spoken(_ROLES[role], "content", message, where, used=("role",))


def _spoken(role: Role, column: str, message: Mapping[str, Any], where: str, *, used: tuple[str, ...]) -> Turn:
    """A turn whose text is in ``column``, with the calls that it may have."""
    calls = _read_calls(message, where)
    if calls and role != "assistant":
        raise DataError(f"{where} has tool_calls and role {role}; only an assistant calls tools")
    is_null = calls and column not in message
    content = None if is_null else _content(message.get(column), f"{where}.{column}")
    return _turn(role, content, calls, message, where, used=(*used, column, "tool_calls", "function_call"))


def _read_calls(message: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The calls of ``tool_calls``, or of the older ``function_call``."""
    calls = message.get("tool_calls") or []
    older = message.get("function_call")
    if older and calls:
        raise DataError(f"{where} has tool_calls and function_call; one of them is expected")
    if older:
        return _read_tool_calls([_object_of(older, f"{where}.function_call")], f"{where}.function_call")
    return _read_tool_calls(calls, f"{where}.tool_calls")


def _read_sharegpt_turn(message: Mapping[str, Any], where: str) -> Turn:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise DataError(f"{where}.from is {shown(speaker)}; one of {', '.join(_SHAREGPT_ROLES)} is expected")
    if speaker != "function_call":
        return _spoken(_SHAREGPT_ROLES[speaker], "value", message, where, used=("from",))
    if _read_calls(message, where):
        raise DataError(f"{where} is a function_call and has tool_calls beside its value; one of them is expected")
    called = decoded(_content(message.get("value"), f"{where}.value"), f"{where}.value")
    calls = _read_tool_calls(called if isinstance(called, list) else [called], f"{where}.value")
    return _turn("assistant", None, calls, message, where, used=("from", "value"))


def _turn(
    role: Role,
    content: str | None,
    calls: tuple[dict[str, Any], ...],
    message: Mapping[str, Any],
    where: str,
    *,
    used: tuple[str, ...],
) -> Turn:
    media = [key for key in _OTHER_MEDIA if message.get(key)]
    if media:
        raise DataError(f"{where} has {', '.join(media)}; only text is supported")
    extras = {key: value for key, value in message.items() if key not in used and key not in TRAIN_FLAGS}
    is_trained, is_asked = _flags(message, where)
    return Turn(role, content, calls, is_trained, extras, is_asked)


def _content(value: object, where: str) -> str:
    """A string, or OpenAI's list of parts if all of them are text."""
    if not isinstance(value, list):
        return text_of(value, where)
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise DataError(
                f'{where}[{index}] is {shown(part)}; only parts {{"type": "text", "text": ...}} are supported'
            )
    return "".join(text_of(part.get("text"), f"{where}[{index}].text") for index, part in enumerate(value))


def _flags(message: Mapping[str, Any], where: str) -> tuple[bool, bool]:
    """Whether a turn may be trained on, and whether its record asks for it, by whichever of ``TRAIN_FLAGS`` it has."""
    flags = {name: message[name] for name in TRAIN_FLAGS if name in message}
    for name, flag in flags.items():
        if flag not in (0, 1):
            expected = "0 or 1" if name in ("weight", "loss_mask", "loss_scale") else "true or false"
            raise DataError(f"{where}.{name} is {shown(flag)}; {expected} is expected")
    if len({bool(flag) for flag in flags.values()}) > 1:
        said = ", ".join(f"{name}: {shown(flag)}" for name, flag in flags.items())
        raise DataError(f"{where} says of one turn that it is trained on and that it isn't: {said}")
    return all(flags.values()), any(flags.values())


def _read_tool_calls(value: object, where: str) -> tuple[dict[str, Any], ...]:
    items = decoded(value, where)
    if not isinstance(items, list):
        raise DataError(f"{where} is {shown(items)}; a list of calls is expected")
    return tuple(_read_tool_call(item, f"{where}[{index}]") for index, item in enumerate(items))


def _read_tool_call(item: object, where: str) -> dict[str, Any]:
    """OpenAI's ``{"function": {"name", "arguments"}}``, or the inner object alone; arguments as an object."""
    item = _object_of(item, where)
    function = (item.get("function") or item) if isinstance(item, dict) else item
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f'{where} is {shown(item)}; {{"name": ..., "arguments": {{...}}}} is expected')
    named = [key for key in ("arguments", "parameters") if function.get(key) not in (None, "")]
    # An empty list is how PHP writes an object without keys.
    given = [{} if (found := decoded(function[key], f"{where}.{key}")) == [] else found for key in named] or [{}]
    arguments, other = given[0], given[-1]
    for key, found in zip(named, given, strict=False):
        if not isinstance(found, dict):
            raise DataError(f"{where}.{key} is {shown(found)}; an object is expected")
    if other not in ({}, arguments):
        raise DataError(f"{where} has arguments and parameters, and they differ; one of them is expected")
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    call_id = cast(dict[str, Any], item).get("id")
    return call if call_id is None else {"id": call_id, **call}


def read_tools(record: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The JSON schemas of ``tools``, or of OpenAI's older ``functions``."""
    older = decoded(record.get("functions") or [], "functions")
    items = decoded(record.get("tools") or [], "tools")
    if items and older:
        raise DataError("the record has tools and functions; one of them is expected")
    column = "functions" if older else "tools"
    items = older or items
    if not isinstance(items, list):
        raise DataError(f"{column} is {shown(items)}; a list of JSON schemas is expected")
    schemas = [_object_of(item, f"{column}[{index}]") for index, item in enumerate(items)]
    for index, item in enumerate(schemas):
        if not isinstance(item, dict):
            raise DataError(f"{column}[{index}] is {shown(item)}; a JSON schema (an object) is expected")
    found = cast(list[dict[str, Any]], schemas)
    return tuple({"type": "function", "function": item} if older else item for item in found)


def read_builtin_tools(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of ``builtin_tools``, which Llama 3.1 calls without a schema: brave_search, wolfram_alpha, code_interpreter."""
    items = decoded(record.get("builtin_tools") or [], "builtin_tools")
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise DataError(f"builtin_tools is {shown(items)}; a list of names is expected, such as brave_search")
    return tuple(items)
