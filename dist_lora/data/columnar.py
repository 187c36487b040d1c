"""Records of columnar data by their own types: parquet and Arrow files, and what ``datasets`` loads.

A struct has the same keys in every row: a row without one of them has null there. Such padding is removed, at every
depth. A column of JSON (Arrow's type ``arrow.json``, in which ``datasets`` 5 stores objects of differing keys, and by
which it knows them: ``Features.from_arrow_schema``) is decoded, and a null inside it stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_lora.data.batches import ArrowBatches, ParquetBatches, Rows
from dist_lora.data.json_text import first_line, parse_json
from dist_lora.errors import DataError

_Read = Callable[[Any], Any]
_MAY_BE_JSON_TEXTS = ("messages", "conversations", "prompt", "completion", "tools", "functions")
"""Columns of objects, which are often stored as lists of JSON texts; the metadata that says so is easily lost."""
_SCHEMAS = ("tools", "functions")
_ARGUMENTS = ("arguments", "parameters")
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""Arrow's specification, "IPC Streaming Format"; ``pyarrow`` and ``datasets`` write it last."""


class RowReader:
    """Rows of an Arrow table as the records that were written."""

    def __init__(self, schema: Any) -> None:
        self._columns = {field.name: _reader_of(field.type, column=field.name) for field in schema}

    def record(self, table: Any) -> dict[str, Any]:
        """The only row of ``table``.

        Raises:
            DataError: a value isn't JSON where its type says so, or none that Python has.
        """
        import pyarrow

        try:
            row = table.to_pylist()[0]
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # a string not in UTF-8, a year 300,000
            raise DataError(f"the row can't be read: {first_line(str(error))}") from None
        return {name: value if value is None else self._columns[name](value) for name, value in row.items()}


class ColumnarFile:
    """A parquet or an Arrow file."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = ParquetBatches(path) if path.suffix == ".parquet" else _open_arrow(path)
        _check_columns(self._file.schema, self.name)
        self._rows, self._reader = Rows(self._file), RowReader(self._file.schema)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """File and row; such a file has no lines."""
        return f"{self.name}: row {index + 1}"

    def padding(self) -> str:
        """See ``padding_line``."""
        return padding_line(self.name, self._file.schema, self._rows.tables())

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._reader.record(self._rows.row(index))


def padding_line(name: str, schema: Any, tables: Iterable[Any]) -> str:
    """How many nulls inside arguments and schemas are taken for padding, where one might be a value; "" if none are.

    ``tables`` are only read where the schema may be padded there.
    """
    columns = [field.name for field in schema if _may_be_padded(field.type, is_inside=field.name in _SCHEMAS)]
    count = 0
    for table in tables if columns else []:
        for column in columns:
            for chunk in table.column(column).chunks:
                count += _padding_in(chunk, is_inside=column in _SCHEMAS)
    if not count:
        return ""
    return (
        f"{name}: {count:,} nulls inside arguments and tools are read as padding, for keys that other rows have. "
        "If some are values, store arguments and tools as JSON texts"
    )


def _reader_of(kind: Any, *, column: str = "") -> _Read:
    """What makes the value that was written out of the one that ``to_pylist`` gives, never null."""
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return _from_json
    if types.is_struct(kind):
        readers = {field.name: _reader_of(field.type) for field in kind}
        return lambda value: {key: readers[key](part) for key, part in value.items() if part is not None}
    if types.is_map(kind):
        return _map_reader_of(kind)
    if _is_list(kind):
        is_text = types.is_string(kind.value_type) or types.is_large_string(kind.value_type)
        read_part = _from_json_object if is_text and column in _MAY_BE_JSON_TEXTS else _reader_of(kind.value_type)
        return lambda value: [part if part is None else read_part(part) for part in value]
    return _unchanged


def _map_reader_of(kind: Any) -> _Read:
    """Of a map's pairs an object, as JSON has it."""
    read_item = _reader_of(kind.item_type)

    def read(pairs: Any) -> Any:
        keys = [key for key, _ in pairs]
        if not all(isinstance(key, str | int | float) for key in keys):
            return pairs
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"a map has the key {twice!r} twice; one of each is expected")
        return {key: part if part is None else read_item(part) for key, part in pairs}

    return read


def _unchanged(value: Any) -> Any:
    return value


def _from_json(text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"a value of a JSON column is not JSON: {first_line(str(error))}") from None


def _from_json_object(text: str) -> Any:
    return _from_json(text) if text.lstrip()[:1] == "{" else text


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    asked = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(is_kind(kind) for is_kind in asked)


def _may_be_padded(kind: Any, *, is_inside: bool) -> bool:
    """Whether the type has a struct that lies inside arguments or schemas."""
    from pyarrow import types

    if types.is_struct(kind):
        return is_inside or any(_may_be_padded(field.type, is_inside=field.name in _ARGUMENTS) for field in kind)
    if types.is_map(kind):
        return _may_be_padded(kind.item_type, is_inside=is_inside)
    return _is_list(kind) and _may_be_padded(kind.value_type, is_inside=is_inside)


