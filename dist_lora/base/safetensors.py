"""Writing safetensors files: the adapter's, the checkpoint's and the merged model's.

Not written by the library, for three reasons: the checksum is of the bytes in memory and not of those read back; a file
of any size is written a slice at a time; and the same content gives the same bytes (the library, 0.8, writes the
entries of the metadata in an order that changes from one process to the next). Format: 8 bytes of the header's length
(little-endian), the header in JSON padded to 8 bytes, the tensors' bytes without a gap
(github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from dist_lora.base.index import ITEM_BYTES
from dist_lora.files import new_file

TYPE_NAMES: Mapping[torch.dtype, str] = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: ``dtype`` as the format names it (``F32``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def header_of(entries: Sequence[Entry], *, metadata: Mapping[str, str]) -> bytes:
    """Everything before the tensors' bytes, which follow in the order of ``entries``."""
    content: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        content[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def new_safetensors(
    path: Path, entries: Sequence[Entry], *, metadata: Mapping[str, str]
) -> Iterator[Callable[[memoryview], None]]:
    """A function that takes the bytes of all ``entries`` in their order, in pieces of any size; fsynced at the end.

    Raises:
        OSError: the file exists, or the system refuses.
    """
    remaining = sum(entry.num_bytes for entry in entries)
    with new_file(path) as append:
        append(header_of(entries, metadata=metadata))

        def write(data: memoryview) -> None:
            nonlocal remaining
            remaining -= data.nbytes
            append(data)

        yield write
        assert remaining == 0, f"{path}: {remaining:,} bytes of its tensors were not written"


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[int, str]:
    """Write CPU tensors of fp32 or bf16 in their order, fsynced; returns the file's bytes and its checksum.

    Args:
        on_progress: called after each tensor.

    Raises:
        OSError: the file exists, or the system refuses.
    """
    entries = [Entry(name, TYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    header = header_of(entries, metadata=metadata)
    digest = xxhash.xxh3_128(header)
    with new_safetensors(path, entries, metadata=metadata) as write:
        for tensor in tensors.values():
            data = bytes_of(tensor)
            digest.update(data)
            write(data)
            on_progress()
    return len(header) + sum(entry.num_bytes for entry in entries), f"xxh3_128:{digest.hexdigest()}"


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
