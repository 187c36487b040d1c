"""Rows of parquet and Arrow files, a batch in memory at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from dist_lora.data.json_text import first_line
from dist_lora.data.mapped import give_back, map_bytes
from dist_lora.errors import DataError

_BATCH_BYTES = 16 * 2**20
_MAX_BATCH_ROWS = 1000
_BUFFER_BYTES = 2**20
_ROWS_UNTIL_GIVEN_BACK = 200


class BatchFile(Protocol):
    """A file of rows in parts; ``starts`` are the first rows of its parts and, last, the number of rows."""

    schema: Any
    starts: list[int]

    def batches(self, part: int) -> Iterator[Any]:
        """The rows of a part, as tables. Raises DataError where they are damaged."""
        ...

    def rest(self) -> None:
        """Called now and then: what was read can be given back."""
        ...


def _let_through(error: Exception) -> None:
    """Raise an error of the system, which has a number; what pyarrow finds wrong in a file has none."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


class ParquetBatches:
    """A parquet file: its parts are row groups, which may be larger than memory, so they are read in pieces."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path = path
        try:
            # From the file alone: no column is made of the names of its folders ("split=train/").
            self._file = pyarrow.parquet.ParquetFile(
                path, buffer_size=_BUFFER_BYTES, pre_buffer=False, arrow_extensions_enabled=True
            )
            self.schema = self._file.schema_arrow
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            _let_through(error)
            raise DataError(f"{path}: not a complete parquet file: {error}") from None
        groups = (self._file.metadata.row_group(part) for part in range(self._file.num_row_groups))
        self._groups = [(group.num_rows, group.total_byte_size) for group in groups]
        self.starts = list(accumulate((num_rows for num_rows, _ in self._groups), initial=0))

    def batches(self, part: int) -> Iterator[Any]:
        """See ``BatchFile``."""
        import pyarrow

        num_rows, num_bytes = self._groups[part]
        size = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * num_rows // max(1, num_bytes)))
        try:
            for batch in self._file.iter_batches(size, row_groups=[part], use_threads=False):
                yield pyarrow.Table.from_batches([batch])
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            _let_through(error)
            raise DataError(
                f"the file is damaged in row group {part + 1} of {len(self._groups)}: {first_line(str(error))}"
            ) from None

    def rest(self) -> None:
        """See ``BatchFile``: nothing of the file is kept."""


class ArrowBatches:
    """An Arrow file, of either form, mapped into memory: its parts are its record batches."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        try:
            self._mapped = map_bytes(path)
            self._is_stream = self._mapped[:6] != b"ARROW1"
            reader, source = self._open()
            self.schema, num_rows = reader.schema, []
            for batch in self._read(reader, 0):
                num_rows.append(batch.num_rows)
                if len(num_rows) % _ROWS_UNTIL_GIVEN_BACK == 0:
                    self.rest()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            _let_through(error)
            raise DataError(f"{path}: not a complete Arrow file: {first_line(str(error))}") from None
        self.end = source.tell() if self._is_stream else None
        self.starts = list(accumulate(num_rows, initial=0))
        self._next: tuple[int, Iterator[Any]] = (-1, iter(()))
        self.rest()

    def _open(self) -> tuple[Any, Any]:
        import pyarrow

        source = pyarrow.BufferReader(pyarrow.py_buffer(self._mapped))
        return (pyarrow.ipc.open_stream if self._is_stream else pyarrow.ipc.open_file)(source), source

    def _read(self, reader: Any, first: int) -> Iterator[Any]:
        if self._is_stream:
            yield from reader
        else:
            yield from map(reader.get_batch, range(first, reader.num_record_batches))

    def batches(self, part: int) -> Iterator[Any]:
        """See ``BatchFile``. A stream is read from its begin, unless its next part is asked for."""
        import pyarrow

        number, rest = self._next
        if number != part or not self._is_stream:
            rest = self._read(self._open()[0], part)
            for _ in range(part if self._is_stream else 0):
                next(rest)
        self._next = part + 1, rest
        yield pyarrow.Table.from_batches([next(rest)])

    def rest(self) -> None:
        """See ``BatchFile``."""
        give_back(self._mapped)


class Rows:
    """Rows of a file by number. One after another they are read once; for another order a part is read again."""

    def __init__(self, file: BatchFile) -> None:
        self._file = file
        self._first = 0  # row of the batch that is in memory
        self._table: Any = None
        self._coming: Iterator[Any] = iter(())  # batches behind it in its part
        self._num_read = 0
        self._damaged: dict[int, DataError] = {}

    def __len__(self) -> int:
        return self._file.starts[-1]

    def row(self, index: int) -> Any:
        """A table of one row. Raises DataError where its part is damaged, without reading it twice."""
        self._num_read += 1
        if self._num_read % _ROWS_UNTIL_GIVEN_BACK == 0:
            self._file.rest()
        part = bisect_right(self._file.starts, index) - 1
        if part in self._damaged:
            raise self._damaged[part]
        if self._table is None or not self._first <= index < self._first + len(self._table):
            try:
                self._go_to(index, part)
            except DataError as error:
                self._damaged[part], self._table = error, None
                raise
        return self._table.slice(index - self._first, 1)

    def _go_to(self, index: int, part: int) -> None:
        end = 0 if self._table is None else self._first + len(self._table)
        if self._table is None or not self._file.starts[part] < end <= index:
            end, self._coming = self._file.starts[part], self._file.batches(part)
        while True:
            table = next(self._coming)
            if index < end + len(table):
                self._first, self._table = end, table
                return
            end += len(table)

    def tables(self) -> Iterator[Any]:
        """All rows that can be read, as tables; damage is told where a row is read."""
        for part in range(len(self._file.starts) - 1):
            try:
                yield from self._file.batches(part)
            except DataError:
                continue
            self._file.rest()
