"""Streams rows of the base from disk to their destination: no rank holds more than its own rows and a slice.

Files are read with ``pread`` into one buffer that is used again and again, not mapped: mapped pages would count
as this process's memory, and a read that fails would kill it (SIGBUS) instead of raising.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from dist_lora.base.index import ITEM_BYTES, TensorOnDisk, WeightIndex, by_file, open_weights, unreadable
from dist_lora.base.norms import Squares, squares_of
from dist_lora.base.quant.finite import NotFiniteError
from dist_lora.base.quant.formats import Format
from dist_lora.errors import WeightsError
from dist_lora.text import count

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
SLICE_BYTES = 64 * 2**20
WEIGHT = "weight"  # the only part of a tensor that isn't quantized


@dataclass(frozen=True)
class Slot:
    """Elements of one part of tensor ``name``, from element ``first`` of the flattened part on, and their destination.

    ``part`` is ``weight``, or codes or scales of a quantized linear; ``shape`` is the whole part's; ``destination`` is
    1-D, contiguous, on any device. It may be empty.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    first: int
    destination: Tensor

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.first + self.destination.numel()

    @property
    def rows(self) -> range:
        """The rows of the whole tensor that these elements are in. Of a 1-D tensor each element is a row."""
        if not self.destination.numel():
            return range(0)
        width = math.prod(self.shape[1:])
        return range(self.first // width, -(-self.stop // width))


class QuantizedOnDisk(Protocol):
    """A weight that is stored on disk as codes and scales in its format."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all of its parts on disk."""
        ...

    def read_rows(self, first_row: int, num_rows: int) -> dict[str, Tensor]:
        """The parts of these rows."""
        ...


@dataclass(frozen=True)
class FillReport:
    """What ``fill_slots`` did: bytes read from disk, tensors of which some rows were read, seconds.

    ``squares``: by the names in ``norms_of``, of the rows that begin in this rank's slots: ranks whose slots share a
    weight have each of its rows once.
    """

    bytes_read: int
    tensors: int
    seconds: float
    squares: Mapping[str, Squares] = field(default_factory=dict)


class SliceReader:
    """Reads rows of tensors on disk through one buffer: a slice is valid until the next one is read.

    The buffer holds ``max_slice_bytes``, or one row where that is more.
    """

    def __init__(self, max_slice_bytes: int = SLICE_BYTES) -> None:
        self._max_slice_bytes = max_slice_bytes
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def slices(
        self, tensor: TensorOnDisk, *, descriptor: int, first_row: int = 0, num_rows: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first row of the slice, its rows in the dtype on disk), from the first row to the last.

        Args:
            descriptor: ``tensor.file``, open for reading.
            num_rows: None is all from ``first_row`` on.

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
                num_read = os.preadv(descriptor, [view[done:]], start + done)
            except OSError as error:
                raise unreadable(tensor.file, error, tensor_name=tensor.name) from error
            if num_read == 0:
                raise WeightsError(
                    f"{tensor.file} ends at byte {start + done:,}, within {tensor.name}, which extends to "
                    f"byte {tensor.start + tensor.num_bytes:,}: the file was truncated. Fetch it again."
                )
            done += num_read
        return content


def read_tensor(tensor: TensorOnDisk, *, dtype: torch.dtype | None = None) -> Tensor:
    """One whole tensor in host memory, as on disk or cast to ``dtype``.

    Raises:
        WeightsError: the file can't be read or ends too early.
    """
    whole = torch.empty(tensor.shape, dtype=dtype or TORCH_DTYPES[tensor.dtype])
    with open_weights(tensor.file) as descriptor:
        for row, rows in SliceReader().slices(tensor, descriptor=descriptor):
            whole[row : row + len(rows)].copy_(rows)
    return whole


def read_rows(tensor: TensorOnDisk, rows: Sequence[int]) -> Tensor:
    """Some rows ``(N, D)`` of a tensor ``(V, D)``, ascending, in host memory, as on disk.

    Reads these rows alone; those that follow one another at once.

    Raises:
        WeightsError: the file can't be read or ends too early.
    """
    chosen = torch.empty((len(rows), *tensor.shape[1:]), dtype=TORCH_DTYPES[tensor.dtype])
    reader, done = SliceReader(), 0
    with open_weights(tensor.file) as descriptor:
        for first, num_rows in _runs(rows):
            for _, some in reader.slices(tensor, descriptor=descriptor, first_row=first, num_rows=num_rows):
                chosen[done : done + len(some)].copy_(some)
                done += len(some)
    return chosen


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def fill_slots(
    slots: Sequence[Slot],
    *,
    index: WeightIndex,
    formats: Mapping[str, Format] = MappingProxyType({}),
    quantized: Mapping[str, QuantizedOnDisk] = MappingProxyType({}),
    device: torch.device | None = None,
    max_slice_bytes: int = SLICE_BYTES,
    norms_of: Collection[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> FillReport:
    """Fills every slot from disk, and checks that each element of each slot was written exactly once.

    Local: no communication; each rank calls it with its own slots. Reads exactly the rows that the slots are in,
    each file forward and once; rows are quantized as they are read. Peak host memory: the destinations in host
    memory, one slice, and what quantizing a slice takes (see the format).

    Args:
        formats: how a tensor is stored, by its name; the others are copied to their slots as they are.
        quantized: tensors that are already in their format on disk, by name.
        device: where rows are quantized; None is the CPU. A GPU holds one slice and its parts for this.
        max_slice_bytes: size of one read; a single row longer than this is read whole.
        norms_of: weights whose squares are summed as they are read, before a format rounds them.
        on_progress: called after each slice with (bytes done, total bytes).

    Raises:
        WeightsError: a tensor is missing or has another shape, holds a value that can't be quantized, or a file is
            truncated or can't be read.
    """
    begin = time.perf_counter()
    _check_slots(slots, index=index, formats=formats)
    wanted: dict[str, list[Slot]] = {}
    for slot in slots:
        if slot.destination.numel():
            wanted.setdefault(slot.name, []).append(slot)
    rows_of = {name: _rows(of_one) for name, of_one in wanted.items()}
    rows_bytes = {name: _row_bytes(index.tensors[name], quantized.get(name)) for name in wanted}
    bytes_total = sum(len(rows) * rows_bytes[name] for name, rows in rows_of.items())
    reader = SliceReader(max_slice_bytes)
    sums = {name: _RowSums(slots, name=name, fmt=formats.get(name), device=device) for name in norms_of}
    bytes_read = 0
    filled: Counter[tuple[str, str]] = Counter()
    for file, tensors in by_file(index.tensors[name] for name in wanted):
        with open_weights(file) as descriptor, torch.no_grad():
            for tensor in tensors:
                rows = rows_of[tensor.name]
                if tensor.name in quantized:
                    slices = _quantized_slices(
                        quantized[tensor.name],
                        rows,
                        max_rows=max_slice_bytes // rows_bytes[tensor.name],
                        sums=sums.get(tensor.name),
                    )
                else:
                    slices = _read_slices(
                        reader.slices(tensor, descriptor=descriptor, first_row=rows.start, num_rows=len(rows)),
                        tensor=tensor,
                        fmt=formats.get(tensor.name),
                        device=device,
                        sums=sums.get(tensor.name),
                    )
                for row, num_rows, parts in slices:
                    for slot in wanted[tensor.name]:
                        filled[slot.name, slot.part] += _copy_overlap(slot, parts[slot.part], row)
                    bytes_read += num_rows * rows_bytes[tensor.name]
                    if on_progress:
                        on_progress(bytes_read, bytes_total)
    for slot in slots:
        count, expected = filled[slot.name, slot.part], slot.destination.numel()
        assert count == expected, f"{slot.name}/{slot.part}: {count} of {expected} elements filled"
    assert bytes_read == bytes_total, f"{bytes_read} bytes read of {bytes_total}"
    squares = {name: of_one.squares for name, of_one in sums.items()}
    return FillReport(bytes_read, len(wanted), time.perf_counter() - begin, squares)


class _RowSums:
    """Sums the squares of the rows of one weight that begin in this rank's slots."""

    def __init__(self, slots: Sequence[Slot], *, name: str, fmt: Format | None, device: torch.device | None) -> None:
        self.squares = Squares()
        self._fmt, self._device = fmt, device
        part = WEIGHT if fmt is None else fmt.parts(1, 1)[0].name
        slot = next((slot for slot in slots if (slot.name, slot.part) == (name, part)), None)
        width = 1 if slot is None else math.prod(slot.shape[1:])
        self._rows = range(0) if slot is None else range(-(-slot.first // width), -(-slot.stop // width))

    def add(self, first_row: int, rows: Tensor) -> None:
        """Add those of ``rows``, the weight's from ``first_row`` on, that begin in the slots."""
        begin, end = max(self._rows.start, first_row), min(self._rows.stop, first_row + len(rows))
        if begin < end:
            rows = rows[begin - first_row : end - first_row]
            self.squares += squares_of(rows.to(self._device or rows.device))

    def add_parts(self, first_row: int, parts: Mapping[str, Tensor]) -> None:
        """``add`` of rows that are quantized on disk."""
        assert self._fmt is not None, "rows are quantized, and their weight has no format"
        on_device = {name: part.to(self._device or part.device) for name, part in parts.items()}
        self.add(first_row, self._fmt.dequantize(on_device, torch.float32))


Slices = Iterator[tuple[int, int, dict[str, Tensor]]]  # first row, number of rows, their parts


def _read_slices(
    slices: Iterator[tuple[int, Tensor]],
    *,
    tensor: TensorOnDisk,
    fmt: Format | None,
    device: torch.device | None,
    sums: _RowSums | None,
) -> Slices:
    """Slices of a weight that is not quantized on disk, in the parts of ``fmt``."""
    for first_row, rows in slices:
        on_device = rows if fmt is None else rows.to(device or rows.device)
        if sums is not None:
            sums.add(first_row, on_device)
        try:
            yield first_row, len(rows), {WEIGHT: rows} if fmt is None else fmt.quantize_rows(on_device)
        except NotFiniteError as error:
            raise error.within(f"{tensor.file}: {tensor.name}", first_row=first_row) from error


def _quantized_slices(source: QuantizedOnDisk, rows: range, *, max_rows: int, sums: _RowSums | None) -> Slices:
    """Slices of a weight that is quantized on disk."""
    for first in range(rows.start, rows.stop, max(1, max_rows)):
        count = min(max(1, max_rows), rows.stop - first)
        parts = source.read_rows(first, count)
        if sums is not None:
            sums.add_parts(first, parts)
        yield first, count, parts


def _copy_overlap(slot: Slot, part: Tensor, first_row: int) -> int:
    """Copies the elements of some rows of a part that belong to a slot; returns their number."""
    flat = part.reshape(-1)
    offset = first_row * math.prod(slot.shape[1:])
    start, stop = max(slot.first, offset), min(slot.stop, offset + flat.numel())
    if start >= stop:
        return 0
    slot.destination[start - slot.first : stop - slot.first].copy_(flat[start - offset : stop - offset])
    return stop - start


def _rows(slots: Sequence[Slot]) -> range:
    """The rows from the first to the last that some slots of one tensor are in."""
    return range(min(slot.rows.start for slot in slots), max(slot.rows.stop for slot in slots))


def _check_slots(slots: Sequence[Slot], *, index: WeightIndex, formats: Mapping[str, Format]) -> None:
    faults = []
    for slot in slots:
        stored = index.tensors.get(slot.name)
        stored_shape = slot.shape if stored is None else _part_shape(slot, stored, formats.get(slot.name))
        if stored is None or stored_shape != slot.shape:
            actual = "nothing" if stored is None else stored.shape
            faults.append(f"{slot.name}: {actual} on disk, {slot.shape} of its {slot.part} expected")
    if faults:
        raise WeightsError(
            f"{count(len(faults), 'tensor')} of {index.folder} {'is' if len(faults) == 1 else 'are'} not what the model needs. Use weights and "
            "config.json of the same model.\n  " + "\n  ".join(faults[:5])
        )
    names = [(slot.name, slot.part) for slot in slots]
    assert len(set(names)) == len(names), "a part of a tensor has two slots"
    for slot in slots:
        assert 0 <= slot.first <= slot.stop <= math.prod(slot.shape), f"{slot.name}: {slot.first} to {slot.stop}"
        assert slot.destination.dim() == 1 and slot.destination.is_contiguous(), f"{slot.name}: destination not flat"
    addresses = [(slot.destination.device, slot.destination.data_ptr()) for slot in slots if slot.destination.numel()]
    assert len(set(addresses)) == len(addresses), "two slots have the same destination"


def _part_shape(slot: Slot, stored: TensorOnDisk, fmt: Format | None) -> tuple[int, ...]:
    """The whole shape of a slot's part of a tensor on disk."""
    if fmt is None:
        return stored.shape
    if len(stored.shape) != 2:
        return ()
    return next((part.shape for part in fmt.parts(*stored.shape) if part.name == slot.part), ())


def _row_bytes(tensor: TensorOnDisk, quantized: QuantizedOnDisk | None) -> int:
    if quantized is not None:
        return quantized.num_bytes // tensor.shape[0]
    return math.prod(tensor.shape[1:]) * ITEM_BYTES[tensor.dtype]
