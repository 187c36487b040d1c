"""How PyTorch's allocator keeps pinned host memory; needs no torch, since it reads its settings when it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

NEEDED = (2, 13)  # of torch: the first whose settings were tried
PINNED_MIB = 1  # larger pinned blocks are as large as what they hold
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ROUNDING, CACHING = "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb"


def allocator_settings(environment: Mapping[str, str], *, installed: str | None = None) -> dict[str, str]:
    """The variables that keep an offloaded base from taking up to twice its size in pinned memory.

    PyTorch rounds each pinned block up to a power of two: 11 % more for 70B and 19 % for 405B. Set them before
    torch is imported. What the user has set is kept, and a setting of these two is the user's to make.

    Args:
        installed: version of torch; None queries it. Nothing is set for one older than ``NEEDED``.
    """
    try:
        numbers = (installed or version("torch")).split("+")[0].split(".")
    except PackageNotFoundError:
        return {}
    if tuple(int(number) for number in numbers[:2] if number.isdecimal()) < NEEDED:
        return {}
    name = next((name for name in VARIABLES if environment.get(name)), VARIABLES[0])
    before = environment.get(name, "")
    if ROUNDING in before or CACHING in before:
        return {}
    # Both at once: where larger blocks were cached but not rounded, a smaller one could be given out for a larger (torch 2.13).
    settings = f"{ROUNDING}:{PINNED_MIB},{CACHING}:{PINNED_MIB}"
    return {name: f"{before},{settings}" if before else settings}
