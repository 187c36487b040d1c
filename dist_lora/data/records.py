"""The formats of a training record, all but guard recognized by columns, converted to one form.

==================  =====================================  ==============================================
format              columns                                becomes
==================  =====================================  ==============================================
messages            messages | conversations               Chat (OpenAI's or ShareGPT's spelling)
                    [system, tools, builtin_tools]
alpaca              instruction, output                    Instruction, or Chat with a system or history
                    [input, system, history]
                    prompt, completion, system             the same
prompt-completion   prompt, completion [tools,             Continuation, or Chat for lists of messages
                    builtin_tools]
text                text                                   Continuation with an empty prompt
tokens              input_ids [labels | a mask]            Tokens (ids that are taken as they are)
==================  =====================================  ==============================================

Other columns are named by ``unused_columns``. Nothing here knows files or tokenizers. Errors say what is wrong with one record;
the caller, which knows its file and line, prepends them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from dist_lora.data.guard import COLUMNS as GUARD_COLUMNS
from dist_lora.data.guard import EXAMPLE as GUARD_EXAMPLE
from dist_lora.data.guard import Judged, check_guard_columns, read_judged
from dist_lora.data.pretokenized import COLUMNS, Tokens, read_tokens
from dist_lora.data.turns import (
    EXAMPLE,
    MAX_DEPTH,
    TRAIN_FLAGS,
    Turn,
    decoded,
    depth,
    read_builtin_tools,
    read_tools,
    read_turns,
    shown,
    text_of,
)
from dist_lora.errors import DataError

Format = Literal["messages", "alpaca", "prompt-completion", "text", "tokens", "guard"]

REQUIRED_COLUMNS: Mapping[Format, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",), ("conversations",)),
    "alpaca": (("instruction", "output"), ("prompt", "completion", "system")),
    "prompt-completion": (("prompt", "completion"),),
    "text": (("text",),),
    "tokens": (("input_ids",),),
}
"""For each format that is recognized the sets of columns, one of which must be complete; of guard see ``guard.COLUMNS``."""

EXAMPLES: Mapping[Format, str] = {
    "messages": EXAMPLE,
    "alpaca": '{"instruction": "Translate to French", "input": "cat", "output": "chat"}',
    "prompt-completion": '{"prompt": "2 + 2 =", "completion": " 4"}',
    "text": '{"text": "Once upon a time"}',
    "tokens": '{"input_ids": [128000, 17, 128001], "labels": [-100, 17, 128001]}',
    "guard": GUARD_EXAMPLE,
}
"""One record of each format, as an error shows it."""

USED_COLUMNS: Mapping[Format, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "system", "system_prompt", "tools", "functions", "builtin_tools"),
    "alpaca": (
        "instruction",
        "input",
        "output",
        "system",
        "system_prompt",
        "history",
        "prompt",
        "completion",
        "tools",
        "functions",
    ),
    "prompt-completion": ("prompt", "completion", "tools", "functions", "builtin_tools"),
    "text": ("text",),
    "tokens": COLUMNS,
    "guard": GUARD_COLUMNS,
}
"""What is read of a record of each format; other columns are reported."""

_TEXT_BESIDE = ("tools", "functions", "builtin_tools", "system", "system_prompt", "history", "reasoning_content")
# Columns that would change what is trained, and can't be honoured.
_REFUSED_COLUMNS: Mapping[str, str] = {
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), "a preference pair"),
    **dict.fromkeys(("images", "videos", "audios"), "other media than text"),
    **dict.fromkeys(("documents", "chat_template_kwargs"), "arguments of the chat template"),
    **dict.fromkeys(_TEXT_BESIDE, "a part of what is trained on"),
}
# Columns that choose targets or weigh samples; a sample is trained on, with the weight 1.
_TARGET_COLUMNS = (
    *TRAIN_FLAGS,
    "labels",
    "label_mask",
    "assistant_masks",
    "sample_weight",
    "loss_weight",
    "kto_tag",
    "kto_label",
)


@dataclass(frozen=True)
class Chat:
    """A conversation with the tools its assistant may call; ``builtin_tools``: names of those that the model brings along."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    builtin_tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """An alpaca record: an instruction, an input (maybe empty) and the answer."""

    instruction: str
    input: str
    output: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Continuation:
    """Plain text after a prompt; a text record is one with an empty prompt."""

    prompt: str
    completion: str


Sample = Chat | Instruction | Continuation | Tokens | Judged


def named_format(name: str) -> Format | None:
    """The format of that name; None for auto."""
    return next((fmt for fmt in get_args(Format) if fmt == name), None)


def recognize_format(columns: Collection[str]) -> Format:
    """The format whose columns are all present; the first of the table above if several are.

    Raises:
        DataError: no format fits; names the columns found and what each format needs.
    """
    for name in REQUIRED_COLUMNS:
        if _has_columns(columns, name, is_recognized=True):
            return name
    needs = "; ".join(f"{name} needs {_needs(name)}" for name in REQUIRED_COLUMNS)
    if {"verdict", "is_safe", "toxicity"} & {*columns}:
        needs += "; a Guard's samples need data.format: guard"
    raise DataError(
        f"columns {_listed(columns)} match no known format: {needs}. If they have other names, map them, like "
        "data.columns: {prompt: question, completion: answer}"
    )


def check_columns(columns: Collection[str], fmt: Format) -> None:
    """Raises DataError unless the columns of ``fmt`` are present."""
    if fmt == "guard":
        return check_guard_columns(columns)
    if not _has_columns(columns, fmt):
        raise DataError(f"columns {_listed(columns)} found; format {fmt} needs {_needs(fmt)}, e.g. {EXAMPLES[fmt]}")


def read_sample(record: Mapping[str, Any], *, fmt: Format) -> Sample:
    """A record in the form that is encoded.

    Accepts what real data sets contain: content as a list of text parts, tools and messages as JSON
    strings, a call's arguments as JSON or as an object, keys that are null (parquet writes them
    for every key that any row has).

    Raises:
        DataError: the first thing wrong with the record, by its path inside it; also a column that would change what is
            trained and can't be honoured in this format.
    """
    if depth(record) > MAX_DEPTH:
        raise DataError(f"the record is nested deeper than {MAX_DEPTH} levels")
    columns = [key for key, value in record.items() if value is not None]
    if record and not columns:
        raise DataError(f"{_listed(record)}: all values are null")
    check_columns(columns, fmt)
    _refuse_columns(record, fmt)
    if fmt == "guard":
        return read_judged(record)
    if fmt == "messages":
        return _read_chat(record)
    if fmt == "alpaca" and not _is_prompt_of_messages(record):
        return _read_instruction(record)
    if fmt == "alpaca":
        return _read_prompt_completion(record)
    if fmt == "prompt-completion":
        return _read_prompt_completion(record)
    if fmt == "tokens":
        return read_tokens(record)
    return Continuation(prompt="", completion=text_of(record["text"], "text"))


def unused_columns(record: Mapping[str, Any], *, fmt: Format) -> list[str]:
    """The columns of a record that are not read in its format, and aren't empty."""
    used: Collection[str] = USED_COLUMNS[fmt]
    if fmt == "alpaca":
        used = set(used) - {"prompt", "completion", "instruction", "output"} | {*_instruction_columns(record)}
        if _is_prompt_of_messages(record):
            used -= {"input"}
    return [key for key, value in record.items() if key not in used and not _is_empty(value)]


