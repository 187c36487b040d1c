"""Commands started from a process that has the imports behind it: many starts in the time that imports alone would take.

``python -m tests.e2e.starter`` imports what a run imports, and then forks, for each command that it is asked for: a
process that looks after it, which forks the command, which forks its ranks. Signals, files, locks and the ranks' rendezvous
are those of ``dist-lora``; only ``exec`` is left out. ``Starter(is_forking=False)`` executes the command instead.

Orphans fall to the process that looks after a command, so it knows of all that the command has started, and says when the
last has ended. Commands run side by side.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import IO, Any, NoReturn

from tests import ROOT

PR_SET_CHILD_SUBREAPER = 36
IMPORTED = (
    "dist_lora.cli", "dist_lora.train.command", "dist_lora.supervision.run_rank", "dist_lora.engines.fsdp2", "datasets",
    "transformers.convert_slow_tokenizer", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama", "tokenizers.implementations", "torch._dynamo",
    "torch.distributed._composable.fsdp",
)  # fmt: skip
FOR_ZERO3 = (
    "dist_lora.engines.zero3",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "torch._inductor.compile_fx",
)
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MAX_REQUEST_BYTES = 2**17
BY_COMMANDS = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # what ``dist-lora`` sets before torch is imported


@dataclass
class Start:
    """A command under way."""

    pid: int  # of the command: where it starts ranks, of their launcher
    _keeper: int  # the process that looks after it
    _answers: IO[bytes]

    def wait(self, timeout_s: float) -> int | None:
        """The command's exit code (negative: the signal that ended it) once all its processes have ended, or None."""
        ready, _, _ = select.select([self._answers], [], [], timeout_s)
        return int(self._answers.readline()) if ready else None

    def ranks(self) -> list[int]:
        """The processes that the launcher has started and not seen the end of."""
        return children_of(self.pid)

    def descendants(self) -> list[int]:
        """All processes of the command."""
        found = children_of(self._keeper)
        for pid in found:
            found += children_of(pid)
        return found

    def close(self) -> None:
        """End all that is left of the command, whatever it does."""
        while left := self.descendants():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self._answers.close()


class Starter:
    """Starts commands; ``close`` it."""

    def __init__(self, *, is_forking: bool = True, also_imported: Sequence[str] = ()) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.starter", str(theirs.fileno()), *(IMPORTED if is_forking else ()), *also_imported],
                cwd=ROOT, env=environment_of_tests() | BY_COMMANDS, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        self._is_forking = is_forking

    def start(
        self,
        *arguments: object,
        env: Mapping[str, str] = MappingProxyType({}),
        stdin: IO[Any] | None = None,
        stdout: IO[Any],
        stderr: IO[Any],
    ) -> Start:
        """``dist-lora ARGUMENTS`` in exactly this environment, with these files, and with nothing to read by default."""
        request = {"arguments": [*map(str, arguments)], "env": dict(env), "is_forking": self._is_forking}
        ours, theirs = socket.socketpair()
        with theirs, open(os.devnull) as nothing:
            files = [theirs.fileno(), (stdin or nothing).fileno(), stdout.fileno(), stderr.fileno()]
            socket.send_fds(self._requests, [json.dumps(request).encode()], files)
        with ours:
            answers = ours.makefile("rb", buffering=0)
        keeper, pid = (int(word) for word in answers.readline().split())
        return Start(pid, keeper, answers)

    def close(self) -> None:
        """End it; each command is closed by itself."""
        self._requests.close()  # it ends by that
        self._process.wait()


def environment_of_tests() -> dict[str, str]:
    """This process's environment, in which the tests' own modules are found."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def children_of(pid: int) -> list[int]:
    """The processes that ``pid`` has started, in order, whether they live or wait to be seen; none where it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


# The process that starts


def serve(requests: socket.socket, imported: Sequence[str]) -> None:
    """Start what is asked for, each with a process that looks after it, until nobody can ask any more."""
    for name in imported:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for those that look after the commands
    while True:
        request, files, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 4)
        if not request:
            break
        if not os.fork():
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _look_after(json.loads(request), files)
        for descriptor in files:
            os.close(descriptor)


def _look_after(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Fork the command; say its process id, and its exit code when nothing of it is left."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    answers, *standard = files
    command = os.fork()
    if not command:
        os.close(answers)
        _launch(request, standard)
    for descriptor in standard:
        os.close(descriptor)
    os.write(answers, f"{os.getpid()} {command}\n".encode())
    code = 0
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == command:
                code = os.waitstatus_to_exitcode(status)
    with suppress(BrokenPipeError):  # nobody waits any more
        os.write(answers, f"{code}\n".encode())
    os._exit(0)


def _launch(request: dict[str, Any], standard: list[int]) -> NoReturn:
    """Become the command."""
    os.setsid()
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if not request["is_forking"]:
        words = [sys.executable, "-m", "dist_lora", *request["arguments"]]
        os.execve(words[0], words, request["env"])
    from dist_lora.supervision import local_ranks

    local_ranks.subprocess = SimpleNamespace(Popen=_Forked, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[attr-defined]
    _become(request["arguments"], request["env"])


def _become(arguments: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Run the command in this process and end it as a process that was started for it ends."""
    from dist_lora.cli import main

    for number in ASKING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["dist-lora", *arguments]
    code: Any = 1
    try:
        _let_the_fault_in()
        main()
    except SystemExit as ended:
        code = ended.code or 0
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
            _become(self._arguments, self._env)


def _let_the_fault_in() -> None:
    """What ``inject/sitecustomize.py`` does in a rank that is a new process."""
    if {"RANK", "DIST_LORA_FAULT"} <= os.environ.keys():
        from tests.e2e import faults

        getattr(faults, os.environ["DIST_LORA_FAULT"])()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
