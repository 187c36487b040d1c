"""What a run reports while it trains: metrics.jsonl, evaluations.jsonl, a progress bar, the configured trackers, callbacks."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_lora.errors import SaveError
from dist_lora.run_folder.attempt import EVALUATIONS_FILE, METRICS_FILE, TOOL_CALLS_FILE
from dist_lora.run_folder.log_file import to_log_file
from dist_lora.supervision.told import tell
from dist_lora.train.callbacks import Callbacks
from dist_lora.train.trackers import Options, start_tracker

log = logging.getLogger("dist_lora")

STATUS = Path("/proc/self/status")  # Linux


def peak_bytes(device: torch.device) -> int:
    """This process's peak memory: on its GPU, or on the host if it runs on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # ru_maxrss only as a fallback: on Linux a process inherits it from its parent.
    with contextlib.suppress(OSError), STATUS.open() as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def device_memory(device: torch.device) -> dict[str, int]:
    """What PyTorch's allocator reserved beyond the tensors of ``peak_bytes``, in bytes, and how often it had to start anew.

    Retries, and reserved memory far above the peak, are signs of fragmentation. Empty on a CPU.
    """
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    return {
        "peak_reserved_bytes": int(stats["reserved_bytes.all.peak"]),
        "alloc_retries": int(stats["num_alloc_retries"]),
    }


def reset_peak(device: torch.device) -> None:
    """Begin ``peak_bytes`` anew, where that can be: on a GPU. Loading isn't counted among the steps then."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class Meter:
    """Records steps and evaluations; only the first rank has one. Always ``close`` it, also after an error."""

    def __init__(
        self,
        folder: Path,
        *,
        trackers: Sequence[str],
        settings: Mapping[str, Any],
        every: int,
        first_step: int,
        num_steps: int,
        options: Options | None = None,
        peak_flops_per_s: float | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self._folder, self._callbacks = folder, callbacks
        self._files = {METRICS_FILE: (folder / METRICS_FILE).open("a")}
        self._every = every
        self._peak_flops_per_s = peak_flops_per_s
        self._num_steps = num_steps
        self._trackers = {
            name: start_tracker(name, folder, settings, options=(options or {}).get(name, {}), first_step=first_step)
            for name in trackers
        }
        self._started_s = time.monotonic()
        self._first_step = first_step
        self._bar = _progress_bar(first_step, num_steps) if sys.stderr.isatty() else None

    def step(self, line: Mapping[str, Any]) -> None:
        """Record a finished step.

        Raises:
            SaveError: it can't be written.
            OwnCodeError: a callback raised an error.
        """
        self._write(METRICS_FILE, line, label="step")
        step = int(line["step"])
        self._track(step, {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"})
        shown = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=step, shown=shown)
        if step % self._every == 0 or step == self._num_steps:
            done = step - self._first_step + 1
            left_s = (time.monotonic() - self._started_s) / done * (self._num_steps - step)
            reached = self._reached(line["model_flops_per_s"])
            text = f"step {step}/{self._num_steps}  {shown}  {reached}  {left_s:,.0f} s left"
            to_log_file(text)
            if self._bar is None:
                tell(text)
        if self._callbacks is not None:
            self._callbacks.step(line)

    def _reached(self, flops_per_s: float) -> str:
        """Operations per second of a rank, and their share of its GPU's peak where that is known."""
        text = f"{flops_per_s / 1e12:.3g} TFLOP/s"
        return text if self._peak_flops_per_s is None else f"{text} ({flops_per_s / self._peak_flops_per_s:.0%})"

    def evaluated(self, step: int, values: Mapping[str, float], *, tool_calls: Mapping[str, Any] | None = None) -> None:
        """Record an evaluation: in its file, in the trackers and on the terminal.

        Args:
            tool_calls: the counts, which go to a file of their own alone: there may be many tools.

        Raises:
            SaveError: it can't be written.
            OwnCodeError: a callback raised an error.
        """
        self._write(EVALUATIONS_FILE, {"step": step, **values}, label="the evaluation at step")
        if tool_calls:
            self._write(TOOL_CALLS_FILE, {"step": step, "tool_calls": tool_calls}, label="the tool calls at step")
        self._track(step, values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        to_log_file(f"step {step}: {shown}")
        tell(f"step {step}: {shown}")
        if self._callbacks is not None:
            self._callbacks.evaluated({"step": step, **values})

    def leave_terminal(self) -> None:
        """Stop the progress bar: what is printed now stays below it."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # of a terminal that is gone
                self._bar[0].stop()

    def close(self) -> None:
        """Close the progress bar, the files and the trackers, some of which wait for their servers."""
        self.leave_terminal()
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a failed write was raised at once
                file.close()
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                log.warning(f"log.trackers: {name} couldn't be closed: {error}")

    def _write(self, name: str, line: Mapping[str, Any], *, label: str) -> None:
        path = self._folder / name
        try:
            if name not in self._files:  # most runs evaluate late, and some never
                self._files[name] = path.open("a")
            self._files[name].write(json.dumps(line, allow_nan=True) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise SaveError(
                f"{path}: {label} {line['step']} can't be written: {error.strerror or error}. "
                "Free disk space (or set runs_dir elsewhere), and the same command resumes from the last checkpoint."
            ) from error

    def _track(self, step: int, values: Mapping[str, Any]) -> None:
        """Pass values to the trackers. One that fails (its server is gone) is dropped, and the run continues."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:
                del self._trackers[name]
                log.warning(
                    f"log.trackers: {name} failed at step {step} and is dropped: {error}. {METRICS_FILE} has all values"
                )


def _progress_bar(first_step: int, num_steps: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn(),
               TextColumn("left"))  # fmt: skip
    progress = Progress(*columns, console=Console(stderr=True))
    progress.start()
    return progress, progress.add_task("train", total=num_steps, completed=first_step - 1, shown="")
