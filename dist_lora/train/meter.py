"""What a run tells of itself while it goes: metrics.jsonl, a progress bar, and the trackers one names."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dist_lora.errors import ConfigError

METRICS_FILE = "metrics.jsonl"
STATUS = Path("/proc/self/status")  # Linux


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on its GPU, or in the host where it runs on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Not ru_maxrss where there is better: on Linux a process inherits it from the one that started it.
    with contextlib.suppress(OSError), STATUS.open() as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def truncate_metrics(folder: Path, *, last_step: int) -> None:
    """Drop the lines of steps after ``last_step``: they were lost with the process that made them, and come again."""
    path = folder / METRICS_FILE
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            is_kept = json.loads(line)["step"] <= last_step
        except (ValueError, KeyError, TypeError):
            continue  # the line that the process died in
        if is_kept:
            kept.append(line + "\n")
    aside = path.with_suffix(".partial")
    aside.write_text("".join(kept))
    os.replace(aside, path)


class Meter:
    """Writes one line a step; only the first rank has one. ``close`` it at the end, whatever the end is."""

    def __init__(self, folder: Path, *, trackers: list[str], every: int, first_step: int, num_steps: int) -> None:
        self._file = (folder / METRICS_FILE).open("a")
        self._every = every
        self._num_steps = num_steps
        self._trackers = [_tracker(name, folder) for name in trackers]
        self._started_s = time.monotonic()
        self._first_step = first_step
        self._bar = _progress_bar(first_step, num_steps) if sys.stderr.isatty() else None

    def step(self, line: Mapping[str, Any]) -> None:
        """Write down a finished step."""
        self._file.write(json.dumps(line, allow_nan=True) + "\n")
        self._file.flush()
        step = int(line["step"])
        scalars = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        for tracker in self._trackers:
            tracker.log(scalars, step=step)
        shown = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=step, shown=shown)
        elif step % self._every == 0 or step == self._num_steps:
            done = step - self._first_step + 1
            left_s = (time.monotonic() - self._started_s) / done * (self._num_steps - step)
            print(f"step {step}/{self._num_steps}  {shown}  {left_s:,.0f} s left", file=sys.stderr, flush=True)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Write down an evaluation beside its step, for the trackers and for the eye."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)
        told = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"step {step}: {told}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar, the file and the trackers."""
        if self._bar is not None:
            self._bar[0].stop()
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()


def _progress_bar(first_step: int, num_steps: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True))
    progress.start()
    return progress, progress.add_task("train", total=num_steps, completed=first_step - 1, shown="")


def _tracker(name: str, folder: Path) -> Any:
    """One of accelerate's trackers, by the name that accelerate gives it."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(f"log.trackers: '{name}' is not one of {', '.join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))}")
    kind = LOGGER_TYPE_TO_CLASS[name]
    try:
        # TensorBoard's own folder is RUN/tensorboard; the others call the run by its name.
        run_name = "tensorboard" if name == "tensorboard" else folder.name
        place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        tracker = kind(run_name, **place)
        tracker.start()
        return tracker
    except ImportError as error:
        raise ConfigError(f"log.trackers: '{name}' needs its package: {error}. Install it, or drop it.") from error
