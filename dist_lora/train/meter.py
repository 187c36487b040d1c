"""What a run tells of itself while it goes: metrics.jsonl, evaluations.jsonl, a progress bar, and the trackers one names."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_lora.errors import ConfigError, SaveError
from dist_lora.run_folder.records import EVALUATIONS_FILE, METRICS_FILE

log = logging.getLogger("dist_lora")

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


def check_trackers(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` naming the trackers whose packages are not installed: before minutes of loading."""
    lacking = [name for name in names if importlib.util.find_spec(name) is None]  # each is called like its package
    if lacking:
        raise ConfigError(
            f"log.trackers: {', '.join(lacking)}: not installed here. Install {'it' if len(lacking) == 1 else 'them'} "
            f"(pip install {' '.join(name.replace('_', '-') for name in lacking)}), or leave it out: log.trackers=[]"
        )


class Meter:
    """Writes one line a step; only the first rank has one. ``close`` it at the end, whatever the end is."""

    def __init__(
        self,
        folder: Path,
        *,
        trackers: Sequence[str],
        settings: Mapping[str, Any],
        every: int,
        first_step: int,
        num_steps: int,
    ) -> None:
        self._folder = folder
        self._files = {METRICS_FILE: (folder / METRICS_FILE).open("a")}
        self._every = every
        self._num_steps = num_steps
        self._trackers = {name: _tracker(name, folder, settings, first_step=first_step) for name in trackers}
        self._started_s = time.monotonic()
        self._first_step = first_step
        self._bar = _progress_bar(first_step, num_steps) if sys.stderr.isatty() else None

    def step(self, line: Mapping[str, Any]) -> None:
        """Write down a finished step.

        Raises:
            SaveError: the disk refuses.
        """
        self._write(METRICS_FILE, line, what="step")
        step = int(line["step"])
        self._track(step, {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"})
        shown = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=step, shown=shown)
        elif step % self._every == 0 or step == self._num_steps:
            done = step - self._first_step + 1
            left_s = (time.monotonic() - self._started_s) / done * (self._num_steps - step)
            print(f"step {step}/{self._num_steps}  {shown}  {left_s:,.0f} s left", file=sys.stderr, flush=True)

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Write down an evaluation beside its step: in its file, for the trackers and for the eye.

        Raises:
            SaveError: the disk refuses.
        """
        self._write(EVALUATIONS_FILE, {"step": step, **values}, what="the evaluation at step")
        self._track(step, values)
        told = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"step {step}: {told}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar, the file and the trackers."""
        if self._bar is not None:
            self._bar[0].stop()
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what it could not write was told when it could not
                file.close()
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                log.warning(f"log.trackers: {name} could not be finished: {error}")

    def _write(self, name: str, line: Mapping[str, Any], *, what: str) -> None:
        path = self._folder / name
        try:
            if name not in self._files:  # most runs evaluate late, and some never
                self._files[name] = path.open("a")
            self._files[name].write(json.dumps(line, allow_nan=True) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise SaveError(
                f"{path}: {what} {line['step']} can't be written down: {error.strerror or error}. "
                "Make room (or set runs_dir elsewhere), and the same command goes on from the last checkpoint."
            ) from error

    def _track(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand values to the trackers. One that fails (its server is gone) costs the run its curves, not its weights."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:
                del self._trackers[name]
                log.warning(
                    f"log.trackers: {name} failed at step {step} and gets no more: {error}. {METRICS_FILE} has all"
                )


def _progress_bar(first_step: int, num_steps: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn(),
               TextColumn("left"))  # fmt: skip
    progress = Progress(*columns, console=Console(stderr=True))
    progress.start()
    return progress, progress.add_task("train", total=num_steps, completed=first_step - 1, shown="")


def _hush_writers() -> None:
    """Keep TensorBoard's writing thread from printing the error that its next ``log`` raises too."""
    before = threading.excepthook

    def hook(told: threading.ExceptHookArgs) -> None:
        if not type(told.thread).__module__.startswith("tensorboard."):
            before(told)

    threading.excepthook = hook


def _tracker(name: str, folder: Path, settings: Mapping[str, Any], *, first_step: int) -> Any:
    """One of accelerate's trackers, by the name that accelerate gives it, started."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    _tell_accelerate_that_it_is_alone()
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
    try:
        if name == "tensorboard":
            # Its own folder is RUN/tensorboard. What a killed process wrote of later steps is purged: those come again.
            tracker = kind("tensorboard", purge_step=first_step, **place)
            tracker.start()
            _hush_writers()
        else:
            tracker = kind(folder.name, **place)
            tracker.start()
            tracker.store_init_configuration(dict(settings))
    except Exception as error:  # each has kinds of its own: not logged in, no server, a package that lacks another
        raise ConfigError(
            f"log.trackers: {name} could not be started: {type(error).__name__}: {error}. Mend that, or leave it out"
        ) from error
    return tracker


def _tell_accelerate_that_it_is_alone() -> None:
    """Its trackers want a state that, by a launcher's variables, opens a process group; only this rank has trackers."""
    from accelerate import PartialState

    hidden = {name: os.environ.pop(name) for name in ("LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    try:
        PartialState()
    finally:
        os.environ |= hidden
