"""The mark that a run leaves in its folder: how its last attempt stands or ended, for whoever starts it again.

Launchers don't hand on exit codes: torchrun makes 1 of every one (torch 2.13), and a job that Slurm starts again shows
the last attempt's. So a script asks the mark: one line of text, that a shell reads by ``read -r``::

    CODE AGAIN STEP STALLED ATTEMPT REASON

CODE is the exit code, or ``running``; AGAIN is ``again`` where starting the same command again makes sense, or ``final``;
STEP that of the newest checkpoint; STALLED how many attempts in a row have ended
without a newer checkpoint than the one they began with; ATTEMPT names the start of the job.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_lora.checkpoint.folders import step_folders
from dist_lora.errors import (
    EXIT_DAMAGED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PLAN,
    EXIT_STOPPED,
    EXIT_USER,
    CheckpointError,
    DistLoraError,
    OutOfMemory,
    RunInUse,
    StopNow,
    StoppedForGood,
    TrainingError,
)
from dist_lora.files import is_locked, write_whole

STATUS_FILE = "status"
RUNNING = "running"
AGAIN, FINAL = "again", "final"
MISTAKES = (EXIT_USER, EXIT_PLAN, EXIT_DAMAGED)  # the same command ends in the same way
REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Status:
    """A mark, as read. ``code`` is None while the attempt runs (or when it was killed and left no other)."""

    code: int | None
    is_final: bool
    step: int
    stalled: int
    attempt: str
    reason: str

    def line(self) -> str:
        """As it stands in the file."""
        code = RUNNING if self.code is None else str(self.code)
        reason = " ".join(self.reason.split())[:REASON_CHARACTERS]
        return f"{code} {FINAL if self.is_final else AGAIN} {self.step} {self.stalled} {self.attempt} {reason}\n"


def read_status(folder: Path) -> Status | None:
    """The mark of a run's folder; None where there is none that can be read."""
    try:
        code, kind, *numbers, attempt, reason = (folder / STATUS_FILE).read_text().split(" ", 5)
        step, stalled = map(int, numbers)
        return Status(None if code == RUNNING else int(code), kind == FINAL, step, stalled, attempt, reason.strip())
    except (OSError, ValueError):
        return None


def attempt_of(environment: Mapping[str, str]) -> str:
    """What names this start: the job and how often Slurm has started it again, or torchrun's id, or ``-``."""
    job = environment.get("SLURM_JOB_ID")
    if job:
        return f"{job}.{environment.get('SLURM_RESTART_COUNT') or 0}"
    return environment.get("TORCHELASTIC_RUN_ID", "").replace(" ", "_") or "-"


def _job_of(attempt: str) -> str:
    return attempt.partition(".")[0]


def _is_final(code: int, error: BaseException | None) -> bool:
    """Whether starting again would be of no use: numbers that went wrong go wrong again, bit for bit."""
    return code in (EXIT_DONE, *MISTAKES) or isinstance(error, StoppedForGood | TrainingError | OutOfMemory)


class Mark:
    """The mark of one attempt at a run; writing it never fails: it helps scripts, and no run ends for want of it."""

    def __init__(self, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.folder = folder
        self.attempt = attempt_of(environment)
        self._is_restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")

    def ended_before(self) -> Status | None:
        """How this very job has ended already, where torchrun starts its workers again in spite of a final code."""
        before = read_status(self.folder) if self._is_restart else None
        if before is None or before.attempt != self.attempt:
            return None
        return before if before.code in (*MISTAKES, EXIT_STOPPED) else None

    def begin(self) -> None:
        """Say that this attempt runs. The first rank calls it, once the run's folder is its own."""
        step, before = self._step(), self._before()
        stalled = 0 if before is None else before.stalled
        if before is not None and before.code is None:  # it was killed, and nobody has counted it
            stalled = 0 if step > before.step else stalled + 1
        self._write(Status(None, False, step, stalled, self.attempt, f"since {time.strftime('%Y-%m-%d %H:%M:%S')}"))

    def end(self, error: BaseException | None) -> None:
        """Say how it has ended: well (None) or by what. Called by the rank that tells the user."""
        if isinstance(error, RunInUse):
            return  # the mark is that of the run that is at work there
        code = EXIT_DONE if error is None else EXIT_FAILED
        if isinstance(error, DistLoraError | StopNow):
            code = error.exit_code
        before = self._before()
        if (
            isinstance(error, StopNow)
            and before is not None
            and before.attempt == self.attempt
            and before.code is not None
        ):
            return  # a launcher has ended this rank, for a reason that another one has told
        if code in (EXIT_STOPPED, EXIT_FAILED) or self.attempt != "-":  # by hand, a mistake makes no folder
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
        step = self._step()
        has_come_on = code == EXIT_DONE or (before is not None and step > before.step)
        stalled = 0 if has_come_on else (before.stalled if before is not None else 0) + 1
        reason = "done" if error is None else str(error) or type(error).__name__
        self._write(Status(code, _is_final(code, error), step, stalled, self.attempt, reason))

    def _before(self) -> Status | None:
        """The mark of this attempt, or of an earlier one of the same job."""
        before = read_status(self.folder)
        return before if before is not None and _job_of(before.attempt) == _job_of(self.attempt) else None

    def _step(self) -> int:
        with contextlib.suppress(CheckpointError):  # told by whoever needs one
            return max(step_folders(self.folder / "checkpoints"), default=0)
        return 0

    def _write(self, status: Status) -> None:
        with contextlib.suppress(OSError):
            write_whole(self.folder / STATUS_FILE, status.line())


@dataclass(frozen=True)
class Told:
    """What is told of a run, and the exit code that says it to a script."""

    text: str
    exit_code: int
    status: Status | None

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        found = {} if self.status is None else asdict(self.status)
        return {**found, "text": self.text, "exit_code": self.exit_code}


def tell_status(folder: Path, *, since_s: float | None = None) -> Told:
    """How the run of a folder stands.

    Args:
        since_s: seconds since 1970; a mark that is older counts as none, which is a failure.
    """
    status = read_status(folder)
    if since_s is not None and (status is None or (folder / STATUS_FILE).stat().st_mtime < since_s - 1):
        return Told(f"{folder}: ended before it came to its folder", EXIT_FAILED, None)
    if status is None:
        return Told(f"{folder}: not begun", EXIT_DONE, None)
    at = f"{folder}: step {status.step} is saved; "
    if is_locked(folder / "lock"):
        return Told(f"{at}running {status.reason}", EXIT_DONE, status)
    if status.code is None:
        return Told(f"{at}killed: it has run {status.reason}, and left no word", EXIT_FAILED, status)
    return Told(f"{at}exit code {status.code}: {status.reason}", status.code, status)
