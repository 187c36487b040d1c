"""A JSON list of objects, or objects over several lines each, read in pieces: where each object begins."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from dist_lora.data.json_text import DECODER, MAX_RECORD_BYTES, first_line, near
from dist_lora.data.places import Places, begin_of
from dist_lora.data.records import EXAMPLES
from dist_lora.errors import DataError

EXAMPLE = EXAMPLES["messages"]
_AT_ONCE = 2**20  # bytes
_SPACE = re.compile(r"[ \t\r\n]*")
_CUT = 16
"""Characters before the end of a piece in which a fault may be the piece's and not the text's: the longest literal, an escape."""


def documents_of(file: BinaryIO, name: str) -> Places:
    """The elements of a list that is all of the file, or the objects that follow one another.

    Holds a piece of the text at a time. ``name``: the file's, for errors.

    Raises:
        DataError: the text is something else, from that line on.
    """
    file.seek(0)
    return _Documents(file, name).places()


def as_object(value: object) -> dict[str, Any]:
    """The value of a record. Raises DataError where it is no object."""
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), f"{value!r}")
        hint = ". A file that is one list is read if it is named .json" if isinstance(value, list) else ""
        raise DataError(f"{kind} instead of an object; one object per record is expected, e.g. {EXAMPLE}{hint}")
    return value


class _Documents:
    """A JSON text of which a window is in memory, from what was read last on."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._byte, self._line, self._counted = begin_of(file), 1, 0  # of the character at ``_counted``
        self._is_whole = False  # the window ends where the file does

    def places(self) -> Places:
        """See ``documents_of``."""
        places = Places()
        is_list = self._skip() == "["
        for _ in self._elements() if is_list else self._objects():
            places.add(self._byte, line=self._line)
            self._read_value()
        if is_list and self._skip():
            raise self._error("the list ends before it, and nothing can follow")
        places.end = self._byte
        return places

    def _objects(self) -> Iterator[None]:
        while self._skip():
            yield

    def _elements(self) -> Iterator[None]:
        """Once at the begin of each element, which has been read when it is asked for the next one."""
        self._at += 1
        if self._skip() == "]":
            self._at += 1
            return
        while True:
            self._skip()
            yield
            mark = self._skip()
            if mark not in (",", "]"):
                raise self._error("',' or ']' is expected after a record")
            self._at += 1
            if mark == "]":
                return

    def _read_value(self) -> Any:
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._read_on():
                    continue
                self._move(error.pos)
                raise self._error(error.msg) from None
            except RecursionError:
                raise DataError(f"{self._name}:{self._line}: the JSON is nested too deeply") from None
            except ValueError as error:
                raise DataError(f"{self._name}:{self._line}: not JSON: {first_line(str(error))}") from None
            if end == len(self._text) and self._read_on():
                continue  # a number may go on
            if end - self._at > MAX_RECORD_BYTES:
                raise self._too_long()
            self._at = end
            return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the fault may be that the window ends within the value; raises if the value is none that is read at all."""
        is_near = error.pos >= len(self._text) - _CUT or error.msg.startswith("Unterminated string")
        if is_near and not self._is_whole and len(self._text) - self._at > MAX_RECORD_BYTES:
            raise self._too_long()
        return is_near

    def _too_long(self) -> DataError:
        return self._error(f"a record of more than {MAX_RECORD_BYTES // 2**20} MiB begins here")

    def _skip(self) -> str:
        """Moves behind white space; returns the character there, or "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._move(found.end() if found else self._at)
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def _read_on(self) -> bool:
        """Twice as much of the text, without what has been read of it; False at the end of the file."""
        if self._is_whole:
            return False
        self._move(self._at)
        self._text, self._at, self._counted = self._text[self._at :], 0, 0
        chunk = self._file.read(max(_AT_ONCE, len(self._text)))
        self._is_whole = not chunk
        try:
            self._text += self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self._name}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8") from None
        return True

    def _move(self, position: int) -> None:
        passed = self._text[self._counted : position]
        self._line += passed.count("\n")
        self._byte += len(passed.encode())
        self._at = self._counted = position

    def _error(self, reason: str) -> DataError:
        return DataError(
            f"{self._name}:{self._line}: not JSON: {reason}, {near(self._text, self._at)}; "
            f"a list of objects is expected, e.g. [{EXAMPLE}]"
        )
