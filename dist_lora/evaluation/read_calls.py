"""The tool calls of an answer's text, in any of the formats that Llama 3 and its templates write them in.

============  ==============================================================  =============================
format        text                                                            of
============  ==============================================================  =============================
JSON          ``{"name": "f", "parameters": {"a": 1}}``                       Llama 3.1, 3.3, llama3
              the same with ``"type": "function"``, ``"arguments"``, or the   ``ChatFormat``, OpenAI
              call inside of ``"function"``; several in a row or in a list
Python list   ``[f(a=1), g(b="x")]``                                          Llama 3.2
built-in      ``<|python_tag|>brave_search.call(query="x")``                  Llama 3.1
code          ``<|python_tag|>print(1)``: ``code_interpreter``'s ``code``     Llama 3.1, 3.2
function tag  ``<function=f>{"a": 1}</function>``                             Llama 3.1
tool_call     ``<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>`` chatml
============  ==============================================================  =============================

A text may come before the calls, and nothing after them: a server that looks for calls would lose it. The text is a model's:
it is only read, never run.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dist_lora.data.json_text import DECODER, parse_json
from dist_lora.data.turns import MAX_DEPTH, depth

PYTHON_TAG = "<|python_tag|>"
CODE_INTERPRETER = "code_interpreter"


@dataclass(frozen=True)
class Call:
    """A call of a tool; its arguments are JSON values."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """The calls of an answer, in order; ``is_broken``: it has none, and begins one in a way that can't be read."""

    calls: tuple[Call, ...] = ()
    is_broken: bool = False


# What a call begins with, and, at the start of a line, what it may begin with.
_CALL = r'<\|python_tag\|>|<tool_call>|<function=|\{\s*"(?:type"\s*:\s*"function"|name"\s*:|function"\s*:)'
_LIST = rf"^\[\s*(?:[A-Za-z_][\w.]*\(|{_CALL})"
_START = re.compile(rf"(?P<sure>{_CALL}|{_LIST})|^(?:[\[{{]|[A-Za-z_]\w*\.call\()", re.MULTILINE)
_MOST_STARTS = 64  # each is read to the end: a long answer in JSON has a line for every value


def read_calls(text: str) -> Answer:
    """The calls of an answer, whichever format they are in. Never raises."""
    text = text.strip()
    for number, start in enumerate(_START.finditer(text)):
        rest = text[start.start() :]
        calls = _calls_of(rest)
        if calls or start["sure"] or number == _MOST_STARTS:
            return Answer(calls, is_broken=not calls and start["sure"] is not None and not _is_data(rest))
    return Answer()


def same_json(one: object, other: object) -> bool:
    """Whether two JSON values are equal: objects whatever their order, 1 and 1.0, but neither true and 1 nor "1" and 1."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same_json(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    return type(one) is type(other) and one == other


def _calls_of(text: str) -> tuple[Call, ...]:
    """The calls that a text consists of; none if there is anything else in it."""
    is_tagged = text.startswith(PYTHON_TAG)
    text = text.removeprefix(PYTHON_TAG).strip()
    readers: tuple[Callable[[str], Iterator[Call]], ...] = (_json, _python_list, _built_in, _function_tags, _tool_calls)
    for read in readers:
        try:
            calls = tuple(read(text))
        # MemoryError: nested too deep for ast.parse; TypeError: a key of a dict, or a part of a set, that can't be hashed
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if calls and depth([dict(call.arguments) for call in calls]) <= MAX_DEPTH:
            return calls
    begun = _START.match(text)
    is_code = is_tagged and text and not (begun and begun["sure"])
    return (Call(CODE_INTERPRETER, {"code": text}),) if is_code else ()


def _is_data(text: str) -> bool:
    """Whether a text is JSON of something that has a name, and is no call."""
    try:
        value = parse_json(text)
    except (ValueError, RecursionError):
        return False
    return all(
        isinstance(item, dict)
        and item.get("type") != "function"
        and not item.keys() & {"parameters", "arguments", "function"}
        for item in (value if isinstance(value, list) else [value])
    )


def _json(text: str) -> Iterator[Call]:
    """JSON objects, one after the other or in lists; between them blanks or semicolons."""
    place = 0
    while place < len(text):
        value, place = DECODER.raw_decode(text, place)
        yield from (_call_of(item) for item in (value if isinstance(value, list) else [value]))
        place = _after(r"[\s;]*", text, place).end()


def _call_of(item: object) -> Call:
    if isinstance(item, dict) and isinstance(item.get("function"), dict):
        item = item["function"]
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
        raise ValueError("not a call")
    given = [item[key] for key in ("parameters", "arguments") if key in item]
    if len(given) != 1:
        raise ValueError("parameters or arguments are expected, and one of them")
    arguments = parse_json(given[0]) if isinstance(given[0], str) else given[0]
    if not isinstance(arguments, dict):
        raise ValueError("arguments by name are expected")
    return Call(item["name"], arguments)


def _tool_calls(text: str) -> Iterator[Call]:
    place = 0
    while place < len(text):
        value, place = DECODER.raw_decode(text, _after(r"<tool_call>\s*", text, place).end())
        place = _after(r"\s*</tool_call>\s*", text, place).end()
        yield _call_of(value)


def _function_tags(text: str) -> Iterator[Call]:
    place = 0
    while place < len(text):
        opening = _after(r"<function=([^<>]+)>\s*", text, place)
        arguments, place = DECODER.raw_decode(text, opening.end())
        place = _after(r"\s*</function>\s*", text, place).end()
        yield _call_of({"name": opening[1], "arguments": arguments})


def _built_in(text: str) -> Iterator[Call]:
    """``name.call(a="...", b="...")``. Llama's format escapes nothing: a value ends where the next argument, or the call, follows."""
    whole = re.fullmatch(r"([A-Za-z_]\w*)\.call\((.*)\)", text, re.DOTALL)
    if whole is None:
        raise ValueError("not a call of a built-in tool")
    arguments: dict[str, Any] = {}
    place = 0
    while place < len(whole[2]):
        argument = _after(r'(\w+)="((?s:.*?))"(?:, (?=\w+=")|\Z)', whole[2], place)
        if argument[1] in arguments:
            raise ValueError("an argument that is given twice")
        arguments[argument[1]], place = argument[2], argument.end()
    yield Call(whole[1], arguments)


def _python_list(text: str) -> Iterator[Call]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a backslash, which Python takes as it is
        tree = ast.parse(text, mode="eval").body
    if not isinstance(tree, ast.List):
        raise ValueError("not a list")
    for node in tree.elts:
        if not isinstance(node, ast.Call) or node.args or None in (names := [keyword.arg for keyword in node.keywords]):
            raise ValueError("not a call with its arguments by name")
        if len(set(names)) < len(names):
            raise ValueError("an argument that is given twice")
        arguments = {str(keyword.arg): _json_value(ast.literal_eval(keyword.value)) for keyword in node.keywords}
        yield Call(_dotted(node.func), arguments)


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("not the name of a function")


def _json_value(value: object) -> object:
    """A literal of Python, which must be one that JSON has too."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    is_number = isinstance(value, int) or (isinstance(value, float) and abs(value) < float("inf"))
    if value is None or isinstance(value, str) or is_number:
        return value
    raise ValueError("not a value that JSON has")


def _after(pattern: str, text: str, place: int) -> re.Match[str]:
    """The match of a pattern at a place of a text."""
    match = re.compile(pattern).match(text, place)
    if match is None:
        raise ValueError(f"{pattern} is expected")
    return match
