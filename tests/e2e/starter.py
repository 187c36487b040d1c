"""Runs started from a process that has the imports behind it: many starts in the time that imports alone would take.

``python -m tests.e2e.starter`` imports what a run imports, and then forks: the launcher for each run that it is asked
for (a line of JSON on stdin), and the launcher its ranks. Signals, files, locks and the ranks' meeting are those of
``dist-lora train``; only ``exec`` is left out. ``Starter(is_forking=False)`` runs the command itself instead.

This process is the one that orphans fall to, so it knows of every process of a run, and says when the last has ended.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NoReturn

from tests.e2e.runs import ROOT, command, environment

PR_SET_CHILD_SUBREAPER = 36
IMPORTED = ("dist_lora.cli", "dist_lora.train.main", "dist_lora.parallel.rank", "dist_lora.parallel.fsdp2", "transformers",
            "datasets", "tests.e2e.runs", "torch.distributed.fsdp", "torch._dynamo")  # fmt: skip
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass
class Start:
    """A run under way."""

    pid: int  # of its launcher
    _starter: Starter

    def wait(self, timeout_s: float) -> int | None:
        """The launcher's exit code (negative: the signal that ended it) once all processes have ended, or None."""
        return self._starter.answer(timeout_s)

    def ranks(self) -> list[int]:
        """The processes that the launcher has started and not seen the end of."""
        return children_of(self.pid)


class Starter:
    """Starts one run at a time; ``close`` it."""

    def __init__(self, *, is_forking: bool = True, also_imported: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.starter", *(IMPORTED if is_forking else ()), *also_imported],
            cwd=ROOT, env={**environment(), "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._is_forking = is_forking

    def start(
        self, *arguments: object, told: Path, fault: str | None = None, env: Mapping[str, str] = MappingProxyType({})
    ) -> Start:
        """``dist-lora ARGUMENTS``; what it prints goes to the file ``told``."""
        ask = {
            "arguments": [str(argument) for argument in arguments],
            "env": {**environment(fault), **env},
            "told": str(told),
            "is_forking": self._is_forking,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(ask).encode() + b"\n")
        self._process.stdin.flush()
        pid = self.answer(120)
        assert pid is not None, "the starter did not start"
        return Start(pid, self)

    def answer(self, timeout_s: float) -> int | None:
        """The next number that the other process says, or None where it says none in time."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        return int(self._process.stdout.readline()) if ready else None

    def descendants(self) -> list[int]:
        """All processes of the run under way."""
        found = children_of(self._process.pid)
        for pid in found:
            found += children_of(pid)
        return found

    def close(self) -> None:
        """End it and what is left of a run."""
        for pid in self.descendants():
            os.kill(pid, signal.SIGKILL)
        self._process.communicate()


def children_of(pid: int) -> list[int]:
    """The processes that ``pid`` has started, in order, whether they live or wait to be seen; none where it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


# The process that starts


def serve(imported: Sequence[str]) -> None:
    """Start what stdin asks for; say each launcher's process id, and its exit code when nothing of it is left."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for name in imported:
        importlib.import_module(name)
    while line := sys.stdin.readline():
        ask = json.loads(line)
        launcher = os.fork()
        if not launcher:
            _launch(ask)
        print(launcher, flush=True)
        code = 0
        while True:
            try:
                pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                break
            if pid == launcher:
                code = os.waitstatus_to_exitcode(status)
        print(code, flush=True)


def _launch(ask: dict[str, Any]) -> NoReturn:
    """Become the launcher of a run."""
    os.setsid()
    told = os.open(ask["told"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, at in ((nothing, 0), (told, 1), (told, 2)):
        os.dup2(number, at)
    if not ask["is_forking"]:
        words = command(*ask["arguments"])
        os.execve(words[0], words, ask["env"])
    from dist_lora.parallel import local

    local.subprocess = SimpleNamespace(Popen=_Forked, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[attr-defined]
    _become(ask["arguments"], ask["env"])


def _become(arguments: Sequence[str], env: Mapping[str, str], first: Callable[[], None] = lambda: None) -> NoReturn:
    """Run the command in this process and end it as a process that was started for it ends."""
    from dist_lora.cli import main

    for number in ASKING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["dist-lora", *arguments]
    code: Any = 1
    try:
        first()
        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


class _Forked(subprocess.Popen[bytes]):
    """A rank that is forked from its launcher and not executed."""

    def __init__(self, words: Sequence[str], *, env: Mapping[str, str], start_new_session: bool) -> None:
        assert list(words[1:3]) == ["-m", "dist_lora"] and start_new_session
        self._arguments, self._env = words[3:], env
        super().__init__(words)

    def _execute_child(self, *given: object) -> None:
        self.pid = os.fork()
        self._child_created = True
        if not self.pid:
            os.setsid()
            _become(self._arguments, self._env, _let_the_fault_in)


def _let_the_fault_in() -> None:
    """What ``inject/sitecustomize.py`` does in a rank that is a new process."""
    if "DIST_LORA_FAULT" in os.environ:
        from tests.e2e import faults

        getattr(faults, os.environ["DIST_LORA_FAULT"])()


if __name__ == "__main__":
    serve(sys.argv[1:])
