"""Several gloo processes that stay alive and run one test's function after the other, each in a world of its own.

They are forked from a process that has the imports behind it, and a pool is shared by many tests. A function that is to
run on the ranks lies at the top of its test module and takes the ``World`` first.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import select
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.e2e.runs import starter_of

TIMEOUT_S = 120


class RankFailed(AssertionError):
    """A rank's function raised; the message is its traceback, ``kinds`` the class names of all ranks' errors."""

    def __init__(self, errors: list[tuple[str, str, str] | None]) -> None:
        self.kinds = [error[0] if error else "" for error in errors]
        self.texts = [error[1] if error else "" for error in errors]
        super().__init__("\n".join(f"rank {i}: {error[2]}" for i, error in enumerate(errors) if error))


class Ranks:
    """``size`` processes; ``run`` calls a function on all of them and returns what each returned."""

    def __init__(self, size: int) -> None:
        self.size = size
        starter = starter_of(True, True)
        self._pipes: list[Connection] = []
        self._processes: list[int] = []
        for rank in range(size):
            ours, theirs = socket.socketpair()
            with theirs:
                starter.call(_serve, rank, size, file=theirs.fileno())
            self._pipes.append(Connection(ours.detach()))
            self._pipes[-1].send(bytes(mp.current_process().authkey))
            self._processes.append(os.pidfd_open(self._pipes[-1].recv()))

    def run(
        self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60, node_size: int | None = None
    ) -> list[Any]:
        """The results of all ranks, in order, in nodes of ``node_size`` (one node). Raises ``RankFailed`` if any raised."""
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self._pipes:
                pipe.send((str(Path(folder) / "rendezvous"), function, arguments, timeout_s, node_size))
            answers = []
            for rank, pipe in enumerate(self._pipes):
                assert pipe.poll(TIMEOUT_S), f"rank {rank} gave no answer within {TIMEOUT_S} s"
                answers.append(pipe.recv())
        if any(error for _, error in answers):
            raise RankFailed([error for _, error in answers])
        return [value for value, _ in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if not select.select([process], [], [], 5)[0]:
                signal.pidfd_send_signal(process, signal.SIGKILL)
            os.close(process)


def _serve(file: int, rank: int, size: int) -> None:
    pipe = Connection(file)
    mp.current_process().authkey = pipe.recv()  # tensors are passed by files that only who knows it gets
    pipe.send(os.getpid())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    from dist_lora.world.launcher import LaunchedRank
    from dist_lora.world.world import World, join

    while True:
        try:
            rendezvous, function, arguments, timeout_s, node_size = pipe.recv()
        except EOFError:
            return
        error: tuple[str, str, str] | None = None
        value = None
        world = World.alone()
        try:
            world = join(
                LaunchedRank(rank, size, rank, size),
                {"DIST_LORA_RENDEZVOUS": rendezvous},
                collective_timeout_s=timeout_s,
                join_timeout_s=timeout_s,
                node_size=node_size,
            )
            value = function(world, *arguments)
        except BaseException as caught:
            error = (type(caught).__name__, str(caught), traceback.format_exc())
        world.leave()
        pipe.send((value, error))
