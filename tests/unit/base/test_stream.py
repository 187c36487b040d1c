"""Each rank reads its rows and no byte more, and holds them and one slice."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_lora.base.index import WeightIndex, open_index
from dist_lora.base.stream import FillReport, SliceReader, Slot, fill_slots, read_tensor
from dist_lora.errors import WeightsError
from tests import ROOT
from tests.unit.base.test_index import NAMES, tiny_tensors, write_raw, write_sharded


def rows_of(num_rows: int, world_size: int, world_rank: int) -> range:
    """Rows of a rank as FSDP2 cuts them: equal chunks, the last ones shorter or empty."""
    chunk = -(-num_rows // world_size)
    return range(min(chunk * world_rank, num_rows), min(chunk * (world_rank + 1), num_rows))


def rows_slot(name: str, shape: tuple[int, ...], first_row: int, home: Tensor) -> Slot:
    """A slot for the rows of ``home``, from ``first_row`` of a tensor that is kept as it is."""
    return Slot(name, "weight", shape, first_row * math.prod(shape[1:]), home.view(-1))


def fill_share(
    index: WeightIndex, *, world_rank: int, world_size: int, dtype: torch.dtype, max_slice_bytes: int = 2**20
) -> tuple[dict[str, Tensor], FillReport]:
    slots, shares = [], {}
    for name, tensor in index.tensors.items():
        rows = rows_of(tensor.shape[0], world_size, world_rank)
        home = torch.full((len(rows), *tensor.shape[1:]), float("nan"), dtype=dtype)
        slots.append(rows_slot(name, tensor.shape, rows.start, home))
        shares[name] = home
    report = fill_slots(slots, index=index, max_slice_bytes=max_slice_bytes)
    return shares, report


@pytest.mark.parametrize("on_disk", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_memory", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_slice_bytes", [1, 40, 2**20])
def test_three_ranks_together_read_the_checkpoint_once_and_get_what_safetensors_reads(
    tmp_path, on_disk, in_memory, max_slice_bytes
):
    tensors = {**tiny_tensors(), "uneven.weight": torch.randn(7, 3), "few.weight": torch.randn(2, 5)}
    tensors = {name: tensor.to(on_disk) for name, tensor in tensors.items()}
    write_sharded(tmp_path, tensors)
    index = open_index(tmp_path)
    shares = [
        fill_share(index, world_rank=r, world_size=3, dtype=in_memory, max_slice_bytes=max_slice_bytes)
        for r in range(3)
    ]
    assert sum(report.bytes_read for _, report in shares) == sum(t.nbytes for t in tensors.values())
    for name, place in index.tensors.items():
        together = torch.cat([share[name] for share, _ in shares])
        assert torch.equal(together, load_file(place.file)[name].to(in_memory)), name
    assert len(shares[2][0]["few.weight"]) == 0
    assert [report.tensors for _, report in shares] == [
        5,
        5,
        2,
    ]  # four rows over three ranks leave the last one none


def test_a_rank_reads_the_bytes_of_its_rows_forward_and_in_slices(tmp_path, monkeypatch):
    write_sharded(tmp_path, {"w": torch.arange(40.0).view(10, 4), "v": torch.arange(6.0)})
    index = open_index(tmp_path)
    real_preadv, calls = os.preadv, []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((offset, sum(len(buffer) for buffer in buffers)))
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    home = torch.empty(5, 4)
    fill_slots([rows_slot("w", (10, 4), 3, home)], index=index, max_slice_bytes=40)
    start = index.tensors["w"].start
    assert calls == [(start + 48, 32), (start + 80, 32), (start + 112, 16)]
    assert torch.equal(home, torch.arange(12.0, 32.0).view(5, 4))


def test_reads_that_return_less_than_asked_are_continued(tmp_path, monkeypatch):
    save_file({"w": torch.arange(40.0).view(10, 4)}, tmp_path / "model.safetensors")
    real_preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real_preadv(fd, [buffers[0][:7]], at))
    home = torch.empty(10, 4)
    fill_slots([rows_slot("w", (10, 4), 0, home)], index=open_index(tmp_path))
    assert torch.equal(home, torch.arange(40.0).view(10, 4))


def test_progress_ends_with_all_bytes(tmp_path):
    save_file({"w": torch.ones(10, 4), "v": torch.ones(3)}, tmp_path / "model.safetensors")
    told: list[tuple[int, int]] = []
    slots = [rows_slot("w", (10, 4), 0, torch.empty(10, 4)), rows_slot("v", (3,), 1, torch.empty(2))]
    report = fill_slots(slots, index=open_index(tmp_path), max_slice_bytes=64, on_progress=lambda *a: told.append(a))
    assert told[-1] == (168, 168) and {total for _, total in told} == {168}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert (report.bytes_read, report.tensors) == (168, 2) and report.seconds >= 0


def test_a_parameter_that_wants_a_gradient_can_be_filled(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    home = torch.nn.Parameter(torch.zeros(2, 2))
    fill_slots([rows_slot("w", (2, 2), 0, home)], index=open_index(tmp_path))
    assert home.sum().item() == 4


def test_rows_of_a_20_gb_file_are_read_without_the_rest(tmp_path):
    entry = {"dtype": "BF16", "shape": [100_000, 100_000], "data_offsets": [0, 20_000_000_000]}
    file = write_raw(tmp_path / "model.safetensors", {"w": entry})
    start = file.stat().st_size
    os.truncate(file, start + 20_000_000_000)
    with file.open("r+b") as opened:
        opened.seek(start + 77_777 * 200_000)
        opened.write(b"\x80\x3f")  # 1.0 in bfloat16, little-endian
    home = torch.full((3, 100_000), 5.0)
    report = fill_slots([rows_slot("w", (100_000, 100_000), 77_776, home)], index=open_index(tmp_path))
    assert report.bytes_read == 600_000
    assert home.sum().item() == 1 and home[1, 0].item() == 1


def test_a_file_that_became_shorter_names_file_and_tensor(tmp_path):
    files = write_sharded(tmp_path, tiny_tensors())
    index = open_index(tmp_path)
    os.truncate(files[1], files[1].stat().st_size - 8)
    with pytest.raises(WeightsError) as raised:
        fill_share(index, world_rank=0, world_size=1, dtype=torch.float32)
    size = files[1].stat().st_size
    assert f"{files[1]} ends at byte {size:,}, within {NAMES[1]}, which extends to byte {size + 8:,}" in str(
        raised.value
    )
    assert "the file was truncated. Fetch it again." in str(raised.value)


def test_a_read_error_of_the_disk_names_file_and_tensor(tmp_path, monkeypatch):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    index = open_index(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(WeightsError, match=r"model\.safetensors can't be read within w: Input/output error"):
        fill_slots([rows_slot("w", (2, 2), 0, torch.empty(2, 2))], index=index)


def test_tensors_that_the_folder_lacks_or_has_in_another_shape_are_named(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    slots = [rows_slot("w", (4, 2), 0, torch.empty(2, 2)), rows_slot("v", (3,), 0, torch.empty(3))]
    with pytest.raises(WeightsError) as raised:
        fill_slots(slots, index=open_index(tmp_path))
    text = str(raised.value)
    assert "2 tensors of" in text and "w: (2, 2) on disk, (4, 2) of its weight expected" in text
    assert "v: nothing on disk, (3,) of its weight expected" in text


def test_slots_and_destinations_are_checked(tmp_path):
    home = torch.empty(4)
    save_file({"w": torch.ones(4, 2), "v": torch.ones(4)}, tmp_path / "model.safetensors")
    for slots, expected in (
        ([Slot("w", "weight", (4, 2), 6, torch.empty(4))], "w: 6 to 10"),
        ([Slot("w", "weight", (4, 2), 0, torch.empty(2, 2))], "destination not flat"),
        ([Slot("w", "weight", (4, 2), 0, torch.empty(8)[::2])], "destination not flat"),
        ([Slot("w", "weight", (4, 2), 0, home), Slot("w", "weight", (4, 2), 4, home)], "a part of a tensor has two"),
        ([Slot("w", "weight", (4, 2), 0, home), Slot("v", "weight", (4,), 0, home)], "two slots have the same"),
    ):
        with pytest.raises(AssertionError, match=expected):
            fill_slots(slots, index=open_index(tmp_path))


@pytest.mark.parametrize("first, count", [(0, 12), (1, 1), (2, 7), (5, 0), (11, 1)])
def test_any_range_of_elements_is_filled_and_only_its_rows_are_read(tmp_path, first, count):
    save_file({"w": torch.arange(12.0).view(4, 3)}, tmp_path / "model.safetensors")
    home = torch.empty(count)
    report = fill_slots([Slot("w", "weight", (4, 3), first, home)], index=open_index(tmp_path), max_slice_bytes=12)
    assert torch.equal(home, torch.arange(12.0)[first : first + count])
    rows = 0 if count == 0 else -(-(first + count) // 3) - first // 3
    assert report.bytes_read == rows * 12


def test_a_tensor_is_read_whole_and_cast(tmp_path):
    save_file({"w": torch.randn(5, 3).bfloat16()}, tmp_path / "model.safetensors")
    place = open_index(tmp_path).tensors["w"]
    assert read_tensor(place).dtype == torch.bfloat16
    assert torch.equal(read_tensor(place, dtype=torch.float32), load_file(place.file)["w"].float())


def test_a_tensor_without_elements_has_no_slices(tmp_path):
    save_file({"w": torch.ones(3, 0)}, tmp_path / "model.safetensors")
    place = open_index(tmp_path).tensors["w"]
    assert list(SliceReader().slices(place, descriptor=-1)) == []


MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from dist_lora.base.index import open_index
from dist_lora.base.stream import Slot, fill_slots
def peak():
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) * 1024
index = open_index(Path(sys.argv[1]))
torch.ones(8).bfloat16().float().sum()
before = peak()
slots = []
for tensor in index.tensors.values():
    rows = tensor.shape[0] // 2
    home = torch.empty((rows, *tensor.shape[1:]), dtype=torch.float32)
    slots.append(Slot(tensor.name, "weight", tensor.shape, rows * tensor.shape[1], home.view(-1)))
report = fill_slots(slots, index=index, max_slice_bytes=16 * 2**20)
shard = sum(slot.destination.nbytes for slot in slots)
print(json.dumps({"growth": peak() - before, "shard": shard, "read": report.bytes_read}))
"""


@pytest.mark.slow
def test_peak_memory_is_the_shard_and_one_slice(tmp_path):
    entries, offset = {}, 0
    for number in range(6):  # 600 MB by name, in one file; read as zeros
        entries[f"w{number}"] = {
            "dtype": "F32",
            "shape": [25_000, 1_000],
            "data_offsets": [offset, offset + 10**8],
        }
        offset += 10**8
    file = write_raw(tmp_path / "model.safetensors", entries)
    os.truncate(file, file.stat().st_size + offset)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["read"] == measured["shard"] == 300_000_000
    # The shard is written, so it must show; beyond it 16 MiB of slice and 20 MB for the allocator.
    assert 0.95 * measured["shard"] < measured["growth"] <= measured["shard"] + 16 * 2**20 + 20_000_000
