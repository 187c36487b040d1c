"""Records of all sources of a run, each with its place: files of text, columnar files, saved folders and the hub.

Local files are read by this package and not by ``datasets``, so that an error can name file and line and
no column's type is guessed ("007" stays a string); the hub and folders of ``save_to_disk`` are read by ``datasets``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from dist_lora.data.columnar import ColumnarFile, LoadedRows, is_saved, load_saved, splits_of
from dist_lora.data.columns import Reading, check_names, check_there, readings_for, renamed
from dist_lora.data.compressed import SUFFIXES as COMPRESSIONS
from dist_lora.data.hub import HUB_ID, default_split, load_from_hub
from dist_lora.data.json_documents import EXAMPLE
from dist_lora.data.own_format import OwnFormat
from dist_lora.data.records import Format, check_columns, recognize_format
from dist_lora.data.text_files import CsvRows, JsonLines, open_json
from dist_lora.errors import DataError, DistLoraError, ReadError, cannot_read
from dist_lora.text import nearest

NUM_EXAMPLES = 5
"""Faults listed individually; the rest are counted."""

_TEXT = (".jsonl", ".ndjson", ".json", ".csv")
_COLUMNAR = (".parquet", ".arrow")
_LISTED = f"{' '.join((*_TEXT, *_COLUMNAR))}, and text with {' '.join(COMPRESSIONS)}"
_HASH_CHUNK_BYTES = 16 * 2**20
_NUM_LOOKED_AT = 100  # records, for their columns


@dataclass
class Faults:
    """Faults of one kind, counted; the first few are kept as messages."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Count one more fault."""
        self.count += 1
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(text)

    def extend(self, other: Faults) -> None:
        """Add the faults of another part of the data, which follows this one."""
        self.count += other.count
        self.examples = (self.examples + other.examples)[:NUM_EXAMPLES]

    def listed(self) -> str:
        """The examples, a line each, and the count of the rest."""
        rest = self.count - len(self.examples)
        return "\n".join(f"  {text}" for text in [*self.examples, *([f"and {rest} more"] if rest else [])])


class Source(Protocol):
    """One file or hub data set. ``[i]`` raises DataError if the record is invalid."""

    name: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def where(self, index: int) -> str:
        """Where a record is, "file.jsonl:7"."""
        ...


@dataclass(frozen=True)
class Records:
    """The records of all sources, one after another, read on access."""

    sources: tuple[Source, ...]
    formats: tuple[Format, ...]
    starts: tuple[int, ...]
    """The index of the first record of each source and, last, the number of records."""
    columns: tuple[Mapping[str, str], ...]
    """Of each source our names of columns with its own, where they differ."""
    own: OwnFormat | None = None
    """The user's own format, if the records are in it."""

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = self._source_of(index)
        record, columns = _record(self.sources[source], index - self.starts[source]), self.columns[source]
        return renamed(record, columns) if columns else record

    def where(self, index: int) -> str:
        """Where a record is, "file.jsonl:7"."""
        source = self._source_of(index)
        return self.sources[source].where(index - self.starts[source])

    def converted(self, index: int) -> tuple[dict[str, Any], Format]:
        """A record in one of our formats, and in which: that of its source, or of what the user's own format makes of it.

        Raises:
            DataError: the record is invalid, or see ``OwnFormat.read``.
        """
        record = self[index]
        return (record, self.formats[self._source_of(index)]) if self.own is None else self.own.read(record)

    def padding(self) -> list[str]:
        """What is read as padding though it might be a value, a sentence for each source that has such nulls."""
        columnar = [source for source in self.sources if isinstance(source, ColumnarFile | LoadedRows)]
        lines = []
        for source in columnar:
            with _reading(source.name):
                lines.append(source.padding())
        return [line for line in lines if line]

    def _source_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return int(np.searchsorted(self.starts, index, side="right")) - 1


def read_records(
    names: str | Sequence[str],
    *,
    fmt: Format | None,
    which: str,
    is_fetched: bool = False,
    readings: Sequence[Reading] = (),
    own: OwnFormat | None = None,
) -> Records:
    """Opens the sources and finds their formats; the records themselves are read later, one by one.

    Args:
        names: files (``.jsonl .json .csv .parquet .arrow``, text also compressed), folders of ``save_to_disk``
            (``PATH[@SPLIT]``) or hub ids ``ORG/NAME[:CONFIG][@SPLIT]``.
        fmt: the format of all sources; None recognizes each by the columns of its first record.
        readings: for each source how it is read, instead of ``fmt``; empty if all are read alike.
        which: "train" or "eval": the setting that errors name, and the hub's split.
        is_fetched: ``hash_sources`` has read the same names on this node, so the hub isn't queried again.
        own: the user's own format, in place of ``fmt``. A source's format is then that of its first record, converted; the
            records are as they are in the source.

    Raises:
        DataError: a source is missing, empty, of an unknown kind, lacks required columns, or has no column of a name that is set.
    """
    listed = [names] if isinstance(names, str) else list(names)
    if not listed:
        raise DataError(f"data.{which} is an empty list; at least one file or hub id is expected")
    sources = tuple(_opened(name, which, is_fetched=is_fetched) for name in listed)
    each = readings_for(listed, readings, fmt)
    columns = tuple(dict(reading.columns) for reading in each)
    formats = tuple(_format_of(source, reading, own) for source, reading in zip(sources, each, strict=True))
    starts = tuple(itertools.accumulate((len(source) for source in sources), initial=0))
    return Records(sources=sources, formats=formats, starts=starts, columns=columns, own=own)


