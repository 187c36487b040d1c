"""A program of the user's that runs beside a rank, within a time limit, and ends with it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from dist_lora.supervision import leashed

POLL_S = 0.2
# What launchers tell the processes that they start: a program that reads it would try to join the run.
_OF_LAUNCHERS = re.compile(
    r"RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|NODE)_(RANK|SIZE|WORLD_SIZE|NAME)|CROSS_(RANK|SIZE)|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_\w+|TORCH_NCCL_ASYNC_ERROR_HANDLING|ACCELERATE_\w+|FSDP_\w+|DIST_LORA_(?!CACHE$)\w+"
    r"|SLURM_(STEP\w*|PROCID|LOCALID|NODEID|GTIDS|TASK_PID|LAUNCH_\w+|SRUN_\w+)|PMI\w*|PMIX_\w+|OMPI_\w+"
)

Ended = int | Literal["timeout", "stopped"]
"""A program's exit code, or why it was killed."""


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what launchers say of the rank that has it."""
    return {name: value for name, value in environment.items() if not _OF_LAUNCHERS.fullmatch(name)}


def run_leashed(
    words: Sequence[str],
    *,
    environment: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    timeout_s: float,
    is_to_stop: Callable[[], bool],
) -> Ended:
    """Run a program to its end, in a process group of its own, without a shell.

    It is killed, with all that it has started in its group, at the time limit, on request, if this raises, and when this
    process is gone, however that was killed.

    Args:
        words: the program and its arguments.
        stdout, stderr: new files for what it prints.
        is_to_stop: called a few times a second; may raise.

    Raises:
        OSError: the files can't be made.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as opened:
        out, err = (opened.enter_context(path.open("wb")) for path in (stdout, stderr))
        process = subprocess.Popen(
            [sys.executable, "-I", leashed.__file__, *words],
            stdin=subprocess.PIPE,  # see leashed
            stdout=out,
            stderr=err,
            env=dict(environment),
            start_new_session=True,
        )
        opened.callback(_end, process)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_S)
            if is_to_stop():
                return "stopped"
            if time.monotonic() > deadline:
                return "timeout"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the group, if its leader hasn't ended by itself."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
