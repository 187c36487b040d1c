"""JSON as its grammar has it, where Python's reader is more lenient."""

from __future__ import annotations

import json
from typing import Any

from dist_lora.files import without_duplicates


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; write a number, or null")


DECODER = json.JSONDecoder(object_pairs_hook=without_duplicates, parse_constant=_refuse_constant)
"""Refuses also NaN, Infinity and a key that stands twice in an object, by ValueError."""


def parse_json(text: str) -> Any:
    """The one value of a JSON text. Raises ValueError where it is none, or more than one; see ``DECODER``."""
    return DECODER.decode(text)