def _instruction_columns(record: Mapping[str, Any]) -> tuple[str, str]:
    """The two columns of an alpaca record that are its instruction and its output."""
    return ("instruction", "output") if _is_given(record, "instruction", "output") else ("prompt", "completion")


def _is_prompt_of_messages(record: Mapping[str, Any]) -> bool:
    """Whether an alpaca record is a prompt and a completion, of messages each."""
    return "prompt" in _instruction_columns(record) and isinstance(record.get("prompt"), list)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _refuse_columns(record: Mapping[str, Any], fmt: Format) -> None:
    for name in unused_columns(record, fmt=fmt):
        if name in _REFUSED_COLUMNS:
            remedy = (
                f"Write the record as messages, e.g. {EXAMPLES['messages']}"
                if name in _TEXT_BESIDE and fmt != "guard"
                else "Remove it"
            )
            raise DataError(
                f"{name} is {_REFUSED_COLUMNS[name]}, which format {fmt} can't take: it would be lost. {remedy}"
            )
        if name == "verdict" and record[name] in ("safe", "unsafe"):
            raise DataError(
                f"verdict is {record[name]}: a Guard's sample, which format {fmt} would train without it. Set data.format: guard"
            )
        is_label = name == "label" and isinstance(record[name], bool)  # KTO's: whether the answer is a good one
        if (name in _TARGET_COLUMNS or is_label) and record[name] not in (1, "1"):
            raise DataError(
                f"{name} is {shown(record[name])}: it says what of a sample is trained on, and only turns can say that. Leave "
                "the sample out, or put the flag on its messages"
            )


