"""Records of JSONL, JSON and CSV files, each with its line. All of a file is read, or the file is refused."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_lora.data.compressed import MAGIC, open_plain
from dist_lora.data.json_text import DECODER, parse_json
from dist_lora.data.records import EXAMPLES
from dist_lora.errors import DataError

MAX_RECORD_BYTES = 32 * 2**20
"""A longer line isn't a record but a file without newlines."""

EXAMPLE = EXAMPLES["messages"]
_SCAN_BYTES = 16 * 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
_OTHER_FILES = {**MAGIC, b"PAR1": ".parquet", b"ARROW1": ".arrow"}


class JsonLines:
    """A file with one JSON object per line; empty lines, a byte order mark and CRLF are accepted."""

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        self.name = str(path)
        self._file = file or open_plain(path)
        _refuse_binary(self._file, path)
        self._starts, self._lengths, self._lines = _index_lines(self._file)

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
            value = parse_json(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8") from None
        except json.JSONDecodeError as error:
            hint = (
                ". An object over several lines, or a list, is read from a file named .json" if _is_cut(error) else ""
            )
            raise DataError(
                f"not JSON: {error.msg} at column {error.pos + 1}, {_near(error.doc, error.pos)}; "
                f"one object per line is expected, e.g. {EXAMPLE}{hint}"
            ) from None
        except RecursionError:
            raise DataError("the JSON is nested too deeply") from None
        except ValueError as error:
            raise DataError(f"not JSON: {first_line(str(error))}") from None  # NaN, a key twice, a number too long
        return _as_object(value)


class JsonDocuments:
    """A file that is one JSON list of objects, or objects over several lines each."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name = str(path)
        content = file.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(f"{self.name}:{line}: byte 0x{content[error.start]:02x} is not UTF-8") from None
        self._records: list[Any] = []
        self._lines: list[int] = []
        for line, record in _Documents(text, self.name).records():
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
        file = open_plain(path)
        _refuse_binary(file, path)
        csv.field_size_limit(MAX_RECORD_BYTES)
        self._rows: list[list[str]] = []
        self._lines: list[int] = []
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
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
        _check_header(self._header, f"{self.name}:{self._lines[0] if self._lines else 1}")
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
        if row == self._header:
            raise DataError(f"the header, {', '.join(row)}, stands here again. Remove the line")
        return dict(zip(self._header, row, strict=True))


def open_json(path: Path) -> JsonLines | JsonDocuments:
    """A ``.json`` file: an object per line if its first line is one, else a list, or objects over several lines."""
    file = open_plain(path)
    _refuse_binary(file, path)
    line = next((line for line in _first_lines(file) if line), "")
    file.seek(0)
    if line.startswith("["):
        return JsonDocuments(path, file)
    try:
        parse_json(line)
    except json.JSONDecodeError as error:
        if line.startswith("{") and _is_cut(error):
            return JsonDocuments(path, file)
    except (ValueError, RecursionError):
        pass  # told when the line is read
    return JsonLines(path, file)


def first_line(text: str) -> str:
    """The first line of a library's message."""
    return text.strip().splitlines()[0] if text.strip() else "no reason given"


class _Documents:
    """The records of a JSON text, with the line on which each begins."""

    def __init__(self, text: str, name: str) -> None:
        self._text, self._name = text, name
        self._at, self._line, self._counted = 0, 1, 0

    def records(self) -> Iterator[tuple[int, Any]]:
        """The elements of a list that is all of the text, or the objects that follow one another.

        Raises:
            DataError: the text is something else, from that line on.
        """
        if self._skip() == "[":
            yield from self._elements()
            if self._skip():
                raise self._error("the list ends before it, and nothing can follow")
            return
        while self._skip():
            yield self._line, self._value()

    def _elements(self) -> Iterator[tuple[int, Any]]:
        self._at += 1
        if self._skip() == "]":
            self._at += 1
            return
        while True:
            self._skip()
            yield self._line, self._value()
            mark = self._skip()
            if mark not in (",", "]"):
                raise self._error("',' or ']' is expected after a record")
            self._at += 1
            if mark == "]":
                return

    def _value(self) -> Any:
        try:
            value, self._at = DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError as error:
            self._move(error.pos)
            raise self._error(error.msg) from None
        except RecursionError:
            raise DataError(f"{self._name}:{self._line}: the JSON is nested too deeply") from None
        except ValueError as error:
            raise DataError(f"{self._name}:{self._line}: not JSON: {first_line(str(error))}") from None
        return value

    def _skip(self) -> str:
        """Moves behind white space; returns the character there, or "" at the end."""
        found = _SPACE.match(self._text, self._at)
        self._move(found.end() if found else self._at)
        return self._text[self._at : self._at + 1]

    def _move(self, position: int) -> None:
        self._line += self._text.count("\n", self._counted, position)
        self._at = self._counted = position

    def _error(self, reason: str) -> DataError:
        return DataError(
            f"{self._name}:{self._line}: not JSON: {reason}, {_near(self._text, self._at)}; "
            f"a list of objects is expected, e.g. [{EXAMPLE}]"
        )


def _is_cut(error: json.JSONDecodeError) -> bool:
    return error.pos >= len(error.doc.rstrip())


def _first_lines(file: BinaryIO) -> Iterator[str]:
    for number in itertools.count():
        line = file.readline(MAX_RECORD_BYTES)
        if not line:
            return
        yield (line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).decode(errors="replace").strip()


def _check_header(header: list[str], where: str) -> None:
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(f"{where}: the header has {', '.join(map(repr, twice))} more than once; name each column once")
    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise DataError(
            f"{where}: the header is {header[0]!r}, one field; fields separated by ',' are expected, not {other!r}"
        )


def _as_object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), f"{value!r}")
        hint = ". A file that is one list is read if it is named .json" if isinstance(value, list) else ""
        raise DataError(f"{kind} instead of an object; one object per record is expected, e.g. {EXAMPLE}{hint}")
    return value


def _refuse_binary(file: BinaryIO, path: Path) -> None:
    """Raises unless the file may be UTF-8; leaves it at its start."""
    head = file.read(8)
    file.seek(0)
    kind = next((suffix for magic, suffix in _OTHER_FILES.items() if head.startswith(magic)), None)
    if kind is not None and path.suffix == kind:
        raise DataError(f"{path}: is compressed twice; unpack it once")
    if kind is not None:
        right = f"{path.name}{kind}" if kind in MAGIC.values() else f"{path.stem}{kind}"
        raise DataError(
            f"{path}:1: the file begins as a {kind} file does, and its name says {path.suffix}. Name it {right}"
        )
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:4]:
        raise DataError(
            f"{path}:1: the file is UTF-16 or binary (it begins with {head[:4].hex(' ')}); UTF-8 is expected: "
            f"iconv -f UTF-16 -t UTF-8 {path.name} > new{path.suffix}"
        )


def _near(text: str, position: int) -> str:
    piece = text[max(0, position - 15) : position + 15].strip()
    return f"near {piece!r}" if piece else "at the end of the line"


def _index_lines(file: BinaryIO) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length in bytes and number (from 1) of each line that isn't empty."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        empty = np.zeros(0, np.int64)
        return empty, empty, empty
    data = np.memmap(file, np.uint8, "r")
    ends = [np.flatnonzero(data[at : at + _SCAN_BYTES] == ord("\n")) + at for at in range(0, size, _SCAN_BYTES)]
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
