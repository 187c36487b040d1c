"""Records from JSONL, JSON, CSV and parquet files and from the hub, each with its file and line.

Local files are read here and not by ``datasets``, so that an error can name file and line and
no column's type is guessed ("007" stays a string); the hub is read by ``datasets``.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from dist_lora.data.records import EXAMPLES, Format, check_columns, recognize_format
from dist_lora.errors import DataError
from dist_lora.text import nearest

MAX_RECORD_BYTES = 32 * 2**20
"""A longer line isn't a record but a file without newlines."""

NUM_EXAMPLES = 5
"""Faults listed individually; the rest are counted."""

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")
_HASH_CHUNK_BYTES = 16 * 2**20
_EXAMPLE = EXAMPLES["messages"]


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

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = self._source_of(index)
        return self.sources[source][index - self.starts[source]]

    def where(self, index: int) -> str:
        """Where a record is, "file.jsonl:7"."""
        source = self._source_of(index)
        return self.sources[source].where(index - self.starts[source])

    def format_of(self, index: int) -> Format:
        """The format of the source that holds this record."""
        return self.formats[self._source_of(index)]

    def _source_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return int(np.searchsorted(self.starts, index, side="right")) - 1


def read_records(names: str | Sequence[str], *, fmt: Format | None, which: str, is_fetched: bool = False) -> Records:
    """Opens the sources and finds their formats; the records themselves are read later, one by one.

    Args:
        names: files (``.jsonl .json .csv .parquet``) or hub ids ``ORG/NAME[:CONFIG][@SPLIT]``.
        fmt: the format of all sources; None recognizes each by the columns of its first record.
        which: "train" or "eval": the setting that errors name, and the hub's split.
        is_fetched: ``hash_sources`` has read the same names on this node, so the hub isn't queried again.

    Raises:
        DataError: a source is missing, empty, of an unknown kind, or lacks required columns.
    """
    listed = [names] if isinstance(names, str) else list(names)
    if not listed:
        raise DataError(f"data.{which} is an empty list; at least one file or hub id is expected")
    sources = tuple(_open(name, which, is_fetched=is_fetched) for name in listed)
    formats = tuple(_format_of(source, fmt) for source in sources)
    starts = tuple(itertools.accumulate((len(source) for source in sources), initial=0))
    return Records(sources=sources, formats=formats, starts=starts)


def hash_sources(names: str | Sequence[str], *, which: str) -> str:
    """xxh3_128 over the bytes of all sources: what decides whether cached tokens are still valid.

    Reads the files once. Raises DataError as ``read_records`` does if one is missing.
    """
    digest = xxhash.xxh3_128()
    for name in [names] if isinstance(names, str) else names:
        path = _local_path(name, which)
        digest.update(f"{path.suffix if path else 'hub'}\0".encode())
        for chunk in _file_chunks(path) if path else HubSource(name, which).chunks():
            digest.update(chunk)
        digest.update(b"\0end\0")
    return digest.hexdigest()


class JsonLines:
    """A file with one JSON object per line; empty lines, a byte order mark and CRLF are accepted."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = path.open("rb")
        _refuse_utf16(self._file.read(4), self.name)
        self._starts, self._lengths, self._lines = _index_lines(path)

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        """File and line."""
        return f"{self.name}:{self._lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        num_bytes = int(self._lengths[index])
        if num_bytes > MAX_RECORD_BYTES:
            raise DataError(
                f"a line of {num_bytes / 2**20:.1f} MiB; one record of at most {MAX_RECORD_BYTES // 2**20} MiB "
                "is expected. Write one JSON object per line"
            )
        line = os.pread(self._file.fileno(), num_bytes, int(self._starts[index]))
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"not JSON: {error.msg} at column {error.pos + 1}, {_near(error.doc, error.pos)}; "
                f"one object per line is expected, e.g. {_EXAMPLE}"
            ) from None
        except RecursionError:
            raise DataError("the JSON is nested too deeply") from None
        except ValueError as error:
            raise DataError(f"not JSON: {_first_line(str(error))}") from None  # a number of thousands of digits
        return _as_object(value)


class JsonArray:
    """A file that is one JSON list of objects."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        head = path.read_bytes()
        _refuse_utf16(head[:4], self.name)
        try:
            text = head.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = head.count(b"\n", 0, error.start) + 1
            raise DataError(f"{self.name}:{line}: byte 0x{head[error.start]:02x} is not UTF-8") from None
        self._records: list[Any] = []
        self._lines: list[int] = []
        for line, record in _elements(text, self.name):
            self._lines.append(line)
            self._records.append(record)

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        """File and the line on which the record begins."""
        return f"{self.name}:{self._lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _as_object(self._records[index])


