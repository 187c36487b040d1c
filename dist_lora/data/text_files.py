"""Records of JSONL, JSON and CSV files, each with its line. All of a file is read, or the file is refused."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dist_lora.data.compressed import MAGIC, open_plain
from dist_lora.data.json_documents import EXAMPLE, as_object, documents_of
from dist_lora.data.json_text import DECODER, MAX_RECORD_BYTES, first_line, near, parse_json
from dist_lora.data.places import Places, begin_of, lines_of
from dist_lora.errors import DataError

_OTHER_FILES = {**MAGIC, b"PAR1": ".parquet", b"ARROW1": ".arrow"}


class JsonLines:
    """A file with one JSON object per line; empty lines, a byte order mark and CRLF are accepted."""

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        self.name = str(path)
        self._file = file or open_plain(path)
        _refuse_binary(self._file, path)
        self._places = lines_of(self._file)

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        """File and line."""
        return f"{self.name}:{self._places.line(index)}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        line, newline, _ = self._places.read(self._file, index, at_most=MAX_RECORD_BYTES + 1).partition(b"\n")
        if not newline and len(line) > MAX_RECORD_BYTES:
            raise DataError(
                f"a line of {self._places.size(index) / 2**20:.1f} MiB; one record of at most {MAX_RECORD_BYTES // 2**20} MiB "
                "is expected. Write one JSON object per line"
            )
        try:
            value = parse_json(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(_which_byte(error)) from None
        except json.JSONDecodeError as error:
            hint = (
                ". An object over several lines, or a list, is read from a file named .json" if _is_cut(error) else ""
            )
            raise DataError(
                f"not JSON: {error.msg} at column {error.pos + 1}, {near(error.doc, error.pos)}; "
                f"one object per line is expected, e.g. {EXAMPLE}{hint}"
            ) from None
        except RecursionError:
            raise DataError("the JSON is nested too deeply") from None
        except ValueError as error:
            raise DataError(f"not JSON: {first_line(str(error))}") from None  # NaN, a key twice, a number too long
        return as_object(value)


class JsonDocuments:
    """A file that is one JSON list of objects, or objects over several lines each. Each is parsed again where it is read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.name, self._file = str(path), file
        self._places = documents_of(file, self.name)

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        """File and the line on which the record begins."""
        return f"{self.name}:{self._places.line(index)}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            value, _ = DECODER.raw_decode(self._places.read(self._file, index).decode())
        except ValueError:
            raise DataError("the file has changed since it was opened") from None
        return as_object(value)


class CsvRows:
    """A CSV file with a header line; every value is a string. Each row is parsed again where it is read."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = open_plain(path)
        _refuse_binary(self._file, path)
        csv.field_size_limit(MAX_RECORD_BYTES)
        self._header: list[str] = []
        self._places = Places()
        self._places.end = os.fstat(self._file.fileno()).st_size
        for row, start, line in self._rows():
            if self._header:
                self._places.add(start, line=line)
            else:
                self._header = row
                _check_header(row, f"{self.name}:{line}")

    def _rows(self) -> Iterator[tuple[list[str], int, int]]:
        """Each row that isn't empty, with its first byte and its line.

        Raises:
            DataError: it isn't CSV in UTF-8, from that line on.
        """
        start = begin_of(self._file)
        text = io.TextIOWrapper(self._file, encoding="utf-8-sig", newline="")
        lines = _Lines(text)
        reader = csv.reader(lines, strict=True)
        line = 1
        try:
            for row in reader:
                if row:
                    yield row, start, line
                start, line = start + lines.take_bytes(), reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{self.name}:{line}: not CSV in UTF-8: {error}") from None
        except UnicodeDecodeError:  # of a chunk, which may be many lines
            text.detach()
            raise DataError(f"{self.name}:{_not_utf8(self._file)}") from None
        text.detach()  # which leaves the file open

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        """File and the line on which the row begins."""
        return f"{self.name}:{self._places.line(index)}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = io.StringIO(self._places.read(self._file, index).decode(), newline="")
        row = next(row for row in csv.reader(text, strict=True) if row)
        if len(row) != len(self._header):
            raise DataError(f"{len(row)} fields, and the header has {len(self._header)}: {', '.join(self._header)}")
        if row == self._header:
            raise DataError(f"the header, {', '.join(row)}, stands here again. Remove the line")
        return dict(zip(self._header, row, strict=True))


def _not_utf8(file: BinaryIO) -> str:
    """The first line of a file that isn't UTF-8, and which byte of it."""
    file.seek(0)
    for number, line in enumerate(iter(file.readline, b""), start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return (
                f"{number}: {_which_byte(error)}. From a spreadsheet: iconv -f WINDOWS-1252 -t UTF-8 OLD.csv > NEW.csv"
            )
    return "1: the file has changed while it was read"


def _which_byte(error: UnicodeDecodeError) -> str:
    return f"byte {error.start + 1} of the line, 0x{error.object[error.start]:02x}, is not UTF-8"


class _Lines:
    """The lines of a text, and the bytes of those that were taken."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self._bytes = text, 0

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(MAX_RECORD_BYTES + 1):
            if len(line) > MAX_RECORD_BYTES:
                raise csv.Error(f"a line of more than {MAX_RECORD_BYTES // 2**20} MiB")
            self._bytes += len(line.encode())
            yield line

    def take_bytes(self) -> int:
        """The bytes of the lines since it was last asked."""
        taken, self._bytes = self._bytes, 0
        return taken


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
