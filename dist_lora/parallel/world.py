"""The processes of a run as one value: who I am, and how all of us agree, wait and end together.

Waiting goes through a key-value store, never through a collective: no watchdog's timeout runs while a long
phase (tokenizing, loading, saving) lasts, and a rank that fails is seen by every other within seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dist_lora.errors import EXIT_FAILED, EXIT_USER, ConfigError, DistLoraError, JoinError, RankError, StopNow
from dist_lora.parallel.meeting import HEARD_S, Told, meet, meeting_place, open_store, versions_of_this_process
from dist_lora.parallel.place import Place
from dist_lora.parallel.progress import Progress
from dist_lora.plan.layout import check_node_size

FAILED_KEY = "failed"
POLL_S = 1.0  # how often the watch looks whether another rank has failed
GRACE_S = 5.0  # what a rank is given to end by itself once another has failed
PATIENCE_S = 8.0  # how long a rank with an error waits for the others, of which a lower one may have it too


class Watch(Protocol):
    """A thread that looks after this rank until it leaves."""

    def leave(self) -> None:
        """Stop: this rank is done."""


@dataclass
class World:
    """All processes of a run, seen from one of them. Made once by ``join`` (or ``alone``) and passed down."""

    world_rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: Any = None  # a torch.distributed.Store; None where this process is alone
    meets_at: str = ""  # where the store is, in words
    failures: Any = None  # the store in which failures are told, where ``store`` is a channel's
    watches: list[Watch] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)  # what this rank is at, for its watches and its errors
    stacks: Path | None = None  # the folder for the stacks of a run that hangs, once the run has a folder
    _agreements: int = field(default=0, init=False)

    @staticmethod
    def alone(device: torch.device | None = None) -> World:
        """A world of one process, without store or process group."""
        return World(0, 1, 0, 1, device or default_device(0))

    def channel(self, name: str) -> World:
        """This world for another thread: its agreements and keys never meet those of the main one.

        All ranks make it, each thread for itself; ``name`` is used once in a run.
        """
        if self.store is None:
            return self
        store = dist.PrefixStore(f"channel/{name}", self.store)
        failures = self.failures or self.store
        return World(
            self.world_rank,
            self.world_size,
            self.local_rank,
            self.local_size,
            self.device,
            store,
            meets_at=self.meets_at,
            failures=failures,
            progress=self.progress,
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.world_rank == 0

    @property
    def num_nodes(self) -> int:
        """How many nodes of ``local_size`` processes each there are."""
        return self.world_size // self.local_size

    def share(self, key: str, value: bytes) -> None:
        """Leave ``value`` under ``key`` for the other ranks; a key is used once in a run."""
        if self.store is not None:
            self.store.set(key, value)

    def fetch(self, key: str) -> bytes:
        """What another rank shared under ``key``; waits as long as that rank lives."""
        self.wait_for(key, what=f"the value of {key}")
        value: bytes = self.store.get(key)
        return value

    def wait_for(self, key: str, *, what: str) -> None:
        """Wait until ``key`` is shared, without a timeout.

        Raises:
            RankError: another rank failed meanwhile.
        """
        if self.store is None:
            return
        pause_s = 0.001
        with self.progress.waiting():
            while not self.store.check([key]):
                self.raise_if_another_failed(what)
                time.sleep(pause_s)
                pause_s = min(pause_s * 1.5, 0.1)

    def agree(self, stage: str, error: BaseException | None) -> None:
        """Go on only if all ranks do. All ranks call it; those without an error get the first one's.

        A rank with an error waits ``PATIENCE_S`` for the others, no longer: they may be busy for an hour.

        Raises:
            the caller's own ``error`` where it has one and no lower rank has, else ``RankError`` with the lowest
            failing rank's exit code.
        """
        number, self._agreements = self._agreements, self._agreements + 1
        if self.store is None:
            if error is not None:
                raise error
            return
        prefix = f"agree/{number}"
        if error is not None:
            self.store.set(f"{prefix}/error/{self.world_rank}", _describe(error, self.world_rank))
            self.store.add(f"{prefix}/errors", 1)
        if self.store.add(f"{prefix}/arrived", 1) == self.world_size:
            self.store.set(f"{prefix}/done", str(self.store.add(f"{prefix}/errors", 0)))
        if error is not None and not self._comes_soon(f"{prefix}/done"):
            raise error
        failed = int(self.fetch(f"{prefix}/done"))
        if not failed:
            return
        ranks = [r for r in range(self.world_size) if self.store.check([f"{prefix}/error/{r}"])]
        first = json.loads(self.store.get(f"{prefix}/error/{ranks[0]}"))
        self._let_others_hear(f"{prefix}/heard")
        if error is not None and self.world_rank == ranks[0]:
            raise error
        raise RankError(f"{stage}: rank {ranks[0]}: {first['message']}", exit_code=first["exit_code"])

    def agree_on(self, stage: str, action: Callable[[], object]) -> None:
        """Do this rank's part of a stage, and go on only if it did not fail by one of our errors on any. All ranks call it.

        Raises:
            what ``agree`` raises.
        """
        error: DistLoraError | None = None
        try:
            action()
        except DistLoraError as caught:
            error = caught
        self.agree(stage, error)

    def _let_others_hear(self, key: str) -> None:
        """The store may live in the first rank's process: that one goes once all have read what it is for."""
        num_heard = self.store.add(key, 1)
        deadline = time.monotonic() + HEARD_S
        while self.is_first and num_heard < self.world_size and time.monotonic() < deadline:
            time.sleep(0.01)
            num_heard = self.store.add(key, 0)

    def _comes_soon(self, key: str) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        with self.progress.waiting():
            while not self.store.check([key]):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.01)
        return True

    def fail(self, error: BaseException) -> bool:
        """Tell all ranks that this one ends by ``error``; True where it is the first, which prints its error."""
        if self.store is None:
            return True
        try:
            is_first = bool(self.store.add("failures", 1) == 1)
            if is_first:
                self.store.set(FAILED_KEY, _describe(error, self.world_rank))
            return is_first
        except RuntimeError:  # the store's host is gone: nobody is left to be told
            return True

    def failure_elsewhere(self) -> dict[str, Any] | None:
        """What another rank said when it failed, if one did."""
        if self.store is None:
            return None
        failures = self.failures or self.store
        try:
            if not failures.check([FAILED_KEY]):
                return None
            told: dict[str, Any] = json.loads(failures.get(FAILED_KEY))
        except RuntimeError:
            return None
        return None if told["world_rank"] == self.world_rank else told

    def raise_if_another_failed(self, stage: str) -> None:
        """Raise ``RankError`` if another rank has failed."""
        told = self.failure_elsewhere()
        if told is not None:
            raise RankError(
                f"{stage}: rank {told['world_rank']} failed: {told['message']}", exit_code=told["exit_code"]
            )

    def least(self, key: str, value: int) -> int:
        """The least of all ranks' values, on every rank; ``key`` is used once in a run. Waits in no collective."""
        if self.store is None:
            return value
        if not self.is_first:
            self.share(f"{key}/{self.world_rank}", str(value).encode())
            return int(self.fetch(key))
        others = [int(self.fetch(f"{key}/{rank}")) for rank in range(1, self.world_size)]
        least = min(value, *others) if others else value
        self.share(key, str(least).encode())
        return least

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of ``values`` over all ranks, in place. A collective: all ranks call it, in the same order."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank's ``flag`` is set; of the hosts alone, no device waits. A collective of one byte."""
        told = torch.tensor([flag], dtype=torch.uint8)
        if self.world_size > 1:
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told)

    def leave(self) -> None:
        """End this process's part cleanly; the other ranks may still be at work."""
        for watch in self.watches:
            watch.leave()
        if dist.is_initialized():
            dist.destroy_process_group()


