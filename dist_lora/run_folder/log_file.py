"""The log of a run: what its attempts have said, with the time, one after the other. Needs no torch.

The first rank writes what it also writes to stderr; whichever rank reports an error adds that. No run ends because of its
log: what can't be written is left out, which is said once.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LOG_FILE = "log.txt"
_CLOCK = "%Y-%m-%d %H:%M:%S"

_logger = logging.getLogger("dist_lora")


class _LogFile(logging.FileHandler):
    """The handler of a run's log."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mode="a", encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", _CLOCK))
        self._has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that the log lacks something; logging would print a stack for each line."""
        if not self._has_failed:
            self._has_failed = True
            print(f"warning: {self.baseFilename} can't be written: {sys.exc_info()[1]}", file=sys.stderr, flush=True)


def open_log(folder: Path) -> None:
    """Write whatever this process logs from here on to the run's log too. The first rank calls it.

    Raises:
        OSError: it can't be opened.
    """
    close_log()
    _logger.addHandler(_LogFile(folder / LOG_FILE))
    command = shlex.join(["dist-lora", *sys.argv[1:]])
    to_log_file(f"=== dist-lora {software_version()}: {command} (process {os.getpid()} on {socket.gethostname()})")


def close_log() -> None:
    """Write nothing more to a run's log, if this process has one."""
    for former in [handler for handler in _logger.handlers if isinstance(handler, _LogFile)]:
        _logger.removeHandler(former)
        former.close()


def to_log_file(text: str) -> None:
    """Write a line to this process's log alone: the terminal has it already, or has a bar instead."""
    for handler in _logger.handlers:
        if isinstance(handler, _LogFile):
            handler.handle(_logger.makeRecord(_logger.name, logging.INFO, "", 0, text, (), None))


def append_to_log(folder: Path, text: str) -> None:
    """Add what any rank has to say to the log of a run; nothing if the run has none yet, or it can't be written."""
    path = folder / LOG_FILE
    try:
        if path.is_file():
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime(_CLOCK)} {text}\n")
    except OSError:
        return


def software_version() -> str:
    """The version of this program; ``unknown`` where it runs from a folder and isn't installed."""
    try:
        return version("dist_lora")
    except PackageNotFoundError:
        return "unknown"
