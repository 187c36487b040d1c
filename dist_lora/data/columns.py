"""Columns by other names: how the records of each source are read, and what a mapping of columns may say."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dist_lora.config.schema import DataSection
from dist_lora.data.records import USED_COLUMNS, Format, named_format
from dist_lora.errors import DataError
from dist_lora.text import nearest_few


@dataclass(frozen=True)
class Reading:
    """How the records of one source are read: their format, and the names of their columns by ours."""

    format: Format | Literal["auto"] = "auto"
    columns: tuple[tuple[str, str], ...] = ()  # (ours, theirs)


def sources_of(section: DataSection, which: str) -> tuple[str | list[str], tuple[Reading, ...]]:
    """The names of the sources of ``train``, ``eval`` or a named held-out set (``eval.NAME``), and how each is read.

    No readings where ``data.format`` alone says how all are read: as the caches of earlier versions were made.
    """
    fmt = named_format(section.format) or "auto"  # where it is a function of the user's own, that decides
    if which != "train":
        columns = tuple(sorted((section.columns or {}).items()))
        name = which.removeprefix("eval").removeprefix(".")
        return section.eval_files()[name], (Reading(fmt, columns),) if columns else ()
    sets = section.train_sets()
    readings = tuple(
        Reading(named_format(one.format or "auto") or "auto", tuple(sorted((one.columns or {}).items())))
        for one in sets
    )
    names = section.train if isinstance(section.train, str) else [one.path for one in sets]
    is_plain = all(one == Reading(fmt) for one in readings) and not any(one.weight for one in sets)
    return names, () if is_plain else readings


def check_names(columns: Mapping[str, str], fmt: Format | None = None) -> None:
    """Raise DataError if a mapping names a column that no format (or not ``fmt``) reads; it names all of them."""
    known = {name for used in USED_COLUMNS.values() for name in used} if fmt is None else {*USED_COLUMNS[fmt]}
    unknown = [
        f"{name} ({nearest_few(name, sorted(known), otherwise=', '.join(sorted(known)))})"
        for name in columns
        if name not in known
    ]
    if unknown:
        of = "any format" if fmt is None else f"format {fmt}"
        raise DataError(
            f"columns: no column of {of} is named {'; '.join(unknown)}; ours come first: {{prompt: question}}"
        )


def check_there(columns: Mapping[str, str], records: Iterable[Mapping[str, Any]]) -> None:
    """Raise DataError if none of the records has a column that the mapping names; it names those that they have."""
    found = {name: None for record in records for name in record}
    missing = [f"{theirs} (for {ours})" for ours, theirs in columns.items() if theirs not in found]
    if found and missing:
        raise DataError(f"columns: no column {', '.join(missing)}; found {', '.join(map(repr, found)) or 'none'}")


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with our names for its columns; the others keep theirs.

    One that has a name of ours and isn't meant by it is kept under a name that no format reads, so that it is reported as unused.
    """
    taken: Collection[str] = set(columns.values())
    kept = {
        f"{name} (not the one that is set)" if name in columns else name: value
        for name, value in record.items()
        if name not in taken
    }
    return {**{ours: record[theirs] for ours, theirs in columns.items() if theirs in record}, **kept}


def readings_for(names: Sequence[str], readings: Sequence[Reading], fmt: Format | None) -> list[Reading]:
    """One reading for each source, where none are given those of ``fmt``."""
    assert not readings or len(readings) == len(names), (names, readings)
    return list(readings) or [Reading(fmt or "auto")] * len(names)
