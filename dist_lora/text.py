"""Text for messages: sizes, lists of names, ranges and columns. Needs no torch."""

from __future__ import annotations

import difflib
import itertools
import math
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


def count(number: float, noun: str, nouns: str | None = None) -> str:
    """``1 rank``, ``8 ranks``; ``nouns`` is the plural, if it is not ``noun`` with an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def figure(number: float) -> str:
    """Three significant digits, never with an exponent: ``5,340``, ``89``, ``1.25``, ``0.0042``."""
    if number == 0 or not math.isfinite(number):
        return f"{number:.3g}"
    num_decimals = 2 - math.floor(math.log10(abs(float(f"{number:.2e}"))))
    rounded = round(number, num_decimals)
    text = f"{rounded:,.{max(0, num_decimals)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """Time as a person writes it, in two units: ``0.42 s``, ``1 min 50 s``, ``1 h 29 min``, ``3 d 4 h``."""
    if seconds < 59.95:
        return f"{figure(seconds)} s"
    for (large, larger), (small, smaller) in itertools.pairwise((("d", 86400), ("h", 3600), ("min", 60), ("s", 1))):
        whole, rest = divmod(round(seconds / smaller), larger // smaller)
        if whole:
            return f"{whole:,} {large} {rest} {small}" if rest else f"{whole:,} {large}"
    raise AssertionError(f"{seconds} s have no unit")


def time_range(low_s: float, high_s: float) -> str:
    """``1.25 to 3.58 s``, or ``22 min 30 s to 1 h 29 min``."""
    low, high = duration(low_s), duration(high_s)
    units = low.split()[1:], high.split()[1:]
    return f"{low.split()[0]} to {high}" if units == (["s"], ["s"]) else f"{low} to {high}"


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


def span(numbers: Iterable[float]) -> str:
    """The number that all are, or the smallest and the largest: ``4-16``."""
    values = list(numbers)
    return "-".join(f"{number:g}" for number in sorted({min(values), max(values)}))


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


def in_columns(rows: Sequence[Sequence[str]], *, indent: str = "", has_numbers: bool = False) -> Iterator[str]:
    """One line per row, with left-aligned columns; with ``has_numbers`` all but the first are aligned at their right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = [
            cell.rjust(width) if has_numbers and at else cell.ljust(width) for at, (cell, width) in enumerate(cells)
        ]
        yield (indent + "  ".join(aligned)).rstrip()
