"""Whether a GPU is the type that a config names, from the type and the memory in the name. Needs no torch and no table."""

from __future__ import annotations

import itertools
import re

from dist_lora.text import GIB

_WORD = re.compile(r"[a-z0-9]+")
_PIECE = re.compile(r"[a-z]+|[0-9]+")
_MEMORY = re.compile(r"(\d+)gb")
TOLERANCE = 0.12  # of the memory in a name: drivers reserve some, and vendors round
# Words of a driver's name that make it another board than the one without them: fewer units, lower clocks, other links.
VARIANTS = frozenset({"pcie", "nvl", "laptop", "mobile", "max", "ti", "super", "d", "mig", "ada", "ws"})


def is_called(gpu: str, device_name: str, num_bytes: int) -> bool:
    """Whether a device, under its driver's name, is what a config calls ``h100-80gb``, ``h100`` or ``rtx4090-24gb``.

    A config may also have the driver's own name; without a memory in it, any memory is right.
    """
    words = _WORD.findall(gpu.lower())
    kind, sizes = _without_memory(words)
    is_as_large = all(abs(num_bytes / GIB / size - 1) <= TOLERANCE for size in sizes)
    return is_as_large and (_WORD.findall(device_name.lower()) == words or names_kind(kind, device_name))


def names_kind(kind: list[str], device_name: str) -> bool:
    """Whether a driver's name has the words of a type, and no other that makes it another board.

    RTX 4090 is written as successive words, and rtx6000-pro in another order: RTX PRO 6000.
    """
    words, _ = _without_memory(_WORD.findall(device_name.lower()))
    pieces = _PIECE.findall(" ".join(kind))
    is_named = _is_in(kind, words) or (len(pieces) > len(kind) > 0 and set(pieces) <= set(words))
    return is_named and not (VARIANTS & set(words)) - set(pieces)


def memory_in(name: str) -> list[int]:
    """The sizes, in GB, that a name has as words: 80 of ``NVIDIA H100 80GB HBM3``."""
    return _without_memory(_WORD.findall(name.lower()))[1]


def _without_memory(words: list[str]) -> tuple[list[str], list[int]]:
    sizes = [int(size[1]) for word in words if (size := _MEMORY.fullmatch(word))]
    return [word for word in words if not _MEMORY.fullmatch(word)], sizes


def _is_in(kind: list[str], words: list[str]) -> bool:
    """Whether successive words of a device's name, written together, are those of the type: rtx4090 is RTX 4090."""
    spelled = "".join(kind)
    return bool(spelled) and any(
        "".join(words[first:last]) == spelled for first, last in itertools.combinations(range(len(words) + 1), 2)
    )
