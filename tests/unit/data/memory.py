"""How far a process's memory grows while something runs, at most: of this process, by the kernel's own count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MIB = 2**20


def _field(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes above what was resident before; what is mapped and touched counts."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: proc(5)
    before = _field("VmRSS")
    run()
    return _field("VmHWM") - before
