"""The commands as a user types them: in a process of their own, or in this one where many are tried."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_lora import cli

ROOT = Path(__file__).parents[2]
Call = Callable[..., tuple[int, str, str]]


def command(*arguments: object) -> list[str]:
    """What starts ``dist-lora ARGUMENTS`` with this test's Python."""
    return [sys.executable, "-m", "dist_lora", *map(str, arguments)]


def run(*arguments: object, timeout_s: float = 120, **how: Any) -> subprocess.CompletedProcess[str]:
    """``dist-lora ARGUMENTS`` to its end; ``how`` is for ``subprocess.run`` (input, env)."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False, **how
    )


def caller(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """A function that runs ``dist-lora ARGUMENTS`` in this process, as one rank: (exit code, stdout, stderr)."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        logging.getLogger("dist_lora").handlers.clear()  # the former call's writes to a stream that is closed
        monkeypatch.setattr(sys, "argv", ["dist-lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return call
