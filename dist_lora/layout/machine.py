"""Whether a GPU is the type that a config names, from the type and the memory in the name. Needs no torch and no table."""

from __future__ import annotations

import re

from dist_lora.text import GIB

TOLERANCE = 0.12  # of the memory in a name: drivers reserve some, and vendors round


def is_called(gpu: str, device_name: str, num_bytes: int) -> bool:
    """Whether a device, under its driver's name, is what a config calls ``h100-80gb`` or ``rtx4090-24gb``."""
    kind, _, size = gpu.lower().rpartition("-")
    memory = re.fullmatch(r"(\d+)gb", size)
    is_as_large = memory is not None and abs(num_bytes / GIB / int(memory[1]) - 1) <= TOLERANCE
    return bool(kind) and kind in re.sub(r"[^a-z0-9]", "", device_name.lower()) and is_as_large
