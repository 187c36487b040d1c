"""Names of a model's weights by regular expressions: matched as PEFT matches them, and within a time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import regex

from dist_lora.errors import ConfigError

_MATCH_S = 2.0
_SLOW_S = 0.01  # a sound expression takes a thousandth of it


class Pattern:
    """A regular expression of an adapter's author, with a limit on the time that it takes for all names together.

    Python's ``re``, which PEFT uses, has no limit: nested repetitions may take hours for one name.
    """

    def __init__(self, text: str, *, file: Path) -> None:
        re.compile(text)  # what PEFT refuses is refused, and ``regex`` knows more
        self._text, self._file = text, file
        self._compiled = regex.compile(text, regex.VERSION0)
        self._left_s = _MATCH_S

    def match(self, name: str) -> Any:
        """See ``re.Pattern.match``. Raises ``ConfigError`` if it takes too long."""
        return self._limited(self._compiled.match, name)

    def fullmatch(self, name: str) -> Any:
        """See ``re.Pattern.fullmatch``. Raises ``ConfigError`` if it takes too long."""
        return self._limited(self._compiled.fullmatch, name)

    def _limited(self, match: Callable[..., Any], name: str) -> Any:
        begin_s = time.thread_time()
        try:
            return match(name, timeout=max(self._left_s, _SLOW_S))
        except TimeoutError:
            raise ConfigError(
                f"{self._file}: the regular expression {short(self._text)} takes longer than {_MATCH_S:g} s for names like "
                f"{name}. Write it without a repetition inside a repetition, or list the names"
            ) from None
        finally:
            spent_s = time.thread_time() - begin_s
            self._left_s -= spent_s if spent_s > _SLOW_S else 0.0


def end_of_name(pattern: str) -> str:
    """The expression by which PEFT finds a key of its patterns: at the end of a name, after a dot."""
    return rf"(.*\.)?({pattern})$"


def names_ending(pattern: str, names: Sequence[str], *, setting: str) -> list[str]:
    """The names whose end matches a pattern of a config, as PEFT matches those of its ``rank_pattern``.

    Raises:
        ConfigError: it is no regular expression, or takes too long.
    """
    try:
        compiled = Pattern(end_of_name(pattern), file=Path(setting))
    except re.error as error:
        raise ConfigError(f"{setting}: {pattern!r} is no regular expression: {error}") from None
    return [name for name in names if compiled.match(name)]


def short(value: object) -> str:
    """A value as Python writes it, cut to 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
