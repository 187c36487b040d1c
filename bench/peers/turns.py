"""A contestant's side of the bench: it waits until it is asked for a step, and reports what the step took.

No other module of the project is imported here: contestants run in an environment of their own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED_S = time.monotonic()


@dataclass(frozen=True)
class Job:
    """What a contestant is to train; ``batches`` is a file of ``Batches``."""

    kind: str  # how it is to train
    model: str
    batches: str
    rank: int  # LoRA's
    alpha: float
    lr: float
    quant: str
    config: str  # dist_lora's, of the same run


def read_job() -> Job:
    """The job on the command line."""
    return Job(**json.loads(sys.argv[1]))


def read_batches(job: Job) -> list[list[tuple[list[int], list[int]]]]:
    """Per step its documents, each as ids and labels (-100 is no target)."""
    steps = json.loads(Path(job.batches).read_text())
    return [[(ids, labels) for ids, labels in step] for step in steps]


class Turns:
    """Requests on the standard input, reports on what was the standard output: libraries print to the error output now."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._begun: tuple[float, float, int] | None = None

    def ready(self, **more: Any) -> None:
        """Report that the first step could begin."""
        self._report(start_s=time.monotonic() - STARTED_S, **more)

    def __iter__(self) -> Iterator[str]:
        """The requests: ``step``, or another word that the contestant knows."""
        for line in sys.stdin:
            self.begin()
            yield line.strip()

    def wait(self) -> bool:
        """Wait for one request, where a library owns the loop; False at the end."""
        is_asked = bool(sys.stdin.readline())
        self.begin()
        return is_asked

    def begin(self) -> None:
        """A step begins now."""
        self._begun = (time.monotonic(), _cpu_s(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    def end(self, **more: Any) -> None:
        """The step is done."""
        assert self._begun is not None
        wall_s, cpu_s = time.monotonic() - self._begun[0], _cpu_s() - self._begun[1]
        usage = resource.getrusage(resource.RUSAGE_SELF)
        faults = usage.ru_minflt - self._begun[2]
        self._report(wall_s=wall_s, cpu_s=cpu_s, faults=faults, peak_bytes=usage.ru_maxrss * 1024, **more)

    def _report(self, **values: Any) -> None:
        print(json.dumps(values), file=self._out, flush=True)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
