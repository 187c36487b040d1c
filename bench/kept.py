"""What benches have measured, kept by name in a file, so that a command that was interrupted goes on with the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lora.files import write_whole


@dataclass(frozen=True)
class Kept:
    """Results by name, as JSON in a file."""

    path: Path

    def read(self) -> dict[str, Any]:
        """Those that are measured; none without a file."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def measure(self, name: str, measured: Callable[[], Any], *, again: bool = False) -> bool:
        """Measure what isn't yet, or once more; whether it was measured now. It is on disk before this returns."""
        if name in self.read() and not again:
            return False
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        result = measured()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.read() | {name: result}, indent=1) + "\n")
        return True
