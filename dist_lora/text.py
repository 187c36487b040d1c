"""Text for messages: sizes, lists of names, ranges and columns. Needs no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence

GIB = 2**30
MAX_NAMED = 5


def gib(num_bytes: float) -> str:
    """``12.34 GiB``."""
    return f"{num_bytes / GIB:,.2f} GiB"


def size(num_bytes: float) -> str:
    """``12.34 GiB``, or ``12.3 MiB`` where it is less than one GiB."""
    return gib(num_bytes) if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """``2 h 5 min``, ``3 min 20 s`` or ``20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def first_few(names: Sequence[str]) -> str:
    """``a, b, c, d, e and 12 more``: at most five names and the count of the rest."""
    shown = ", ".join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED:,} more"


def ranges(numbers: Iterable[int]) -> str:
    """``0-1, 5``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def without_cpp_stack(message: str) -> str:
    """An error's message without the C++ stack that torch appends to it (``Exception raised from ... frame #0``)."""
    return re.split(r"\s*(?:Exception raised from \S+ at |(?:^|\n)frame #0)", message, maxsplit=1)[0]


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The one of ``names`` that a typo most likely meant, or None; ``cutoff`` from 0 (any matches) to 1 (exact only)."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def nearest_few(name: str, names: Iterable[str], *, otherwise: str, cutoff: float = 0.6) -> str:
    """``nearest: a, b, c``, or ``otherwise`` if there is no close match."""
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=cutoff)
    return f"nearest: {', '.join(matches)}" if matches else otherwise


def in_columns(rows: Sequence[Sequence[str]], *, indent: str = "") -> Iterator[str]:
    """One line per row, with left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
