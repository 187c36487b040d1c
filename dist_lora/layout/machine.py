"""Whether a GPU is the type that a config names, from the type and the memory in the name. Needs no torch and no table."""

from __future__ import annotations

import itertools
import re

from dist_lora.text import GIB

_WORD = re.compile(r"[a-z0-9]+")
TOLERANCE = 0.12  # of the memory in a name: drivers reserve some, and vendors round


def is_called(gpu: str, device_name: str, num_bytes: int) -> bool:
    """Whether a device, under its driver's name, is what a config calls ``h100-80gb`` or ``rtx4090-24gb``."""
    kind, _, size = gpu.lower().rpartition("-")
    memory = re.fullmatch(r"(\d+)gb", size)
    is_as_large = memory is not None and abs(num_bytes / GIB / int(memory[1]) - 1) <= TOLERANCE
    return is_as_large and _is_in(_WORD.findall(kind), _WORD.findall(device_name.lower()))


def _is_in(kind: list[str], words: list[str]) -> bool:
    """Whether successive words of a device's name, written together, are those of the type: rtx4090 is RTX 4090."""
    spelled = "".join(kind)
    return bool(spelled) and any(
        "".join(words[first:last]) == spelled for first, last in itertools.combinations(range(len(words) + 1), 2)
    )
