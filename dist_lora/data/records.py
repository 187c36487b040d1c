"""The four formats of a training record, recognized by columns and converted to one form.

==================  =====================================  ==============================================
format              columns                                becomes
==================  =====================================  ==============================================
messages            messages | conversations [tools]       Chat (OpenAI's or sharegpt's spelling)
alpaca              instruction, output [input]            Instruction
prompt-completion   prompt, completion                     Continuation, or Chat for lists of messages
text                text                                   Continuation with an empty prompt
==================  =====================================  ==============================================

Nothing here knows files or tokenizers. Errors say what is wrong with one record; the caller, which
knows its file and line, prepends them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from dist_lora.errors import DataError

Format = Literal["messages", "alpaca", "prompt-completion", "text"]
Role = Literal["system", "user", "assistant", "tool", "ipython"]

REQUIRED_COLUMNS: Mapping[Format, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",), ("conversations",)),
    "alpaca": (("instruction", "output"),),
    "prompt-completion": (("prompt", "completion"),),
    "text": (("text",),),
}
"""For each format the sets of columns, one of which must be complete."""

EXAMPLES: Mapping[Format, str] = {
    "messages": '{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}',
    "alpaca": '{"instruction": "Translate to French", "input": "cat", "output": "chat"}',
    "prompt-completion": '{"prompt": "2 + 2 =", "completion": " 4"}',
    "text": '{"text": "Once upon a time"}',
}
"""One record of each format, as an error shows it."""

MAX_DEPTH = 100
"""Templates, and all that walks a record, recurse once per level."""

_ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool", "ipython")
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


@dataclass(frozen=True)
class Turn:
    """One message. ``is_trained`` is false where the record says ``weight: 0`` or ``train: false``."""

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    is_trained: bool = True

    def as_message(self) -> dict[str, Any]:
        """The message as a chat template reads it: without empty keys (templates test with ``in``)."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        return message


@dataclass(frozen=True)
class Chat:
    """A conversation with the tools its assistant may call."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Instruction:
    """An alpaca record: an instruction, an input (maybe empty) and the answer."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Continuation:
    """Plain text after a prompt; a text record is one with an empty prompt."""

    prompt: str
    completion: str


Sample = Chat | Instruction | Continuation


def recognize_format(columns: Collection[str]) -> Format:
    """The format whose columns are all present; the first of the table above if several are.

    Raises:
        DataError: no format fits; names the columns found and what each format needs.
    """
    for name in REQUIRED_COLUMNS:
        if _has_columns(columns, name):
            return name
    needs = "; ".join(f"{name} needs {_needs(name)}" for name in REQUIRED_COLUMNS)
    raise DataError(f"columns {_listed(columns)} match no known format: {needs}")


def check_columns(columns: Collection[str], fmt: Format) -> None:
    """Raises DataError unless the columns of ``fmt`` are present."""
    if not _has_columns(columns, fmt):
        raise DataError(f"columns {_listed(columns)} found; format {fmt} needs {_needs(fmt)}, e.g. {EXAMPLES[fmt]}")


def read_sample(record: Mapping[str, Any], *, fmt: Format) -> Sample:
    """A record in the form that is encoded.

    Accepts what real data sets contain: content as a list of text parts, tools and messages as JSON
    strings, a call's arguments as JSON or as an object, keys that are null (parquet writes them
    for every key that any row has).

    Raises:
        DataError: the first thing wrong with the record, by its path inside it.
    """
    if _depth(record) > MAX_DEPTH:
        raise DataError(f"the record is nested deeper than {MAX_DEPTH} levels")
    columns = [key for key, value in record.items() if value is not None]
    if record and not columns:
        raise DataError(f"{_listed(record)}: all values are null")
    check_columns(columns, fmt)
    if fmt == "messages":
        return _read_chat(record)
    if fmt == "alpaca":
        return Instruction(
            instruction=_text(record["instruction"], "instruction"),
            input=_text(record.get("input") or "", "input"),
            output=_text(record["output"], "output"),
        )
    if fmt == "prompt-completion":
        return _read_prompt_completion(record)
    return Continuation(prompt="", completion=_text(record["text"], "text"))


def _depth(value: object) -> int:
    """The depth of nested containers, counted no further than just above ``MAX_DEPTH``."""
    deepest, inside = 0, [value]
    while inside and deepest <= MAX_DEPTH:
        deepest += 1
        containers = [value for value in inside if isinstance(value, dict | list | tuple)]
        inside = [part for value in containers for part in (value.values() if isinstance(value, dict) else value)]
    return deepest


def _has_columns(columns: Collection[str], fmt: Format) -> bool:
    return any(set(needed) <= set(columns) for needed in REQUIRED_COLUMNS[fmt])


def _needs(fmt: Format) -> str:
    return " or ".join(" and ".join(needed) for needed in REQUIRED_COLUMNS[fmt])


def _listed(columns: Collection[str]) -> str:
    return ", ".join(repr(column) for column in columns) or "(none)"


def _shown(value: object) -> str:
    """A value as messages show it, shortened."""
    if value is None:
        return "null"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # keys or a depth that JSON can't have
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is {_shown(value)}; a string is expected")
    return value


def _decoded(value: object, where: str) -> object:
    """The value of a JSON string, as CSV and parquet store nested columns."""
    if not isinstance(value, str):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is the string {_shown(value)}, which is not JSON") from None
    if _depth(decoded) > MAX_DEPTH:
        raise DataError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    return decoded


