"""The files that record a run's steps and evaluations, one line of JSON each; needs no torch."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lora.errors import SaveError
from dist_lora.files import sync, write_whole
from dist_lora.run_folder.attempt import EVALUATIONS_FILE, METRICS_FILE, TOOL_CALLS_FILE, read_attempt
from dist_lora.text import duration

_TAIL_BYTES = 2**14
_MEAN_OF = 20  # steps


def truncate_metrics(folder: Path, *, last_step: int, last_evaluation: int) -> None:
    """Drop the lines of later steps and evaluations: they were lost with their process and will be repeated.

    Raises:
        SaveError: a file can't be written.
    """
    for name, last in (
        (METRICS_FILE, last_step),
        (EVALUATIONS_FILE, last_evaluation),
        (TOOL_CALLS_FILE, last_evaluation),
    ):
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
    yield from _lines_of(path.read_text(encoding="utf-8", errors="replace"))


def _lines_of(content: str) -> Iterator[dict[str, Any]]:
    for text in content.split("\n"):  # nothing else ends a line: a text may have U+2028
        try:
            line = json.loads(text)
            is_whole = isinstance(line["step"], int) and 0 <= line["step"] < 2**63
        except (ValueError, KeyError, TypeError):
            continue
        if is_whole:
            yield line


def number_of(line: Mapping[str, Any], key: str) -> float | None:
    """A number of a line, which may be NaN; None if it has none, or one that no float can hold."""
    value = line.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and not abs(value) >= 2**1000 else None  # type: ignore[arg-type]


def read_last_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines at a file's end, the last one first; at least one of those there are. Empty if it can't be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return [*_lines_of(file.read().decode(errors="replace"))][::-1]
    except OSError:
        return []


@dataclass(frozen=True)
class LiveProgress:
    """Where a run is: its last step, that step's loss, and the time that the remaining steps will take."""

    step: int
    num_steps: int
    loss: float
    left_s: float

    def text(self) -> str:
        """``step 57/300, loss 1.2345, about 12 min 5 s left``."""
        return f"step {self.step:,}/{self.num_steps:,}, loss {self.loss:.4f}, about {duration(round(self.left_s))} left"


def read_progress(folder: Path) -> LiveProgress | None:
    """Where the run in a folder is by its metrics, of which only the end is read; None before its first step.

    The time left is the mean of the last steps times those to come; evaluations and saves come on top.
    """
    attempt, lines = read_attempt(folder), read_last_lines(folder / METRICS_FILE)[:_MEAN_OF]
    if attempt is None or not lines:
        return None
    try:
        step, loss = int(lines[0]["step"]), float(lines[0]["loss"])
        step_s = statistics.fmean(float(line["step_s"]) for line in lines)
    except (ValueError, KeyError, TypeError):
        return None
    if not math.isfinite(step_s):
        return None
    return LiveProgress(step, attempt.num_steps, loss, step_s * max(0, attempt.num_steps - step))


def sync_metrics(folder: Path) -> None:
    """Fsync the lines of steps and evaluations.

    Raises:
        SaveError: a file can't be synced.
    """
    for name in (METRICS_FILE, EVALUATIONS_FILE, TOOL_CALLS_FILE):
        path = folder / name
        try:
            sync(path)
        except FileNotFoundError:
            continue  # before the first step, or the first evaluation
        except OSError as error:
            raise SaveError(f"{path}: can't be written to the disk: {error.strerror or error}.") from error