def _has_columns(columns: Collection[str], fmt: Format, *, is_recognized: bool = False) -> bool:
    sets = REQUIRED_COLUMNS[fmt]
    if fmt == "alpaca" and not is_recognized:  # a prompt and a completion alone are recognized as prompt-completion
        sets = (*sets, ("prompt", "completion"))
    return any(set(needed) <= set(columns) for needed in sets)


def _needs(fmt: Format) -> str:
    return " or ".join(" and ".join(needed) for needed in REQUIRED_COLUMNS[fmt])


def _listed(columns: Collection[str]) -> str:
    return ", ".join(repr(column) for column in columns) or "(none)"


def _read_chat(record: Mapping[str, Any]) -> Chat:
    if _is_given(record, "messages", "conversations") and record["messages"] and record["conversations"]:
        raise DataError("the record has messages and conversations; one of them is expected")
    column = "messages" if record.get("messages") is not None else "conversations"
    turns = read_turns(record[column], column)
    system = _system_of(record)
    own = [turn.content for turn in turns if turn.role == "system"]
    if system and not own:
        turns = (Turn("system", system), *turns)
    elif system and own != [system]:
        raise DataError(f"system is {shown(system)}, and {column} has a system turn: {shown(own[0])}; one is expected")
    systems = [index for index, turn in enumerate(turns) if turn.role == "system"]
    if len(systems) > 1:
        raise DataError(f"{column} has system turns at {systems}; one, at the start, is expected")
    if systems and systems != [0]:
        raise DataError(f"{column}[{systems[0]}] is a system turn; it is expected at the start")
    return Chat(turns=turns, tools=read_tools(record), builtin_tools=read_builtin_tools(record))


def _system_of(record: Mapping[str, Any]) -> str:
    """The system message that stands beside the turns, in ``system`` or ``system_prompt``; empty if there is none."""
    given = {name: text_of(record[name], name) for name in ("system", "system_prompt") if record.get(name) is not None}
    texts = {text for text in given.values() if text}
    if len(texts) > 1:
        raise DataError("the record has system and system_prompt, and they differ; one of them is expected")
    return next(iter(texts), "")


def _read_instruction(record: Mapping[str, Any]) -> Instruction:
    names = _instruction_columns(record)
    history = decoded(record.get("history") or [], "history")
    if not isinstance(history, list):
        raise DataError(f"history is {shown(history)}; a list of [question, answer] is expected")
    pairs: list[tuple[str, str]] = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"history[{index}] is {shown(pair)}; [question, answer] is expected")
        pairs.append((text_of(pair[0], f"history[{index}][0]"), text_of(pair[1], f"history[{index}][1]")))
    return Instruction(
        instruction=text_of(record[names[0]], names[0]),
        input="" if record.get("input") is None else text_of(record["input"], "input"),
        output=text_of(record[names[1]], names[1]),
        system=_system_of(record),
        history=tuple(pairs),
        tools=read_tools(record),
    )


def _is_given(record: Mapping[str, Any], *names: str) -> bool:
    return all(record.get(name) is not None for name in names)


def _read_prompt_completion(record: Mapping[str, Any]) -> Sample:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        named = [name for name in ("tools", "functions", "builtin_tools") if record.get(name)]
        if named:
            raise DataError(
                f"{named[0]}: lost, since plain text has no place for them. Set data.format: alpaca, or write messages"
            )
        return Continuation(prompt=prompt, completion=completion)
    if record.get("history"):
        raise DataError(
            "history is given beside a prompt of messages, and would be lost; put its turns into the prompt"
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        context = tuple(replace(turn, is_context=True, is_asked=False) for turn in read_turns(prompt, "prompt"))
        system = _system_of(record)
        if system and context[0].role == "system":
            raise DataError(f"system is {shown(system)}, and prompt has a system turn; one of them is expected")
        if system:
            context = (Turn("system", system, is_context=True), *context)
        return Chat(
            turns=context + read_turns(completion, "completion"),
            tools=read_tools(record),
            builtin_tools=read_builtin_tools(record),
        )
    raise DataError(
        f"prompt is {shown(prompt)} and completion is {shown(completion)}; "
        "both as strings, or both as lists of messages, are expected"
    )