def _padding_in(array: Any, *, is_inside: bool) -> int:
    """The nulls in structs that aren't null themselves, from arguments and schemas on."""
    from pyarrow import ListArray, types

    if types.is_struct(array.type):
        parts = array.flatten()  # null also where the struct is
        own = sum(part.null_count - array.null_count for part in parts) if is_inside else 0
        return own + sum(
            _padding_in(part, is_inside=is_inside or field.name in _ARGUMENTS)
            for field, part in zip(array.type, parts, strict=True)
        )
    if types.is_map(array.type):
        items = ListArray.from_arrays(array.offsets, array.items)  # of a part of an array, these have all of it
        return _padding_in(items.flatten(), is_inside=is_inside)
    return _padding_in(array.flatten(), is_inside=is_inside) if _is_list(array.type) else 0


def _open_arrow(path: Path) -> ArrowBatches:
    file = ArrowBatches(path)
    if file.end is not None:
        check_end(path, end=file.end)
    return file


def check_end(path: Path, *, end: int | None = None) -> None:
    """Raises DataError unless the Arrow stream in a file is whole; a reader takes a missing end mark for the end.

    Args:
        end: where the stream was read to; None for the file's end.
    """
    size = os.stat(path).st_size
    end = size if end is None else end
    with path.open("rb") as file:
        file.seek(max(0, end - len(_END_OF_STREAM)))
        mark = file.read(len(_END_OF_STREAM))
    if mark != _END_OF_STREAM:
        raise DataError(f"{path}: the Arrow stream has no end mark: it is cut, or still being written. Copy it again")
    if end != size:
        raise DataError(f"{path}: {size - end:,} bytes follow the end of the Arrow stream. Remove them")


def _check_columns(schema: Any, name: str) -> None:
    twice = sorted({column for column in schema.names if schema.names.count(column) > 1})
    if twice:
        raise DataError(f"{name}: has {', '.join(map(repr, twice))} more than once; name each column once")


def rows_as_bytes(batches: Iterable[Any]) -> Iterator[bytes]:
    """The rows of tables as bytes, the same on any machine that has the same rows in the same batches."""
    import pyarrow

    for batch in batches:
        sink = pyarrow.BufferOutputStream()
        for plain in batch.replace_schema_metadata(None).combine_chunks().to_batches():
            with pyarrow.ipc.new_stream(sink, plain.schema) as writer:
                writer.write_batch(plain)
        yield sink.getvalue().to_pybytes()


class LoadedRows:
    """A data set that ``datasets`` has loaded, from the hub or from a folder."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self._dataset = dataset.with_format("arrow")
        self._rows = RowReader(self._dataset.data.schema)

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, index: int) -> str:
        """Name and row."""
        return f"{self.name}: row {index + 1}"

    def padding(self) -> str:
        """See ``padding_line``."""
        return padding_line(self.name, self._dataset.data.schema, self._batches())

    @property
    def folder(self) -> Path:
        """The folder that holds it: of ``datasets``' cache, or of ``save_to_disk``."""
        files = self._dataset.cache_files
        return Path(files[0]["filename"]).parent if files else Path(self.name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows.record(self._dataset[index : index + 1])

    def chunks(self) -> Iterator[bytes]:
        """All rows, with their types, as bytes."""
        yield str(self._dataset.data.schema.remove_metadata()).encode()
        yield from rows_as_bytes(self._batches())

    def _batches(self) -> Iterator[Any]:
        yield from self._dataset.iter(batch_size=1000)


def is_saved(folder: Path) -> bool:
    """Whether ``datasets`` has written the folder by ``save_to_disk``."""
    return splits_of(folder) is not None or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def splits_of(folder: Path) -> Sequence[str] | None:
    """The splits of a ``DatasetDict`` that was saved there; None if it is something else.

    Raises:
        DataError: the file that lists them is damaged.
    """
    listing = folder / "dataset_dict.json"
    if not listing.is_file():
        return None
    try:
        splits = parse_json(listing.read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{listing}: not the list of splits that save_to_disk writes: {error}") from None
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise DataError(f'{listing}: {{"splits": ["train", ...]}} is expected')
    return splits


def load_saved(name: str, folder: Path) -> LoadedRows:
    """A folder that ``save_to_disk`` has written, of one data set. Raises DataError if it can't be read."""
    import datasets

    try:
        dataset = datasets.Dataset.load_from_disk(str(folder))
    except Exception as error:  # datasets 5.2 has many for few causes
        raise DataError(
            f"{name}: the saved data set can't be read: {type(error).__name__}: {first_line(str(error))}"
        ) from None
    for file in dataset.cache_files:
        check_end(Path(file["filename"]))
    return LoadedRows(name, dataset)
