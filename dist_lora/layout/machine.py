"""Whether a machine is the one that a config names. No torch, and no table: a name says its kind and its memory."""

from __future__ import annotations

import re

from dist_lora.text import GIB

OFF = 0.12  # of the memory in a name: drivers keep some, and makers round


def is_called(gpu: str, device_name: str, num_bytes: int) -> bool:
    """Whether a device, as its driver names it, is what a config calls ``h100-80gb`` or ``rtx4090-24gb``."""
    kind, _, size = gpu.lower().rpartition("-")
    memory = re.fullmatch(r"(\d+)gb", size)
    is_as_large = memory is not None and abs(num_bytes / GIB / int(memory[1]) - 1) <= OFF
    return bool(kind) and kind in re.sub(r"[^a-z0-9]", "", device_name.lower()) and is_as_large
