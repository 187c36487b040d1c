"""Rows of the base from disk to their place, slice by slice: nobody holds more than their rows and a slice.

Files are read with `pread` into one buffer that is used again and again, not mapped: mapped pages would count
as this process's memory, and a read that fails would kill it (SIGBUS) instead of raising.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_lora.base.index import ITEM_BYTES, TensorOnDisk, WeightIndex, open_weights, unreadable
from dist_lora.errors import WeightsError

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
SLICE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Slot:
    """Rows `first_row` to `first_row + num_rows` of tensor `name`, and where they go.

    `shape` is the whole tensor's; `destination` is `(num_rows, *shape[1:])`, contiguous, of any float type
    and device. Of a 1-D tensor each element is a row. A slot may have no rows.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int
    num_rows: int
    destination: Tensor


@dataclass(frozen=True)
class FillReport:
    """What `fill_slots` did: bytes read from disk, tensors of which some rows were read, seconds."""

    bytes_read: int
    tensors: int
    seconds: float


class SliceReader:
    """Reads rows of tensors on disk through one buffer, so that a slice is valid until the next one is read.

    The buffer holds `max_slice_bytes`, or one row where that is more.
    """

    def __init__(self, max_slice_bytes: int = SLICE_BYTES) -> None:
        self._max_slice_bytes = max_slice_bytes
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def slices(
        self, tensor: TensorOnDisk, *, descriptor: int, first_row: int = 0, num_rows: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first row of the slice, its rows in the type on disk), from the first row to the last.

        Args:
            descriptor: `tensor.file`, open for reading.
            num_rows: all that follow `first_row` if not given.

        Raises:
            WeightsError: the file ends before the rows do.
        """
        end_row = tensor.shape[0] if num_rows is None else first_row + num_rows
        row_bytes = math.prod(tensor.shape[1:]) * ITEM_BYTES[tensor.dtype]
        if row_bytes == 0:
            return
        slice_rows = max(1, self._max_slice_bytes // row_bytes)
        for row in range(first_row, end_row, slice_rows):
            count = min(slice_rows, end_row - row)
            content = self._read(tensor, descriptor, start=tensor.start + row * row_bytes, count=count * row_bytes)
            yield row, content.view(TORCH_DTYPES[tensor.dtype]).view(count, *tensor.shape[1:])

    def _read(self, tensor: TensorOnDisk, descriptor: int, *, start: int, count: int) -> Tensor:
        if self._buffer.numel() < count:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # frees the smaller one first
            self._buffer = torch.empty(max(count, min(self._max_slice_bytes, tensor.num_bytes)), dtype=torch.uint8)
        content = self._buffer[:count]
        view = content.numpy().data
        done = 0
        while done < count:  # one call reads at most 2 GiB on Linux, and may read less
            try:
                got = os.preadv(descriptor, [view[done:]], start + done)
            except OSError as error:
                raise unreadable(tensor.file, error, tensor_name=tensor.name) from error
            if got == 0:
                raise WeightsError(
                    f"{tensor.file} ends at byte {start + done:,}, within {tensor.name}, which goes on to "
                    f"byte {tensor.start + tensor.num_bytes:,}: the file has become shorter. Fetch it again."
                )
            done += got
        return content


def read_tensor(tensor: TensorOnDisk, *, dtype: torch.dtype | None = None) -> Tensor:
    """One whole tensor in host memory, as on disk or cast to `dtype`.

    Raises:
        WeightsError: the file cannot be read or ends too early.
    """
    whole = torch.empty(tensor.shape, dtype=dtype or TORCH_DTYPES[tensor.dtype])
    with open_weights(tensor.file) as descriptor:
        for row, rows in SliceReader().slices(tensor, descriptor=descriptor):
            whole[row : row + len(rows)].copy_(rows)
    return whole


def fill_slots(
    slots: Sequence[Slot],
    *,
    index: WeightIndex,
    max_slice_bytes: int = SLICE_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> FillReport:
    """Fills every slot from disk and returns only when each row of each slot was written exactly once.

    Local: no communication; each rank calls it with its own slots. Reads exactly the bytes of the rows asked
    for, each file forward and once. Peak host memory: the destinations that lie there and one slice.

    Args:
        max_slice_bytes: size of one read; a single row longer than this is read whole.
        on_progress: called after each slice with (bytes done, bytes in all).

    Raises:
        WeightsError: a tensor is missing or has another shape, or a file is cut off or cannot be read.
    """
    begin = time.perf_counter()
    _check_slots(slots, index=index)
    wanted = sorted((slot for slot in slots if slot.num_rows), key=lambda slot: _place(slot, index))
    bytes_total = sum(slot.num_rows * _row_bytes(slot, index) for slot in wanted)
    reader = SliceReader(max_slice_bytes)
    bytes_read = 0
    rows_filled = [0] * len(wanted)
    for file, numbers in _group_by_file(wanted, index):
        with open_weights(file) as descriptor, torch.no_grad():
            for number in numbers:
                slot = wanted[number]
                for row, rows in reader.slices(
                    index.tensors[slot.name],
                    descriptor=descriptor,
                    first_row=slot.first_row,
                    num_rows=slot.num_rows,
                ):
                    slot.destination[row - slot.first_row :][: len(rows)].copy_(rows)
                    rows_filled[number] += len(rows)
                    bytes_read += rows.nbytes
                    if on_progress:
                        on_progress(bytes_read, bytes_total)
    for slot, filled in zip(wanted, rows_filled, strict=True):
        assert filled == slot.num_rows, f"{slot.name}: {filled} of {slot.num_rows} rows filled"
    assert bytes_read == bytes_total, f"{bytes_read} bytes read of {bytes_total}"
    return FillReport(bytes_read, len({slot.name for slot in wanted}), time.perf_counter() - begin)


def _check_slots(slots: Sequence[Slot], *, index: WeightIndex) -> None:
    found = {slot.name: getattr(index.tensors.get(slot.name), "shape", "nothing") for slot in slots}
    faults = [
        f"{slot.name}: {found[slot.name]} on disk, {slot.shape} expected"
        for slot in slots
        if found[slot.name] != slot.shape
    ]
    if faults:
        raise WeightsError(
            f"{len(faults):,} tensors of {index.folder} are not what the model needs. Take weights and "
            "config.json of one and the same model.\n  " + "\n  ".join(faults[:5])
        )
    ends: dict[str, int] = {}
    for slot in sorted(slots, key=lambda slot: (slot.name, slot.first_row, slot.num_rows)):
        last = slot.first_row + slot.num_rows
        assert 0 <= slot.first_row <= last <= slot.shape[0], (
            f"{slot.name}: rows {slot.first_row} to {last} of {slot.shape}"
        )
        expected = (slot.num_rows, *slot.shape[1:])
        assert slot.destination.shape == expected, (
            f"{slot.name}: destination {tuple(slot.destination.shape)}, not {expected}"
        )
        assert slot.destination.is_contiguous(), f"{slot.name}: its destination is not contiguous"
        assert not slot.num_rows or slot.first_row >= ends.get(slot.name, 0), (
            f"{slot.name}: row {slot.first_row} is in two slots"
        )
        ends[slot.name] = max(last, ends.get(slot.name, 0))
    homes = [(slot.destination.device, slot.destination.data_ptr()) for slot in slots if slot.destination.numel()]
    assert len(set(homes)) == len(homes), "two slots have the same destination"


def _place(slot: Slot, index: WeightIndex) -> tuple[Path, int, int]:
    tensor = index.tensors[slot.name]
    return tensor.file, tensor.start, slot.first_row


def _row_bytes(slot: Slot, index: WeightIndex) -> int:
    return math.prod(slot.shape[1:]) * ITEM_BYTES[index.tensors[slot.name].dtype]


def _group_by_file(slots: Sequence[Slot], index: WeightIndex) -> Iterator[tuple[Path, list[int]]]:
    groups: dict[Path, list[int]] = {}
    for number, slot in enumerate(slots):
        groups.setdefault(index.tensors[slot.name].file, []).append(number)
    yield from groups.items()