def _read_chat(record: Mapping[str, Any]) -> Chat:
    column = "messages" if record.get("messages") is not None else "conversations"
    turns = _read_turns(record[column], column)
    system = record.get("system")
    if isinstance(system, str) and system and all(turn.role != "system" for turn in turns):
        turns = (Turn("system", system), *turns)
    systems = [index for index, turn in enumerate(turns) if turn.role == "system"]
    if len(systems) > 1:
        raise DataError(f"{column} has system turns at {systems}; one, at the start, is expected")
    if systems and systems != [0]:
        raise DataError(f"{column}[{systems[0]}] is a system turn; it is expected at the start")
    return Chat(turns=turns, tools=_read_tools(record.get("tools")))


def _read_turns(value: object, where: str) -> tuple[Turn, ...]:
    items = _decoded(value, where)
    if not isinstance(items, list):
        raise DataError(f"{where} is {_shown(items)}; a list of messages is expected, e.g. {EXAMPLES['messages']}")
    if not items:
        raise DataError(f"{where} is an empty list; at least one message is expected")
    return tuple(_read_turn(item, f"{where}[{index}]") for index, item in enumerate(items))


def _read_turn(item: object, where: str) -> Turn:
    if not isinstance(item, dict):
        raise DataError(f"{where} is {_shown(item)}; an object with role and content is expected")
    message = {key: value for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        return _read_sharegpt_turn(message, where)
    role = message.get("role")
    if role not in _ROLES:
        raise DataError(f"{where}.role is {_shown(role)}; one of {', '.join(_ROLES)} is expected")
    calls = _read_tool_calls(message.get("tool_calls") or [], f"{where}.tool_calls")
    if calls and role != "assistant":
        raise DataError(f"{where} has tool_calls and role {role}; only an assistant calls tools")
    content = "" if calls and "content" not in message else _content(message.get("content"), f"{where}.content")
    return Turn(role=role, content=content, tool_calls=calls, is_trained=_is_trained(message, where))


def _read_sharegpt_turn(message: Mapping[str, Any], where: str) -> Turn:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise DataError(f"{where}.from is {_shown(speaker)}; one of {', '.join(_SHAREGPT_ROLES)} is expected")
    is_trained = _is_trained(message, where)
    content = _content(message.get("value"), f"{where}.value")
    if speaker != "function_call":
        return Turn(role=_SHAREGPT_ROLES[speaker], content=content, is_trained=is_trained)
    called = _decoded(content, f"{where}.value")
    calls = _read_tool_calls(called if isinstance(called, list) else [called], f"{where}.value")
    return Turn(role="assistant", content="", tool_calls=calls, is_trained=is_trained)


def _content(value: object, where: str) -> str:
    """A string, or OpenAI's list of parts if all of them are text."""
    if not isinstance(value, list):
        return _text(value, where)
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise DataError(
                f'{where}[{index}] is {_shown(part)}; only parts {{"type": "text", "text": ...}} are supported'
            )
    return "".join(_text(part.get("text"), f"{where}[{index}].text") for index, part in enumerate(value))


def _is_trained(message: Mapping[str, Any], where: str) -> bool:
    if "train" in message and not isinstance(message["train"], bool):
        raise DataError(f"{where}.train is {_shown(message['train'])}; true or false is expected")
    if "weight" in message and message["weight"] not in (0, 1):
        raise DataError(f"{where}.weight is {_shown(message['weight'])}; 0 or 1 is expected")
    return bool(message.get("train", True)) and bool(message.get("weight", 1))


def _read_tool_calls(value: object, where: str) -> tuple[dict[str, Any], ...]:
    items = _decoded(value, where)
    if not isinstance(items, list):
        raise DataError(f"{where} is {_shown(items)}; a list of calls is expected")
    return tuple(_read_tool_call(item, f"{where}[{index}]") for index, item in enumerate(items))


def _read_tool_call(item: object, where: str) -> dict[str, Any]:
    """OpenAI's ``{"function": {"name", "arguments"}}``, or the inner object alone; arguments as an object."""
    function = item.get("function", item) if isinstance(item, dict) else item
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f'{where} is {_shown(item)}; {{"name": ..., "arguments": {{...}}}} is expected')
    arguments = _decoded(function.get("arguments", function.get("parameters")) or {}, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise DataError(f"{where}.arguments is {_shown(arguments)}; an object is expected")
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    call_id = cast(dict[str, Any], item).get("id")
    return call if call_id is None else {"id": call_id, **call}


def _read_tools(value: object) -> tuple[dict[str, Any], ...]:
    items = _decoded(value or [], "tools")
    if not isinstance(items, list):
        raise DataError(f"tools is {_shown(items)}; a list of JSON schemas is expected")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise DataError(f"tools[{index}] is {_shown(item)}; a JSON schema (an object) is expected")
    return tuple(items)


def _read_prompt_completion(record: Mapping[str, Any]) -> Sample:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Continuation(prompt=prompt, completion=completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        context = tuple(replace(turn, is_trained=False) for turn in _read_turns(prompt, "prompt"))
        return Chat(turns=context + _read_turns(completion, "completion"), tools=_read_tools(record.get("tools")))
    raise DataError(
        f"prompt is {_shown(prompt)} and completion is {_shown(completion)}; "
        "both as strings, or both as lists of messages, are expected"
    )
