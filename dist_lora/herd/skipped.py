"""The linears that a 4-bit publisher says it left unquantized: ``llm_int8_skip_modules`` in a config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def skipped_linears(config: Mapping[str, Any], names: Iterable[str]) -> frozenset[str]:
    """Which of the linears, by full name, a published model's config lists as unquantized; empty where none is quantized.

    A listed key fits as in transformers 5.23 (``should_convert_module``): the beginning of a name up to a dot, also as a
    regular expression, or its end.
    """
    quantization = config.get("quantization_config")
    keys = quantization.get("llm_int8_skip_modules") if isinstance(quantization, Mapping) else None
    if not isinstance(keys, list):
        return frozenset()
    patterns = [_pattern(key) for key in keys if isinstance(key, str)]
    endings = tuple(key for key in keys if isinstance(key, str))
    return frozenset(
        name for name in names if name.endswith(endings) or any(pattern.match(name) for pattern in patterns)
    )


def _pattern(key: str) -> re.Pattern[str]:
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    # A repeated group can take time without end, and nobody lists modules by one: such a key is taken by its letters.
    if not re.search(r"\)[*+?{]", key):
        try:
            return re.compile(f"(?:{key}){boundary}")
        except (re.error, RecursionError, OverflowError):
            pass
    return re.compile(f"(?:{re.escape(key)}){boundary}")
