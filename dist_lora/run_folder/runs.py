"""All runs in a folder, a row each: state, steps and losses, from their small files; needs no torch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dist_lora.config.load import load_config
from dist_lora.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from dist_lora.files import is_locked, no_folder
from dist_lora.run_folder.attempt import EVALUATIONS_FILE, METRICS_FILE, read_attempt, read_summary
from dist_lora.run_folder.records import number_of, read_last_lines, read_lines
from dist_lora.run_folder.status import read_status
from dist_lora.text import duration

State = Literal["running", "done", "stopped", "failed", "killed", "not started"]


@dataclass(frozen=True)
class RunRow:
    """One run. Losses are per trained token, None where there is none yet; ``changed_s`` is in seconds since 1970."""

    name: str
    state: State
    step: int
    num_steps: int | None
    loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    model: str
    quant: str
    changed_s: float
    problem: str = ""
    """Why its config can't be read, or how it ended if not well."""

    def to_json(self) -> dict[str, Any]:
        """For scripts: a loss that isn't finite is None, since JSON has no number for it."""
        return {name: None if _is_not_finite(value) else value for name, value in asdict(self).items()}


def list_runs(folder: Path) -> list[RunRow]:
    """The runs in a folder, that which changed last first.

    Raises:
        ConfigError: there is no such folder.
    """
    if (problem := no_folder(folder)) is not None:
        raise ConfigError(f"{folder}: {problem}; expected the folder of all runs (runs_dir), like runs")
    try:
        rows = [_row(path) for path in sorted(folder.iterdir()) if _is_run(path)]
    except OSError as error:
        raise ConfigError(f"{folder}: can't be read: {error.strerror or error}") from None
    return sorted(rows, key=lambda row: -row.changed_s)


def runs_table(rows: Sequence[RunRow], *, now_s: float | None = None) -> Iterator[list[str]]:
    """The rows as text, under their heads; the last column tells what went wrong."""
    now_s = time.time() if now_s is None else now_s
    yield ["run", "state", "step", "loss", "held-out", "best", "model", "changed", ""]
    for row in rows:
        total = "" if row.num_steps is None else f"/{row.num_steps:,}"
        yield [
            row.name,
            row.state,
            f"{row.step:,}{total}",
            *map(_shown, (row.loss, row.eval_loss, row.best_eval_loss)),
            row.model if row.quant in ("", "none") else f"{row.model} ({row.quant})",
            f"{duration(max(0.0, now_s - row.changed_s))} ago",
            row.problem,
        ]


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's; also one that this user may not look into, so that its row says so."""
    try:
        return (folder / "config.yaml").is_file()
    except PermissionError:
        return True


def _row(folder: Path) -> RunRow:
    model, quant, problem = "", "", ""
    try:
        config = load_config(folder / "config.yaml")
        model, quant = config.model.name, config.model.quant
    except ConfigError as error:
        problem = str(error).splitlines()[0]
    last = next(iter(read_last_lines(folder / METRICS_FILE)), {})
    losses = _losses(folder / EVALUATIONS_FILE)
    attempt = read_attempt(folder)
    state, reason = _state(folder)
    return RunRow(
        name=folder.name,
        state=state,
        step=int(last.get("step", 0)),
        num_steps=None if attempt is None else attempt.num_steps,
        loss=number_of(last, "loss"),
        eval_loss=losses[-1] if losses else None,
        best_eval_loss=min((loss for loss in losses if not math.isnan(loss)), default=None),
        model=model,
        quant=quant,
        changed_s=_changed_s(folder),
        problem=problem or reason,
    )


def _state(folder: Path) -> tuple[State, str]:
    """How the run's last attempt ended, and the reason if not well."""
    if is_locked(folder / "lock"):
        return "running", ""
    status = read_status(folder)
    if status is None:
        return ("done", "") if read_summary(folder) else ("not started", "")
    if status.code is None:
        return "killed", ""
    if status.code == EXIT_DONE:
        return "done", ""
    return "stopped" if status.code == EXIT_STOPPED else "failed", status.reason


def _losses(path: Path) -> list[float]:
    try:
        losses = [number_of(line, "eval_loss") for line in read_lines(path)]
    except OSError:
        return []
    return [loss for loss in losses if loss is not None]


def _changed_s(folder: Path) -> float:
    changed_s = 0.0
    for path in (folder / METRICS_FILE, folder / "status", folder / "config.yaml"):
        with contextlib.suppress(OSError):
            changed_s = max(changed_s, path.stat().st_mtime)
    return changed_s


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _shown(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
