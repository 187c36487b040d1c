"""Rows of parquet and Arrow files, a batch at a time: those that were written, in any order, and damage is told where it is."""

from __future__ import annotations

import random

import pyarrow
import pyarrow.parquet
import pytest

from dist_lora.data import batches
from dist_lora.data.batches import ParquetBatches
from dist_lora.data.sources import read_records
from dist_lora.errors import DataError

ROWS = [{"text": f"row {i}"} for i in range(60)]


def write(path, kind, compression=None):
    table = pyarrow.Table.from_pylist(ROWS)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=25)
        return
    make = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with make(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table.slice(0, 0))
        writer.write_table(table, max_chunksize=7)


@pytest.mark.parametrize(
    ("kind", "compression"), [("parquet", None), ("file", None), ("file", "zstd"), ("stream", None), ("stream", "lz4")]
)
def test_rows_are_those_that_were_written_in_any_order(kind, compression, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "_MAX_BATCH_ROWS", 4)
    monkeypatch.setattr(batches, "_ROWS_UNTIL_GIVEN_BACK", 3)
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    write(path, kind, compression)
    records = read_records(str(path), fmt=None, which="train")
    draw = random.Random(0)
    for order in (range(60), range(30, 60), reversed(range(60)), draw.choices(range(60), k=100)):
        for index in order:
            assert records[index] == ROWS[index]


@pytest.fixture
def opened(monkeypatch):
    """The row groups that are read, each as often as it is."""
    numbers = []

    def counting(self, part, read=ParquetBatches.batches):
        numbers.append(part)
        return read(self, part)

    monkeypatch.setattr(ParquetBatches, "batches", counting)
    return numbers


def test_rows_in_order_are_decoded_once(tmp_path, opened):
    write(tmp_path / "a.parquet", "parquet")
    records = read_records(str(tmp_path / "a.parquet"), fmt=None, which="train")
    assert [records[index] for index in range(60)] == ROWS
    assert opened == [0, 1, 2]


def test_a_damaged_row_group_is_told_for_its_rows_and_the_others_are_read(tmp_path, opened):
    path = tmp_path / "a.parquet"
    write(path, "parquet")
    place = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    begin = place.dictionary_page_offset or place.data_page_offset
    content[begin : begin + place.total_compressed_size] = b"\xff" * place.total_compressed_size
    path.write_bytes(content)
    records = read_records(str(path), fmt=None, which="train")
    read = []
    for index in range(60):
        try:
            read.append(records[index]["text"])
        except DataError as error:
            assert "the file is damaged in row group 2 of 3: " in str(error)
            read.append(None)
    assert read == [None if 25 <= index < 50 else row["text"] for index, row in enumerate(ROWS)]
    assert opened == [0, 1, 2]
