"""Files that are mapped into memory, and whose pages are given back: what is read of them counts as the process's memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np


def map_bytes(path: Path) -> mmap.mmap:
    """A file's bytes, to be read. Raises OSError, and ValueError for an empty file."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def give_back(mapped: mmap.mmap) -> None:
    """Take the pages that were read off this process. The next access reads them again, mostly from the kernel's cache."""
    mapped.madvise(mmap.MADV_DONTNEED)


def give_back_arrays(*arrays: np.ndarray) -> None:
    """``give_back`` the files behind arrays of ``np.memmap``, and views of these; other arrays stay as they are."""
    for array in arrays:
        owner: object = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, mmap.mmap):
            give_back(owner)
