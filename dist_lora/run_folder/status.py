"""The status file in a run's folder: whether its last attempt runs, or how it ended, for whoever restarts it.

Launchers don't pass on exit codes: torchrun turns every one into 1 (torch 2.13), and a job that Slurm requeues shows
the last attempt's. So scripts read the status file: one line of text, that a shell reads with ``read -r``::

    CODE AGAIN STEP STALLED ATTEMPT REASON

CODE is the exit code, or ``running``; AGAIN is ``again`` if running the same command again makes sense, or ``final``;
STEP that of the newest checkpoint; STALLED how many attempts in a row ended without a newer checkpoint than the one
they started from; ATTEMPT names the attempt: a job and how often it was restarted.
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
    OutOfMemory,
    RunInUse,
    StopNow,
    StoppedForGood,
    TrainingError,
    exit_code_of,
)
from dist_lora.files import is_locked, write_whole
from dist_lora.run_folder.attempt import read_summary
from dist_lora.run_folder.records import LiveProgress, read_progress

STATUS_FILE = "status"
RUNNING = "running"
AGAIN, FINAL = "again", "final"
MISTAKES = (EXIT_USER, EXIT_PLAN, EXIT_DAMAGED)  # the same command ends in the same way
REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Status:
    """The content of a status file. ``code`` is None while the attempt runs (or if it was killed)."""

    code: int | None
    is_final: bool
    step: int
    stalled: int
    attempt: str
    reason: str

    def line(self) -> str:
        """The line in the file."""
        code = RUNNING if self.code is None else str(self.code)
        reason = " ".join(self.reason.split())[:REASON_CHARACTERS]
        return f"{code} {FINAL if self.is_final else AGAIN} {self.step} {self.stalled} {self.attempt} {reason}\n"


def read_status(folder: Path) -> Status | None:
    """The status in a run's folder; None if there is none that can be read."""
    try:
        code, kind, *numbers, attempt, reason = (folder / STATUS_FILE).read_text().split(" ", 5)
        step, stalled = map(int, numbers)
        return Status(None if code == RUNNING else int(code), kind == FINAL, step, stalled, attempt, reason.strip())
    except (OSError, ValueError):
        return None


def attempt_of(environment: Mapping[str, str]) -> str:
    """The name of this attempt: the Slurm job and how often it was restarted, or torchrun's id, or ``-``."""
    job = environment.get("SLURM_JOB_ID")
    if job:
        return f"{job}.{environment.get('SLURM_RESTART_COUNT') or 0}"
    return environment.get("TORCHELASTIC_RUN_ID", "").replace(" ", "_") or "-"


def job_of(environment: Mapping[str, str]) -> tuple[str, bool]:
    """Slurm's job that this start belongs to, "" without one, and whether Slurm has requeued it.

    Other launchers' names are no jobs': torchrun's may be the same each time, and a node that joins is no restart.
    """
    return environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def _job_of(attempt: str) -> str:
    return attempt.partition(".")[0]


def _is_final(code: int, error: BaseException | None) -> bool:
    """Whether a restart would be useless: a numerical failure repeats itself, bit for bit."""
    return code in (EXIT_DONE, *MISTAKES) or isinstance(error, StoppedForGood | TrainingError | OutOfMemory)


_opened: set[Path] = set()


def note_opened(folder: Path) -> None:
    """Note that this process is a rank of the run that holds this folder's lock."""
    _opened.add(folder)


def note_closed() -> None:
    """Note that this process is no rank of a run any more."""
    _opened.clear()


def is_of_another(folder: Path) -> bool:
    """Whether another start of the run is writing this folder, to which its status and its log belong."""
    return folder not in _opened and is_locked(folder / "lock")


