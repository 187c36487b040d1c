"""A process's memory doesn't grow with the bytes of a set: neither of its sources nor of its tokens."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dist_lora.data.duplicates import duplicates_within
from dist_lora.data.loader import Loader
from dist_lora.data.mapped import give_back_arrays
from dist_lora.data.model_limits import check_limits
from dist_lora.data.sources import hash_sources, read_records
from dist_lora.data.token_set import TokenSet, split_eval
from dist_lora.data.untrained import tokens_in_use
from dist_lora.world.world import World
from tests.unit.data.memory import MIB, peak_growth

NUM_RECORDS, RECORD_BYTES = 1024, 2**17
SET_BYTES = NUM_RECORDS * RECORD_BYTES  # 128 MiB
# What is in memory at once: a piece of 16 MiB as bytes, as text and as Arrow's batch, and pyarrow's and malloc's own pools.
BOUND = 60 * MIB


def write(path: Path) -> None:
    """A set whose records are long and quickly read."""
    record = {"text": "a", "beside": "x" * RECORD_BYTES}
    line = json.dumps(record)
    if path.suffix in (".parquet", ".arrow"):
        table = pyarrow.Table.from_pylist([record] * 64)
        table = table.set_column(1, "beside", table.column(1).cast(pyarrow.large_string()))
        make = pyarrow.ipc.new_file if path.suffix == ".arrow" else partial(pyarrow.parquet.ParquetWriter, use_dictionary=False, compression="none")  # fmt: skip
        with make(path, table.schema) as writer:
            for _ in range(NUM_RECORDS // 64):
                writer.write_table(table)
        return
    with path.open("w") as file:
        file.write({".json": "[", ".csv": "text,beside\n"}.get(path.suffix, ""))
        for number in range(NUM_RECORDS):
            comma = "," if path.suffix == ".json" and number else ""
            file.write(f"a,{record['beside']}\n" if path.suffix == ".csv" else f"{comma}{line}\n")
        file.write("]" if path.suffix == ".json" else "")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_sources_are_read_in_pieces(suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    write(path)

    def read_all():
        hash_sources(str(path), which="train")
        records = read_records(str(path), fmt=None, which="train")
        assert records.padding() == [] and len(records) == NUM_RECORDS
        assert all(len(records[index]["beside"]) == RECORD_BYTES for index in range(NUM_RECORDS))

    assert peak_growth(read_all) < BOUND < SET_BYTES / 2
    path.unlink()


def mapped_set(folder: Path, num_documents: int, length: int) -> TokenSet:
    """Documents of zeros in files without bytes, mapped as the cache is."""
    arrays = {}
    for name, dtype, size in (("ids", np.uint32, num_documents * length), ("is_target", np.bool_, num_documents * length)):  # fmt: skip
        with (folder / name).open("wb") as file:
            file.truncate(size * np.dtype(dtype).itemsize)
        arrays[name] = np.asarray(np.memmap(folder / name, dtype, "r"))
    lengths = np.full(num_documents, length)
    return TokenSet(
        **arrays, starts=np.cumsum(lengths) - lengths, lengths=lengths, num_targets=lengths, sample_ids=lengths
    )


def train_on(tokens: TokenSet) -> None:
    """Every batch of an epoch."""
    loader = Loader(
        tokens,
        sequence_length=1024,
        packing=False,
        global_batch=256,
        micro_batch=64,
        seed=0,
        world_rank=0,
        world_size=1,
    )
    for step in range(loader.steps_in_epoch(0)):
        loader.batch(step)


@pytest.mark.parametrize(
    "read",
    [
        lambda tokens: check_limits(tokens, which="train", context=10**9, vocab=9, world=World.alone()),
        lambda tokens: tokens_in_use(tokens, ids=[1], vocab=9),
        lambda tokens: tokens.fingerprint(),
        lambda tokens: split_eval(tokens, fraction=0.1, seed=0),
        duplicates_within,
        lambda tokens: train_on(tokens),
    ],
    ids=["limits", "special tokens", "fingerprint", "split", "duplicates", "training"],
)
def test_tokens_are_read_in_pieces(read, tmp_path):
    tokens = mapped_set(tmp_path, num_documents=65536, length=1024)
    # A piece is 16 million tokens: 64 MiB of ids.
    assert peak_growth(lambda: read(tokens)) < 120 * MIB < len(tokens.ids) * 5 / 2


def test_what_is_given_back_is_read_again_and_other_arrays_stay(tmp_path):
    np.arange(2**22, dtype=np.uint32).tofile(tmp_path / "ids")
    mapped = np.asarray(np.memmap(tmp_path / "ids", np.uint32, "r"))
    plain = np.arange(5)
    resident = peak_growth(lambda: mapped.sum())
    assert resident >= 16 * MIB
    give_back_arrays(mapped[3:], plain, plain[1:])
    # Mapped pages are counted once: only what was given back grows the memory again.
    assert peak_growth(lambda: mapped.sum()) >= 15 * MIB
    assert mapped[-1] == 2**22 - 1 and plain.sum() == 10