def _describe(error: BaseException, world_rank: int) -> str:
    exit_code = error.exit_code if isinstance(error, DistLoraError | StopNow) else EXIT_FAILED
    message = str(error) if isinstance(error, DistLoraError) else f"{type(error).__name__}: {error}"
    return json.dumps(
        {"world_rank": world_rank, "host": socket.gethostname(), "message": message, "exit_code": exit_code}
    )


def default_device(local_rank: int) -> torch.device:
    """The GPU of this local rank, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def device_bytes(world: World) -> int:
    """Memory of this rank's device; on a CPU an equal part of what the machine has for each rank of the node."""
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total) // world.local_size


def join(
    place: Place,
    environment: Mapping[str, str],
    *,
    collective_timeout_s: float,
    join_timeout_s: float,
    node_size: int | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    ends_with_others: bool = True,
) -> World:
    """Meet the other processes and start the process group (NCCL with GPUs, gloo without).

    Args:
        ends_with_others: this process ends where another rank fails.
        settings: what the config says, by full name; it must be the same on all ranks.

    Where they end together, it returns once all are connected.

    Raises:
        JoinError: not all processes came within ``join_timeout_s``, or they can't reach each other.
        ConfigError: they differ in settings or versions, or are not as many on each node.
        RankError: another rank tells of one of these.
    """
    local_size = node_size or place.local_size
    device = default_device(place.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = open_store(place, environment, timeout_s=join_timeout_s)
    told = Told(socket.gethostname(), place.world_size, place.local_size, versions_of_this_process(), dict(settings))
    store = dist.PrefixStore(meet(store, place, told, timeout_s=join_timeout_s), store)
    store.set_timeout(timedelta(seconds=collective_timeout_s))  # from here on ranks wait for each other's work
    _check_node_size(place, local_size)
    local_rank = place.world_rank % local_size
    store = dist.PrefixStore("us", store)
    at = meeting_place(place, environment)
    world = World(place.world_rank, place.world_size, local_rank, local_size, device, store, meets_at=at)
    if ends_with_others:
        watch = FailureWatch(world)
        world.watches.append(watch)
        watch.start()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("collectives", store),
            rank=place.world_rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=collective_timeout_s),
        )
        if ends_with_others:
            # One that left while another still connects would look to it like one that crashed.
            world.agree("joining", None)
    except RankError:
        world.leave()
        raise
    except (dist.DistError, RuntimeError) as error:
        world.leave()
        refused = JoinError(f"the ranks can't reach each other to compute: {error}")
        if ends_with_others and not world.fail(refused):
            raise RankError(str(refused)) from error
        raise refused from error
    return world


def _check_node_size(place: Place, local_size: int) -> None:
    """All ranks find the same; the first tells."""
    try:
        check_node_size(world_size=place.world_size, local_size=local_size)
    except ConfigError as error:
        if place.world_rank:
            raise RankError(str(error), exit_code=EXIT_USER) from error
        raise


class FailureWatch(threading.Thread):
    """Looks once a second whether another rank has failed, and ends this process if it doesn't end by itself.

    A rank that waits in a collective for one that is gone may wait for minutes: it cannot look for itself.
    """

    def __init__(self, world: World, *, end: Callable[[int], None] = os._exit) -> None:
        super().__init__(name="failure-watch", daemon=True)
        self._world = world
        self._end = end
        self._stopped = threading.Event()

    def leave(self) -> None:
        """Stop watching: this rank is done."""
        self._stopped.set()

    def run(self) -> None:
        """See the class."""
        while not self._stopped.wait(POLL_S):
            told = self._world.failure_elsewhere()
            if told is None:
                continue
            if not self._stopped.wait(GRACE_S):
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.flush()
                self._end(int(told["exit_code"]))
            return
