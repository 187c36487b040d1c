"""Compressed text is read as the plain file is: all streams, and nothing that follows them is passed over."""

from __future__ import annotations

import bz2
import gzip
import lzma

import pytest
import zstandard

from dist_lora.data.sources import hash_sources, read_records
from dist_lora.errors import DataError

PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
LINES = b'{"text": "a"}\n\n{"text": "b"}\n{"text": 3\n'


@pytest.mark.parametrize("suffix", PACK)
def test_lines_of_several_streams_have_their_numbers(suffix, tmp_path):
    path = tmp_path / f"data.jsonl{suffix}"
    path.write_bytes(PACK[suffix](LINES[:20]) + PACK[suffix](LINES[20:]))
    records = read_records(str(path), fmt=None, which="train")
    assert [records[index]["text"] for index in range(2)] == ["a", "b"]
    assert [records.where(index) for index in range(3)] == [f"{path}:{line}" for line in (1, 3, 4)]
    with pytest.raises(DataError, match="not JSON: Expecting ',' delimiter at column 11"):
        records[2]


@pytest.mark.parametrize(("kind", "content"), [(".json", b'[{"text": "a"}]'), (".csv", b"text\na\n")])
def test_lists_and_csv_may_be_compressed(kind, content, tmp_path):
    (tmp_path / f"data{kind}.gz").write_bytes(gzip.compress(content))
    assert read_records(str(tmp_path / f"data{kind}.gz"), fmt=None, which="train")[0] == {"text": "a"}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data[:-1], r"ends within stream 1 of its \.\w+ data: it is cut"),
        (lambda data: data + b"more and more of it", r"what follows stream 1, from byte [\d,]+, is not \.\w+ data"),
        (lambda data: LINES, r"is not \.\w+ data, or damaged: "),
    ],
)
def test_a_compressed_file_that_is_not_whole_is_told(suffix, change, told, tmp_path):
    path = tmp_path / f"data.jsonl{suffix}"
    path.write_bytes(change(PACK[suffix](LINES)))
    with pytest.raises(DataError, match=told):
        read_records(str(path), fmt=None, which="train")


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_zeros_may_fill_a_block_up(suffix, tmp_path):
    (tmp_path / f"data.jsonl{suffix}").write_bytes(PACK[suffix](LINES) + bytes(512))
    assert len(read_records(str(tmp_path / f"data.jsonl{suffix}"), fmt=None, which="train")) == 3


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_under_a_plain_name_is_told_its_name(suffix, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(PACK[suffix](LINES))
    with pytest.raises(DataError, match=rf"begins as a \{suffix} file does.* Name it data\.jsonl\{suffix}"):
        read_records(str(tmp_path / "data.jsonl"), fmt=None, which="train")
    (tmp_path / f"data.jsonl{suffix}").write_bytes(PACK[suffix](PACK[suffix](LINES)))
    with pytest.raises(DataError, match="is compressed twice"):
        read_records(str(tmp_path / f"data.jsonl{suffix}"), fmt=None, which="train")


def test_a_full_disk_is_told_with_its_folder(tmp_path, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(LINES))
    monkeypatch.setattr("dist_lora.data.compressed.tempfile.TemporaryFile", Full)
    with pytest.raises(DataError, match=r"can't be unpacked into .*: No space left on device\. Set TMPDIR"):
        read_records(str(tmp_path / "data.jsonl.gz"), fmt=None, which="train")


def test_the_hash_of_a_compressed_file_says_what_is_inside(tmp_path):
    for name in ("a.jsonl.gz", "a.csv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"text\na\n", mtime=0))
    assert len({hash_sources(str(tmp_path / name), which="train") for name in ("a.jsonl.gz", "a.csv.gz")}) == 2


def test_a_columnar_file_is_not_unpacked(tmp_path):
    (tmp_path / "a.parquet.gz").touch()
    with pytest.raises(DataError, match=r"has suffix '\.parquet\.gz'; "):
        read_records(str(tmp_path / "a.parquet.gz"), fmt=None, which="train")