def hash_sources(names: str | Sequence[str], *, which: str) -> str:
    """xxh3_128 over the bytes of all sources: what decides whether cached tokens are still valid.

    Reads the files once. Raises DataError as ``read_records`` does if one is missing.
    """
    digest = xxhash.xxh3_128()
    for name in [names] if isinstance(names, str) else names:
        place = _place_of(name, which)
        digest.update(f"{place.kind}\0".encode())
        with _reading(f"data.{which}: {name}"):
            for chunk in _chunks_of(place, which):
                digest.update(chunk)
        digest.update(b"\0end\0")
    return digest.hexdigest()


def states_of(names: str | Sequence[str], *, which: str) -> list[list[int]]:
    """Size and time of the last change (ns) of each file of the sources: whether one changes while it is read.

    Raises DataError as ``read_records`` does if one is missing.
    """
    states = []
    for name in [names] if isinstance(names, str) else names:
        path = _place_of(name, which).path
        with _reading(f"data.{which}: {name}"):
            files = [] if path is None else sorted(path.iterdir()) if path.is_dir() else [path]
            states += [[found.st_size, found.st_mtime_ns] for file in files if (found := file.stat())]
    return states


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns an error of the file system within it into one of ours about ``what``; see ``cannot_read``."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DistLoraError):
            raise
        raise cannot_read(f"{what} can't be read: {error.strerror or error}", error) from error


def _record(source: Source, index: int) -> dict[str, Any]:
    try:
        return source[index]
    except OSError as error:  # not one of many broken records: all that follow may be as this one
        where = f"{source.where(index)}: can't be read: {error.strerror or error}"
        raise ReadError(where) from error


@dataclass(frozen=True)
class _Place:
    """What a name of a source leads to: a file, a folder of ``save_to_disk``, or (``path`` is None) the hub."""

    name: str
    path: Path | None

    @property
    def kind(self) -> str:
        """What, besides the content, decides how it is read: ".jsonl.gz", "saved", "hub"."""
        if self.path is None:
            return "hub"
        return "saved" if self.path.is_dir() else "".join(_suffixes_of(self.path))


def _opened(name: str, which: str, *, is_fetched: bool) -> Source:
    with _reading(f"data.{which}: {name}"):
        return _open(_place_of(name, which), which, is_fetched=is_fetched)


def _open(place: _Place, which: str, *, is_fetched: bool) -> Source:
    path = place.path
    suffix = _suffixes_of(path)[0] if path else ""
    if path is None or path.is_dir():
        source: Source = _load(place, which, is_fetched=is_fetched)
    elif suffix == ".csv":
        source = CsvRows(path)
    elif suffix in _COLUMNAR:
        source = ColumnarFile(path)
    elif suffix == ".json":
        source = open_json(path)
    else:
        source = JsonLines(path)
    if len(source) == 0:
        raise DataError(f"{place.name}: no records; at least one is expected, e.g. {EXAMPLE}")
    return source


def _load(place: _Place, which: str, *, is_fetched: bool) -> LoadedRows:
    if place.path is None:
        return load_from_hub(place.name, which, suffixes=_LISTED, is_fetched=is_fetched)
    return load_saved(place.name, place.path)


def _chunks_of(place: _Place, which: str) -> Iterator[bytes]:
    if place.path is not None and not place.path.is_dir():
        return _file_chunks(place.path)
    return _load(place, which, is_fetched=False).chunks()


def _suffixes_of(path: Path) -> tuple[str, str]:
    """The suffix that says what a file holds, and that of its compression or "": .jsonl and .gz."""
    if path.suffix in COMPRESSIONS:
        return path.with_suffix("").suffix, path.suffix
    return path.suffix, ""


def _is_supported(path: Path) -> bool:
    suffix, compression = _suffixes_of(path)
    return suffix in _TEXT or (suffix in _COLUMNAR and not compression)


def is_of_hub(name: str, which: str) -> bool:
    """Whether a name of ``data.train`` or ``data.eval`` is a data set of the hub, not a file or folder here.

    Raises:
        DataError: it is neither.
    """
    return _place_of(name, which).path is None


