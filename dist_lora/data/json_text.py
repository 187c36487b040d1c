"""JSON as its grammar has it, where Python's reader is more lenient."""

from __future__ import annotations

import json
from typing import Any

from dist_lora.files import without_duplicates

MAX_RECORD_BYTES = 32 * 2**20
"""A longer line isn't a record but a file without newlines."""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; write a number, or null")


DECODER = json.JSONDecoder(object_pairs_hook=without_duplicates, parse_constant=_refuse_constant)
"""Refuses also NaN, Infinity and a key that stands twice in an object, by ValueError."""


def parse_json(text: str) -> Any:
    """The one value of a JSON text. Raises ValueError where it is none, or more than one; see ``DECODER``."""
    return DECODER.decode(text)


def near(text: str, position: int) -> str:
    """What stands around a position, for an error."""
    piece = text[max(0, position - 15) : position + 15].strip()
    return f"near {piece!r}" if piece else "at the end of the line"


def unpaired_surrogate(text: str) -> str | None:
    """What is wrong with a text that no file can hold, in words: half of a character; None if it is whole."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a text has U+{ord(text[error.start]):04X}, an unpaired surrogate: it is truncated or wrongly escaped"
    return None


def first_line(text: str) -> str:
    """The first line of a library's message."""
    return text.strip().splitlines()[0] if text.strip() else "no reason given"
