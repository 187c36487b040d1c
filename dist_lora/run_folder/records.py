"""The files that record a run's steps and evaluations, one line of JSON each; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_lora.errors import SaveError
from dist_lora.files import sync, write_whole

METRICS_FILE = "metrics.jsonl"  # one line per step
EVALUATIONS_FILE = "evaluations.jsonl"  # one line per evaluation


def truncate_metrics(folder: Path, *, last_step: int, last_evaluation: int) -> None:
    """Drop the lines of later steps and evaluations: they were lost with their process and will be repeated.

    Raises:
        SaveError: a file can't be written.
    """
    for name, last in ((METRICS_FILE, last_step), (EVALUATIONS_FILE, last_evaluation)):
        path = folder / name
        if not path.exists():
            continue
        kept = "".join(json.dumps(line, allow_nan=True) + "\n" for line in read_lines(path) if line["step"] <= last)
        try:
            write_whole(path, kept)
        except OSError as error:
            raise SaveError(
                f"{path}: can't be written: {error.strerror or error}. Free disk space, or set runs_dir elsewhere."
            ) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file, in order; a line that was cut short, or isn't one of a step, is skipped."""
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            is_whole = isinstance(line["step"], int) and 0 <= line["step"] < 2**63
        except (ValueError, KeyError, TypeError):
            continue
        if is_whole:
            yield line


def sync_metrics(folder: Path) -> None:
    """Fsync the lines of steps and evaluations.

    Raises:
        SaveError: a file can't be synced.
    """
    for name in (METRICS_FILE, EVALUATIONS_FILE):
        path = folder / name
        try:
            sync(path)
        except FileNotFoundError:
            continue  # before the first step, or the first evaluation
        except OSError as error:
            raise SaveError(f"{path}: can't be written to the disk: {error.strerror or error}.") from error
