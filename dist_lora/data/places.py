"""Where each record of a text begins, its byte and its line, in 8 bytes a record: sets are larger than memory."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from typing import BinaryIO

import numpy as np

_SCAN_BYTES = 4 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_EMPTY_LINE = 8  # bytes; a longer line is a record, whatever it holds


class Places:
    """The records of a text, in order. A record's bytes end where the next one begins, and may have others behind it."""

    def __init__(self) -> None:
        self._starts = array("q")
        # Most records begin a line after the one before: only where another number of lines lies between is it kept.
        self._jumps = array("q")  # the records that begin so
        self._added = array("q")  # line - index, from there on
        self.end = 0  # of the last record

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, start: int, *, line: int) -> None:
        """One more record, by its first byte (from 0) and its line (from 1)."""
        self._jump(len(self._starts), line - len(self._starts))
        self._starts.append(start)

    def add_lines(self, starts: np.ndarray, numbers: np.ndarray) -> None:
        """More records, by the first bytes and the numbers of their lines, int64 both."""
        first = len(self._starts)
        added = numbers - np.arange(first, first + len(numbers))
        for at in np.flatnonzero(np.diff(added, prepend=self._added[-1] if self._added else 0)):
            self._jump(first + int(at), int(added[at]))
        self._starts.frombytes(np.ascontiguousarray(starts, np.int64).tobytes())

    def _jump(self, index: int, added: int) -> None:
        if added != (self._added[-1] if self._added else 0):
            self._jumps.append(index)
            self._added.append(added)

    def line(self, index: int) -> int:
        """The line, from 1, on which a record begins."""
        at = bisect_right(self._jumps, index) - 1
        return index + (self._added[at] if at >= 0 else 0)

    def size(self, index: int) -> int:
        """Bytes from the record's first to the next record's, or to the end."""
        return (self._starts[index + 1] if index + 1 < len(self._starts) else self.end) - self._starts[index]

    def read(self, file: BinaryIO, index: int, *, at_most: int | None = None) -> bytes:
        """A record's bytes, the first ``at_most`` of them. The file's own position stays."""
        size = self.size(index)
        return os.pread(file.fileno(), size if at_most is None else min(size, at_most), self._starts[index])


def begin_of(file: BinaryIO) -> int:
    """The first byte of a text's first line: what follows a byte order mark."""
    return len(_BYTE_ORDER_MARK) if os.pread(file.fileno(), 3, 0) == _BYTE_ORDER_MARK else 0


def lines_of(file: BinaryIO) -> Places:
    """Each line that isn't empty. Reads the file once, through a buffer: a mapped file would count as the process's memory."""
    places, fd = Places(), file.fileno()
    places.end = size = os.fstat(fd).st_size
    start, line = begin_of(file), 1  # of the line that is open
    at = start
    while chunk := os.pread(fd, _SCAN_BYTES, at):
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + at
        at += len(chunk)
        if at >= size and start < size and (len(ends) == 0 or ends[-1] != size - 1):
            ends = np.append(ends, size)  # the last line has no newline
        if len(ends):
            starts = np.concatenate([[start], ends[:-1] + 1])
            is_kept = ends > starts
            for index in np.flatnonzero(is_kept & (ends - starts < _LONGEST_EMPTY_LINE)):
                is_kept[index] = bool(os.pread(fd, int(ends[index] - starts[index]), int(starts[index])).strip())
            places.add_lines(starts[is_kept], line + np.flatnonzero(is_kept))
            start, line = int(ends[-1]) + 1, line + len(ends)
    return places
