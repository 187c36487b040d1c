"""Records one step of a run with torch's profiler: a trace for Perfetto, and a table in the log."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from dist_lora.profile import parts
from dist_lora.profile.trace import table_of

log = logging.getLogger("dist_lora")

FOLDER = "profile"
WARM_STEPS = 2
"""Steps of an attempt that come before: in them memory is allocated and kernels are chosen."""

_BIG = 2**24  # elements that are added up: larger than any cache
_REPEATS = 5


class Recorder:
    """Records the third step of this attempt, or its last one if it has fewer. The other steps run as always.

    Args:
        folder: the run's, in which ``profile/`` is made.
        first_step, num_steps: of the attempt, from 1.
        matmul: ``(tokens, width, out)`` of a large frozen linear's product, whose rate is the limit of all products.
        on_write: called before the trace is written, for which the other ranks wait.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        num_steps: int,
        device: torch.device,
        dtype: torch.dtype,
        matmul: tuple[int, int, int],
        on_write: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_write = on_write
        self._folder, self._device, self._dtype, self._matmul = folder / FOLDER, device, dtype, matmul
        self._step = min(first_step + WARM_STEPS, num_steps)

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around each step; that of the recorded one writes the trace and logs the table when it has ended."""
        if step != self._step:
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints two lines to the terminal otherwise
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler, parts.step():
            yield
            self._wait()
        self._on_write()
        self._write(profiler, step)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self, profiler: torch.profiler.profile, step: int) -> None:
        path = self._folder / f"step-{step:08d}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except OSError as error:
            log.warning(f"{path}: the profile can't be written: {error.strerror or error}. The run continues")
            return
        with gzip.open(path, "rt") as file:
            table = table_of(json.load(file)["traceEvents"])
        flops_per_s, bytes_per_s = self._measure()
        tokens, width, out = self._matmul
        lines = [
            f"profile of step {step} on rank 0:",
            *table.lines(flops_per_s=flops_per_s, bytes_per_s=bytes_per_s),
            f"limits, measured here after the step: {flops_per_s / 1e12:.3g} TFLOP/s in a product of {tokens:,} x {width:,} and "
            f"{width:,} x {out:,}, {bytes_per_s / 1e9:.3g} GB/s in a large addition. A product counts 2 operations for each "
            "pair of numbers; bytes are those of inputs and outputs",
            f"trace for ui.perfetto.dev: {path}",
        ]
        log.info("\n".join(lines))

    def _measure(self) -> tuple[float, float]:
        """Operations per second of the limiting product, and bytes per second of a large addition."""
        tokens, width, out = self._matmul
        zeros = functools.partial(torch.zeros, device=self._device, dtype=self._dtype)
        x, weight, y = zeros(tokens, width), zeros(out, width), zeros(tokens, out)
        matmul_s = self._seconds(lambda: torch.mm(x, weight.t(), out=y))
        a = zeros(_BIG)
        add_s = self._seconds(lambda: torch.add(a, 1.0, out=a))
        return 2 * tokens * width * out / matmul_s, 2 * a.nbytes / add_s

    def _seconds(self, work: Callable[[], object]) -> float:
        """Of the fastest of some calls."""
        times = []
        for _ in range(_REPEATS + 1):  # the first one warms up, and is never the fastest
            self._wait()
            began_s = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - began_s)
        return min(times)
