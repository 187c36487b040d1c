"""A file of prompts, answered in batches into a file of answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lora.data.chat import SampleKind, encode_instruction, encode_prompt, encode_text
from dist_lora.data.json_text import unpaired_surrogate
from dist_lora.data.sources import Faults
from dist_lora.data.text_files import JsonLines
from dist_lora.errors import ConfigError, DataError, cannot_write
from dist_lora.files import write_whole

_JSON_SUFFIXES = (".jsonl", ".ndjson")
_NO_LINES = (".json", ".csv", ".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst")
ANSWER = "generated"


@dataclass(frozen=True)
class Prompt:
    """One prompt: where it is ("file.jsonl:7") and its record, with ``prompt`` (a text) or ``messages``."""

    where: str
    record: dict[str, Any]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: an object a line of ``.jsonl``, with ``prompt`` or ``messages``; of others a text a line.

    Raises:
        ConfigError: the file can't be read or has no prompt.
        DataError: lines are no prompts; names each.
    """
    if path.suffix in _NO_LINES:
        raise ConfigError(
            f"--prompts: {path}: found {path.suffix}, expected a line for each prompt: .jsonl, or a text file"
        )
    try:
        if path.suffix in _JSON_SUFFIXES:
            prompts = _of_json(JsonLines(path))
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            prompts = [
                Prompt(f"{path}:{number}", {"prompt": line.rstrip("\r")})
                for number, line in enumerate(lines, 1)
                if line.strip()
            ]
    except OSError as error:
        raise ConfigError(f"--prompts: {path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1:,} is not UTF-8; a prompt a line is expected") from error
    if not prompts:
        raise ConfigError(f"--prompts: {path} has no prompts; a line for each is expected")
    return prompts


def _of_json(lines: JsonLines) -> list[Prompt]:
    prompts, faults = [], Faults()
    for index in range(len(lines)):
        try:
            record = lines[index]
            if fault := _fault(record):
                raise DataError(fault)
            prompts.append(Prompt(lines.where(index), record))
        except DataError as error:
            faults.add(f"{lines.where(index)}: {error}")
    _raise(faults)
    return prompts


def _fault(record: dict[str, Any]) -> str | None:
    asked = [key for key in ("prompt", "messages") if key in record]
    if len(asked) != 1:
        return f"found {', '.join(record) or 'no keys'}, expected either prompt (a text) or messages (a list)"
    if fault := unpaired_surrogate(json.dumps(record, ensure_ascii=False, default=str)):
        return fault
    if ANSWER in record:
        return f"it has {ANSWER!r} already, the name under which the answer is written"
    value = record[asked[0]]
    if asked == ["prompt"]:
        return None if isinstance(value, str) and value.strip() else f"prompt: found {value!r}, expected a text"
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        return "messages: a list of messages with role and content is expected"
    return "messages: the last one is the assistant's, and its answer is asked for" if (
        (value[-1].get("role") or value[-1].get("from")) in ("assistant", "gpt")
    ) else None  # fmt: skip


def encode_prompts(
    prompts: Sequence[Prompt], *, tokenizer: Any, kind: SampleKind, system: str | None, context: int
) -> list[list[int]]:
    """The ids of each prompt, as ``generate --prompt`` has them.

    Args:
        context: tokens of the model's context, of which one at least is the answer's.

    Raises:
        DataError: a prompt is a chat and plain text is continued, has messages of its own beside ``system``, fills the context,
            or the chat template refuses it; names each.
    """
    encoded, faults = [], Faults()
    for prompt in prompts:
        try:
            ids = _encode(prompt.record, tokenizer=tokenizer, kind=kind, system=system)
            if len(ids) >= context:
                raise DataError(
                    f"{len(ids):,} tokens, and the model's context is {context:,}: no answer fits. Shorten it"
                )
            encoded.append(ids)
        except DataError as error:
            faults.add(f"{prompt.where}: {error}")
    _raise(faults)
    return encoded


_BESIDE = ("system", "system_prompt", "tools", "functions", "builtin_tools")  # what a chat has beside its turns


def _encode(record: dict[str, Any], *, tokenizer: Any, kind: SampleKind, system: str | None) -> list[int]:
    if "messages" in record and (kind != "chat" or system is not None):
        raise DataError(
            "messages: plain text is continued here, so a prompt is expected"
            if kind != "chat"
            else "messages: --system is for prompts; a system message can be the first of messages"
        )
    beside = {name: record[name] for name in _BESIDE if record.get(name)}
    if kind != "chat":
        if beside:
            raise DataError(f"{', '.join(beside)}: plain text is continued here, which has no place for it")
        encode = encode_instruction if kind == "instruction" else encode_text
        return encode(record["prompt"], tokenizer=tokenizer)
    opening = [{"role": "system", "content": system}] if system else []
    messages = record.get("messages") or [*opening, {"role": "user", "content": record["prompt"]}]
    return encode_prompt(messages, tokenizer=tokenizer, beside=beside)


def write_answers(prompts: Sequence[Prompt], answers: Sequence[str], *, out: Path) -> None:
    """Write ``out``, whole or not at all: each record with its answer as ``generated``, in the order of the prompts.

    Raises:
        SaveError: it can't be written.
    """
    lines = [
        json.dumps({**prompt.record, ANSWER: text}, ensure_ascii=False) + "\n"
        for prompt, text in zip(prompts, answers, strict=True)
    ]
    try:
        write_whole(out, "".join(lines))
    except OSError as error:
        raise cannot_write(f"{out}: the answers can't be written: {error.strerror or error}", error) from error


def given_prompts(asked: Sequence[str | Sequence[Mapping[str, Any]]]) -> list[Prompt]:
    """Prompts that a script gives: texts, and chats as lists of messages.

    Raises:
        DataError: some are neither; names each by its place in the list.
    """
    prompts, faults = [], Faults()
    for index, given in enumerate(asked):
        record: dict[str, Any] = {"prompt": given} if isinstance(given, str) else {"messages": list(given)}
        if fault := _fault(record):
            faults.add(f"prompts[{index}]: {fault}")
        prompts.append(Prompt(f"prompts[{index}]", record))
    _raise(faults)
    return prompts


def _raise(faults: Faults) -> None:
    if faults.count:
        raise DataError(f"--prompts: {faults.count:,} lines can't be asked:\n{faults.listed()}")