class CsvRows:
    """A CSV file with a header line; every value is a string."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        with path.open("rb") as file:
            _refuse_utf16(file.read(4), self.name)
        csv.field_size_limit(MAX_RECORD_BYTES)
        self._rows: list[list[str]] = []
        self._lines: list[int] = []
        with path.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, strict=True)
            line = 1
            try:
                for row in reader:
                    if row:
                        self._rows.append(row)
                        self._lines.append(line)
                    line = reader.line_num + 1
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(f"{self.name}:{line}: not CSV in UTF-8: {error}") from None
        self._header = self._rows.pop(0) if self._rows else []
        self._lines = self._lines[1:]

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """File and the line on which the row begins."""
        return f"{self.name}:{self._lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if len(row) != len(self._header):
            raise DataError(f"{len(row)} fields, and the header has {len(self._header)}: {', '.join(self._header)}")
        return dict(zip(self._header, row, strict=True))


class ParquetRows:
    """A parquet file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self.name = str(path)
        try:
            self._table = pyarrow.parquet.read_table(path, memory_map=True)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{self.name}: not a complete parquet file: {error}") from None

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def where(self, index: int) -> str:
        """File and row; a parquet file has no lines."""
        return f"{self.name}: row {index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        import pyarrow

        try:
            return dict(self._table.slice(index, 1).to_pylist()[0])
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # a string not in UTF-8, a year 300,000
            raise DataError(f"the row can't be read: {_first_line(str(error))}") from None


class HubSource:
    """A data set of the hub, loaded by ``datasets``; once downloaded, from its cache alone."""

    def __init__(self, name: str, which: str, *, is_fetched: bool = False) -> None:
        import datasets

        parts = _HUB_ID.fullmatch(name)
        assert parts is not None, name
        self.name = name
        split = parts["split"] or ("train" if which == "train" else "validation")
        if is_fetched:
            # What can't be read back from the cache is requested again.
            with contextlib.suppress(Exception), _without_network():
                self._dataset = datasets.load_dataset(parts["name"], name=parts["config"], split=split)
                return
        try:
            self._dataset = datasets.load_dataset(parts["name"], name=parts["config"], split=split)
        except Exception as error:
            raise DataError(_hub_error(name, parts["name"], split, which, error)) from error

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, index: int) -> str:
        """Hub id and row."""
        return f"{self.name}: row {index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._dataset[index])

    @property
    def folder(self) -> Path:
        """The folder of ``datasets``' cache that holds it."""
        files = self._dataset.cache_files
        return Path(files[0]["filename"]).parent if files else Path(self.name)

    def chunks(self) -> Iterator[bytes]:
        """All rows as bytes, the same on any machine that has the same rows."""
        import pyarrow

        for batch in self._dataset.with_format("arrow").iter(batch_size=1000):
            sink = pyarrow.BufferOutputStream()
            for plain in batch.replace_schema_metadata(None).combine_chunks().to_batches():
                with pyarrow.ipc.new_stream(sink, plain.schema) as writer:
                    writer.write_batch(plain)
            yield sink.getvalue().to_pybytes()


@contextlib.contextmanager
def _without_network() -> Iterator[None]:
    """``datasets`` reads its cache without requests: otherwise each load costs ten requests per rank."""
    import datasets

    was_offline, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()  # it would warn that the hub can't be reached
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        datasets.logging.set_verbosity(verbosity)