class StatusWriter:
    """Writes the status file of one attempt at a run. Writing never raises: no run ends because of its status file."""

    def __init__(self, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self.folder = folder
        self.attempt = attempt_of(environment)
        self._is_restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")

    def ended_before(self) -> Status | None:
        """How this same job has already ended, if torchrun restarts its workers despite a final exit code."""
        before = read_status(self.folder) if self._is_restart else None
        if before is None or before.attempt != self.attempt:
            return None
        return before if before.code in (*MISTAKES, EXIT_STOPPED) else None

    def begin(self) -> None:
        """Write that this attempt runs. The first rank calls it, once it has locked the run's folder."""
        step, before = self._step(), self._before()
        stalled = 0 if before is None else before.stalled
        if before is not None and before.code is None:  # it was killed, and not counted yet
            stalled = 0 if step > before.step else stalled + 1
        self._write(Status(None, False, step, stalled, self.attempt, f"since {time.strftime('%Y-%m-%d %H:%M:%S')}"))

    def end(self, error: BaseException | None) -> None:
        """Write how it ended: well (None) or with an error. Called by the rank that reports to the user."""
        if isinstance(error, RunInUse) or is_of_another(self.folder):
            return  # the status is that of the process that is running there
        code = EXIT_DONE if error is None else exit_code_of(error)
        before = self._before()
        if (
            isinstance(error, StopNow)
            and before is not None
            and before.attempt == self.attempt
            and before.code is not None
        ):
            return  # a launcher ended this rank, for a reason that another one has reported
        if (
            code in (EXIT_STOPPED, EXIT_FAILED) or self.attempt != "-"
        ):  # without a launcher, a user's mistake makes no folder
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
        step = self._step()
        has_progressed = code == EXIT_DONE or (before is not None and step > before.step)
        stalled = 0 if has_progressed else (before.stalled if before is not None else 0) + 1
        reason = _done(self.folder) if error is None else str(error) or type(error).__name__
        self._write(Status(code, _is_final(code, error), step, stalled, self.attempt, reason))

    def _before(self) -> Status | None:
        """The status of this attempt, or of an earlier one of the same job."""
        before = read_status(self.folder)
        return before if before is not None and _job_of(before.attempt) == _job_of(self.attempt) else None

    def _step(self) -> int:
        with contextlib.suppress(CheckpointError):  # reported by whatever needs a checkpoint
            return max(step_folders(self.folder / "checkpoints"), default=0)
        return 0

    def _write(self, status: Status) -> None:
        with contextlib.suppress(OSError):
            write_whole(self.folder / STATUS_FILE, status.line())


def _done(folder: Path) -> str:
    """``done``, and why before all steps were, where a run has ended early."""
    early = read_summary(folder).get("ended_early")
    return f"done: {early}" if isinstance(early, str) else "done"


@dataclass(frozen=True)
class RunStatus:
    """A run's status in words, and as an exit code for scripts."""

    text: str
    exit_code: int
    status: Status | None
    progress: LiveProgress | None = None

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        fields = {} if self.status is None else asdict(self.status)
        if self.progress is not None:
            fields["progress"] = asdict(self.progress)
        return {**fields, "text": self.text, "exit_code": self.exit_code}


def describe_status(folder: Path, *, since_s: float | None = None) -> RunStatus:
    """The status of the run in a folder.

    Args:
        since_s: seconds since 1970; an older status is ignored, and counts as a failure.
    """
    status = read_status(folder)
    if since_s is not None and (status is None or (folder / STATUS_FILE).stat().st_mtime < since_s - 1):
        return RunStatus(f"{folder}: ended before it opened the run's folder", EXIT_FAILED, None)
    if status is None:
        return RunStatus(f"{folder}: not started", EXIT_DONE, None)
    at = f"{folder}: step {status.step} is saved; "
    if is_locked(folder / "lock"):
        live = read_progress(folder)
        now = "" if live is None else f"; {live.text()}"
        return RunStatus(f"{at}running {status.reason}{now}", EXIT_DONE, status, live)
    if status.code is None:
        return RunStatus(f"{at}killed: it ran {status.reason}, and wrote no status at its end", EXIT_FAILED, status)
    return RunStatus(f"{at}exit code {status.code}: {status.reason}", status.code, status)
