"""Commands started from a process that has the imports behind it: many starts in the time that imports alone would take.

``python -m tests.e2e.starter`` imports what a run imports, and then forks, for each command that it is asked for: a
process that looks after it, which forks the command, which forks its ranks. Signals, files, locks and the ranks' rendezvous
are those of ``dist-lora``; only ``exec`` is left out. ``Starter(())`` imports nothing, and executes the command instead. All workers
of pytest share one such process, and it forks the one that has DeepSpeed too.

Orphans fall to the process that looks after a command, so it knows of all that the command has started, and says when the
last has ended. Commands run side by side.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
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
from collections.abc import Callable, Mapping, Sequence
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
AT_START = dict(os.environ)
IMPORTING = {"PYTHONPATH": str(ROOT)}  # where the tests' own modules are found
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
    """Starts commands and functions; ``close`` it. The process behind it ends with the last that is closed.

    It imports ``imported``; where there is none yet ``grown_from`` forks it, with its own imports behind it.
    """

    def __init__(self, imported: Sequence[str], *, grown_from: Starter | None = None) -> None:
        self._is_forking = bool(imported)

        def begin(listening: socket.socket) -> None:
            if grown_from is not None:
                grown_from._ask({"imported": imported}, [listening.fileno()])
                return
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.starter", str(listening.fileno()), *imported],
                cwd=ROOT, env=AT_START | BY_COMMANDS | IMPORTING, stdin=subprocess.DEVNULL, pass_fds=[listening.fileno()],
            )  # fmt: skip

        self._requests = _connected(" ".join(imported), begin)

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
            self._ask(request, files)
        with ours:
            answers = ours.makefile("rb", buffering=0)
        keeper, pid = (int(word) for word in answers.readline().split())
        return Start(pid, keeper, answers)

    def call(self, function: Callable[..., None], *arguments: object, file: int) -> None:
        """``function(file, *arguments)``, of a module's top, in a fork with the environment that this process began in."""
        request = {"function": [function.__module__, function.__name__], "arguments": arguments, "env": AT_START}
        self._ask(request, [file])

    def _ask(self, request: Mapping[str, Any], files: Sequence[int]) -> None:
        socket.send_fds(self._requests, [json.dumps(request).encode()], files)

    def close(self) -> None:
        """Ask for no more; each command is closed by itself."""
        self._requests.close()


def _connected(kind: str, begin: Callable[[socket.socket], None]) -> socket.socket:
    """A connection with the process of this kind that serves this run of the tests; the first that asks begins it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
    digest = hashlib.sha256(kind.encode()).hexdigest()[:8]
    address = f"\0dist-lora-tests-{run}-{digest}"  # in no folder: it goes with the process
    is_ours = False
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(address)
            if connection.recv(1):
                return connection
        except ConnectionResetError:
            pass  # it ended as we came
        except ConnectionRefusedError:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
                try:
                    listening.bind(address)
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                else:
                    listening.listen()
                    begin(listening)
                    is_ours = True
            connection.close()
            continue
        connection.close()
        if is_ours:
            raise RuntimeError("the process that starts the tests' commands ended before it served: see its traceback")


def children_of(pid: int) -> list[int]:
    """The processes that ``pid`` has started, in order, whether they live or wait to be seen; none where it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


# The process that starts


def serve(listening: socket.socket, imported: Sequence[str]) -> None:
    """Start what is asked for, each with a process that looks after it, until nobody is there who could ask."""
    for name in imported:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for those that look after the commands
    connections: list[socket.socket] = []
    while True:
        for ready in select.select([listening, *connections], [], [])[0]:
            if ready is listening:
                connections.append(listening.accept()[0])
                connections[-1].send(b"+")
                continue
            try:
                request, files, _, _ = socket.recv_fds(ready, MAX_REQUEST_BYTES, 4)
            except ConnectionResetError:
                request, files = b"", []
            if not request:
                connections.remove(ready)
                ready.close()
                if not connections:
                    return
                continue
            if not os.fork():
                for inherited in (listening, *connections):
                    inherited.close()
                _begin(json.loads(request), files)
            for descriptor in files:
                os.close(descriptor)


def _begin(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Do in this new process what is asked for."""
    try:
        if "imported" in request:
            serve(socket.socket(fileno=files[0]), request["imported"])
        elif "function" in request:
            _take(request["env"])
            module, name = request["function"]
            getattr(importlib.import_module(module), name)(*files, *request["arguments"])
        else:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _look_after(request, files)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


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

    _take(env)
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


def _take(env: Mapping[str, str]) -> None:
    """This environment, and signals as a new process has them."""
    for number in (*ASKING, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)


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