def _hub_error(name: str, repo: str, split: str, which: str, error: Exception) -> str:
    """The message for a data set that can't be loaded; ``datasets`` has many exceptions for few causes."""
    text = str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds or any(sign in text for sign in ("gated", "401", "403")):
        return (
            f"data.{which}: {repo} is gated or private on the hub ({_first_line(text)}). Request access on "
            f"https://huggingface.co/datasets/{repo}, then log in: `hf auth login`, or set HF_TOKEN"
        )
    if "Config name is missing" in text or "BuilderConfig" in text:
        return f"data.{which}: {repo} has several configs: {text.strip()}\nName one: data.{which}: {repo}:CONFIG"
    if "split" in text.lower():
        return f"data.{which}: {repo} has no split {split!r} ({_first_line(text)}). Name one: {repo}@SPLIT"
    if "RepositoryNotFoundError" in kinds or "doesn't exist on the Hub" in text:
        return f"data.{which}: {name!r} is neither a file nor a data set of the hub. Check the name"
    return (
        f"data.{which}: the hub's data set {name!r} can't be read: {type(error).__name__}: "
        f"{_first_line(text)}. Without a network, name a local file (.jsonl .json .csv .parquet)"
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"


def _open(name: str, which: str, *, is_fetched: bool) -> Source:
    path = _local_path(name, which)
    if path is None:
        source: Source = HubSource(name, which, is_fetched=is_fetched)
    elif path.suffix == ".csv":
        source = CsvRows(path)
    elif path.suffix == ".parquet":
        source = ParquetRows(path)
    elif path.suffix == ".json" and _begins_a_list(path):
        source = JsonArray(path)
    else:
        source = JsonLines(path)
    if len(source) == 0:
        raise DataError(f"{name}: no records; at least one is expected, e.g. {_EXAMPLE}")
    return source


def _local_path(name: str, which: str) -> Path | None:
    """The file of that name, or None for a hub id."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RuntimeError) as error:  # too long, no permission, a NUL, an unknown home
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"data.{which}: {name[:200]} can't be opened: {reason}") from None
    if path.is_dir():
        inside = sorted(child.name for child in path.iterdir() if child.suffix in _SUFFIXES)[:NUM_EXAMPLES]
        raise DataError(f"data.{which}: {name} is a folder; name its files: {', '.join(inside) or 'it has none'}")
    if path.exists():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"data.{which}: {name} has suffix {path.suffix!r}; {' '.join(_SUFFIXES)} are supported")
        if not os.access(path, os.R_OK):
            raise DataError(f"data.{which}: {name} can't be read by this user (mode {path.stat().st_mode & 0o777:o})")
        return path
    if path.suffix not in _SUFFIXES and not name.startswith(("/", ".", "~")) and _HUB_ID.fullmatch(name):
        return None
    if not path.parent.is_dir():
        raise DataError(f"data.{which}: {name} doesn't exist, nor does its folder {path.parent}")
    near = nearest(path.name, sorted(os.listdir(path.parent)), cutoff=0.5)
    raise DataError(f"data.{which}: {name} doesn't exist" + (f" (nearest: {near})" if near else ""))


def _format_of(source: Source, fmt: Format | None) -> Format:
    """The format by the first record that can be read; a broken file is reported when its lines are read."""
    for index in range(min(len(source), 100)):
        try:
            record = source[index]
        except DataError:
            continue
        columns = [key for key, value in record.items() if value is not None] or list(record)
        try:
            if fmt is None:
                return recognize_format(columns)
            check_columns(columns, fmt)
            return fmt
        except DataError as error:
            raise DataError(f"{source.where(index)}: {error}") from None
    return fmt or "messages"


def _as_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), f"{value!r}")
        raise DataError(f"{kind} instead of an object; one object per record is expected, e.g. {_EXAMPLE}")
    return value


def _refuse_utf16(head: bytes, name: str) -> None:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
        raise DataError(
            f"{name}:1: the file is UTF-16 or binary (it begins with {head.hex(' ')}); UTF-8 is expected: "
            f"iconv -f UTF-16 -t UTF-8 {Path(name).name} > new{Path(name).suffix}"
        )


def _near(text: str, position: int) -> str:
    piece = text[max(0, position - 15) : position + 15].strip()
    return f"near {piece!r}" if piece else "at the end of the line"


def _begins_a_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _elements(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list with the line on which each begins."""
    decoder = json.JSONDecoder()
    skip = re.compile(r"[\s,]*")
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        skipped = skip.match(text, position)
        position = skipped.end() if skipped else position
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            line += text.count("\n", counted, error.pos)
            raise DataError(
                f"{name}:{line}: not JSON: {error.msg}, {_near(text, error.pos)}; "
                f"a list of objects is expected, e.g. [{_EXAMPLE}]"
            ) from None
        except RecursionError:
            raise DataError(f"{name}:{line}: the JSON is nested too deeply") from None
        except ValueError as error:
            raise DataError(f"{name}:{line}: not JSON: {_first_line(str(error))}") from None
        yield line, value


def _index_lines(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length in bytes and number (from 1) of each line that isn't empty."""
    size = path.stat().st_size
    if size == 0:
        empty = np.zeros(0, np.int64)
        return empty, empty, empty
    data = np.memmap(path, np.uint8, "r")
    ends = [
        np.flatnonzero(data[at : at + _HASH_CHUNK_BYTES] == ord("\n")) + at for at in range(0, size, _HASH_CHUNK_BYTES)
    ]
    last = np.zeros(0, np.int64) if data[-1] == ord("\n") else np.array([size])
    line_ends = np.concatenate([*ends, last]).astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), line_ends[:-1] + 1])
    if bytes(data[:3]) == b"\xef\xbb\xbf":
        starts[0] = 3
    lengths = line_ends - starts
    is_empty = np.zeros(len(starts), bool)
    for index in np.flatnonzero(lengths < 8):
        is_empty[index] = not bytes(data[starts[index] : line_ends[index]]).strip()
    kept = ~is_empty
    return starts[kept], lengths[kept], np.arange(1, len(starts) + 1)[kept]


def _file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            yield chunk