def _place_of(name: str, which: str) -> _Place:
    """The file or folder of that name, or the hub.

    Raises:
        DataError: there is nothing of that name, or nothing that can be read.
    """
    with _reading(f"data.{which}: {name}"):
        return _found(name, which)


def _found(name: str, which: str) -> _Place:
    path = _stat(name, which)
    if path.is_dir():
        return _Place(name, _saved_folder(name, path, None, which))
    if path.exists():
        if not _is_supported(path):
            raise DataError(f"data.{which}: {name} has suffix {''.join(_suffixes_of(path))!r}; {_LISTED} are supported")
        if not os.access(path, os.R_OK):
            raise DataError(f"data.{which}: {name} can't be read by this user (mode {path.stat().st_mode & 0o777:o})")
        return _Place(name, path)
    before, at, split = name.rpartition("@")
    if at and _stat(before, which).is_dir():
        return _Place(name, _saved_folder(before, _stat(before, which), split, which))
    if not _is_supported(path) and not name.startswith(("/", ".", "~")) and HUB_ID.fullmatch(name):
        return _Place(name, None)
    if not path.parent.is_dir():
        raise DataError(f"data.{which}: {name} doesn't exist, nor does its folder {path.parent}")
    near = nearest(path.name, sorted(os.listdir(path.parent)), cutoff=0.5)
    raise DataError(f"data.{which}: {name} doesn't exist" + (f" (nearest: {near})" if near else ""))


def _stat(name: str, which: str) -> Path:
    """The path of a name, which may not exist but can be asked for."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, no permission, a NUL, an unknown home
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"data.{which}: {name[:200]} can't be opened: {reason}") from None
    return path


def _saved_folder(name: str, folder: Path, split: str | None, which: str) -> Path:
    """The folder of one data set: the one that is named, or that of a split in it."""
    if not is_saved(folder):
        inside = sorted(child.name for child in folder.iterdir() if _is_supported(child))[:NUM_EXAMPLES]
        raise DataError(f"data.{which}: {name} is a folder; name its files: {', '.join(inside) or 'it has none'}")
    splits = splits_of(folder)
    if splits is None:
        if split is not None:
            raise DataError(f"data.{which}: {name} is one data set without splits; name it without @{split}")
        return folder
    chosen = split or default_split(which)
    if chosen not in splits:
        raise DataError(
            f"data.{which}: {name} has no split {chosen!r}; it has {', '.join(splits)}. Name one: {name}@SPLIT"
        )
    if not (folder / chosen).is_dir():
        raise DataError(f"data.{which}: {folder / chosen}, a split that {name} lists, doesn't exist. Save it again")
    return folder / chosen


def _format_of(source: Source, reading: Reading, own: OwnFormat | None) -> Format:
    """The format by the first record that can be read; a broken file is reported when its lines are read."""
    fmt, names = None if reading.format == "auto" else reading.format, dict(reading.columns)
    if names and own is None:
        return _format_of_renamed(source, fmt, names)
    for index in range(min(len(source), _NUM_LOOKED_AT)):
        try:
            record = _record(source, index)
        except DataError:
            continue
        try:
            if own is not None:
                return own.read(renamed(record, names))[1]
            return _recognized(record, fmt)
        except DataError as error:
            raise DataError(f"{source.where(index)}: {error}{_wrapped_hint(source, record)}") from None
    return fmt or "messages"


def _recognized(record: dict[str, Any], fmt: Format | None) -> Format:
    # A CSV's empty field is what null is elsewhere: no system message.
    columns = [key for key, value in record.items() if value is not None and (key, value) != ("system", "")]
    columns = columns or list(record)
    if fmt is None:
        return recognize_format(columns)
    check_columns(columns, fmt)
    return fmt


def _format_of_renamed(source: Source, fmt: Format | None, names: Mapping[str, str]) -> Format:
    """The format by the first record with its columns renamed; all names of the mapping must be right."""
    readable = []
    for index in range(min(len(source), _NUM_LOOKED_AT)):
        with contextlib.suppress(DataError):
            readable.append(_record(source, index))
    try:
        check_names(names, fmt)
        check_there(names, readable)
        found = _recognized(renamed(readable[0], names), fmt) if readable else fmt or "messages"
        check_names(names, found)
        return found
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from None


def _wrapped_hint(source: Source, record: dict[str, Any]) -> str:
    """What to do about a file that is one object around the list of records."""
    lists = [key for key, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(source) > 1 or len(lists) != 1:
        return ""
    return (
        f". Its {lists[0]!r} is a list of {len(record[lists[0]]):,} objects; if they are the records, write the list "
        f"alone into the file: jq '.\"{lists[0]}\"' {Path(source.name).name} > records.json"
    )


def _file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            yield chunk
