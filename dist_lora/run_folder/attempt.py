"""What the present attempt at a run sets out to do, and what former ones have spent: one small file; needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_lora.files import read_json, write_whole

ATTEMPT_FILE = "attempt.json"
METRICS_FILE = "metrics.jsonl"  # one line per step
EVALUATIONS_FILE = "evaluations.jsonl"  # one line per evaluation
TOOL_CALLS_FILE = "tool_calls.jsonl"  # one line per evaluation that counts tool calls
SUMMARY_FILE = "summary.json"  # written at the end of a run
TRACKERS_FILE = "trackers.json"  # the ids that a run has in its trackers


@dataclass(frozen=True)
class Attempt:
    """The steps of the whole run, and what its former attempts took.

    Of one that didn't come to its end the seconds until its last line of metrics count, and no peaks are known.
    """

    num_steps: int
    former_seconds: float = 0.0
    former_peak_bytes: tuple[int, ...] = ()
    began_s: float = 0.0  # seconds since 1970; 0 where an earlier version wrote the file

    def peaks_with(self, peak_bytes: list[int]) -> list[int]:
        """The peaks of all attempts, rank by rank; those of this one alone if it has another number of ranks."""
        if len(self.former_peak_bytes) != len(peak_bytes):
            return peak_bytes
        return [max(pair) for pair in zip(self.former_peak_bytes, peak_bytes, strict=True)]


def begin_attempt(
    folder: Path, *, num_steps: int, is_new: bool, began_s: float, keeps_trackers: bool = False
) -> Attempt:
    """Write what this attempt sets out to do. From here on the run isn't finished: a former summary is removed.

    Args:
        began_s: when this attempt was started, in seconds since 1970.
        is_new: the run begins at its first step, and nothing of former attempts counts.
        keeps_trackers: a former attempt ended before its first checkpoint, and its runs in trackers go on.

    Raises:
        OSError: it can't be written.
    """
    former = None if is_new else read_attempt(folder)
    seconds, peaks = (0.0, ()) if former is None else (former.former_seconds, former.former_peak_bytes)
    if not is_new and (summary := read_summary(folder)):
        number, found = summary.get("seconds"), summary.get("peak_bytes")
        seconds = float(number) if isinstance(number, int | float) else seconds
        if isinstance(found, list) and all(isinstance(peak, int) for peak in found):
            peaks = tuple(found)
    elif former is not None:
        seconds += _seconds_of_stopped(folder, former)
    attempt = Attempt(num_steps, seconds, peaks, began_s)
    write_whole(folder / ATTEMPT_FILE, json.dumps(asdict(attempt)) + "\n")
    (folder / SUMMARY_FILE).unlink(missing_ok=True)
    if is_new and not keeps_trackers:
        (folder / TRACKERS_FILE).unlink(missing_ok=True)
    return attempt


def _seconds_of_stopped(folder: Path, attempt: Attempt) -> float:
    """What an attempt took that was stopped or killed: until the last step of which its metrics tell."""
    try:
        last_s = (folder / METRICS_FILE).stat().st_mtime
    except OSError:
        return 0.0
    return max(0.0, last_s - attempt.began_s) if attempt.began_s else 0.0


def read_attempt(folder: Path) -> Attempt | None:
    """What ``begin_attempt`` wrote; None if there is nothing that can be read, as in a run of an earlier version."""
    try:
        content = read_json(folder / ATTEMPT_FILE)
        num_steps, peaks = int(content["num_steps"]), tuple(int(peak) for peak in content["former_peak_bytes"])
        return Attempt(num_steps, float(content["former_seconds"]), peaks, float(content.get("began_s", 0.0)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary that a run writes at its end; empty before, and where it can't be read."""
    try:
        return read_json(folder / SUMMARY_FILE)
    except (OSError, ValueError):
        return {}
