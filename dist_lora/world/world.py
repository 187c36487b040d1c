"""The processes of a run as one value: which rank this is, and how all ranks agree, wait and end together.

Waiting goes through a key-value store, never through a collective: no watchdog times out during a long phase
(tokenizing, loading, saving), and every rank notices within seconds that another has failed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from dist_lora.errors import EXIT_FAILED, EXIT_USER, ConfigError, DistLoraError, JoinError, RankError, exit_code_of
from dist_lora.layout.choices import check_node_size
from dist_lora.world.launcher import LaunchedRank
from dist_lora.world.progress import Progress
from dist_lora.world.rendezvous import (
    HEARD_S,
    RankInfo,
    address_of_store,
    open_store,
    rendezvous,
)

Result = TypeVar("Result")

FAILED_KEY = "failed"
POLL_S = 1.0  # how often the watch looks whether another rank has failed
GRACE_S = 5.0  # how long a rank has to end by itself once another has failed
PATIENCE_S = 8.0  # how long a rank with an error waits for the others, of which a lower one may have it too


class Watch(Protocol):
    """A thread that watches this rank until it ends."""

    def leave(self) -> None:
        """Stop watching: this rank is done."""


@dataclass
class World:
    """All processes of a run, seen from one of them. Made once by ``join`` (or ``alone``) and passed down."""

    world_rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: Any = None  # a torch.distributed.Store; None where this process is alone
    store_address: str = ""  # for messages
    failures: Any = None  # the store for failures, where ``store`` is a channel's
    watches: list[Watch] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)  # what this rank is doing, for its watches and errors
    stacks: Path | None = None  # where a hanging run writes its stacks, once it has a folder
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What waits for a server when it is closed: by the work at its end, else once an error has been reported."""
    _agreements: int = field(default=0, init=False)
    _num_keys: dict[str, int] = field(default_factory=dict, init=False)

    @staticmethod
    def alone(device: torch.device | None = None) -> World:
        """A world of one process, without store or process group."""
        return World(0, 1, 0, 1, device or default_device(0))

    def channel(self, name: str) -> World:
        """This world for another thread: its agreements and keys never collide with those of the main one.

        All ranks make it, each thread its own; ``name`` is used once in a run.
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
            store_address=self.store_address,
            failures=failures,
            progress=self.progress,
        )

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reports on behalf of all ranks."""
        return self.world_rank == 0

    @property
    def num_nodes(self) -> int:
        """How many nodes of ``local_size`` processes each there are."""
        return self.world_size // self.local_size

    def share(self, key: str, value: bytes) -> None:
        """Publish ``value`` under ``key`` to the other ranks; a key is used once in a run."""
        if self.store is not None:
            self.store.set(key, value)

    def fetch(self, key: str) -> bytes:
        """What another rank shared under ``key``; waits for it as long as no rank fails."""
        self.wait_for(key, what=f"the value of {key}")
        value: bytes = self.store.get(key)
        return value

    def wait_for(self, key: str, *, what: str) -> None:
        """Wait until ``key`` is shared, without a timeout.

        Raises:
            RankError: another rank has failed.
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
        """Continue only if all ranks do. All ranks call it; those without an error get the lowest failing rank's.

        A rank with an error waits for the others at most ``PATIENCE_S``: they may be busy for an hour.

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
        self._wait_until_heard(f"{prefix}/heard")
        if error is not None and self.world_rank == ranks[0]:
            raise error
        raise RankError(f"{stage}: rank {ranks[0]}: {first['message']}", exit_code=first["exit_code"])

    def agree_on(
        self, stage: str, action: Callable[[], Result], *, os_error: Callable[[OSError], DistLoraError] | None = None
    ) -> Result:
        """What ``action`` returns on this rank, once it has raised none of our errors on any rank. All ranks call it.

        Args:
            os_error: turns an ``OSError`` into one of our errors.

        Raises:
            what ``agree`` raises.
        """
        error: DistLoraError | None = None
        result: Result | None = None
        try:
            result = action()
        except DistLoraError as caught:
            error = caught
        except OSError as refused:
            if os_error is None:
                raise
            error = os_error(refused)
            error.__cause__ = refused
        self.agree(stage, error)
        return result  # type: ignore[return-value]  # where there is none, an error was raised

    def on_first(
        self, stage: str, action: Callable[[], Result], *, os_error: Callable[[OSError], DistLoraError] | None = None
    ) -> Result | None:
        """What ``action`` returns on rank 0, the only one to run it; None on the others. All ranks call it; see ``agree_on``."""
        return self.agree_on(stage, lambda: action() if self.is_first else None, os_error=os_error)

    def once(
        self, stage: str, action: Callable[[], bytes], *, os_error: Callable[[OSError], DistLoraError] | None = None
    ) -> bytes:
        """What ``action`` returns on rank 0, on all ranks. All ranks call it; see ``agree_on``."""
        return self._once_by(0, stage, action, os_error)

    def once_per_node(
        self, stage: str, action: Callable[[], bytes], *, os_error: Callable[[OSError], DistLoraError] | None = None
    ) -> bytes:
        """What ``action`` returns on the first rank of each node, on all ranks of that node. All ranks call it; see ``agree_on``."""
        return self._once_by(self.world_rank - self.local_rank, stage, action, os_error)

    def _once_by(
        self, owner: int, stage: str, action: Callable[[], bytes], os_error: Callable[[OSError], DistLoraError] | None
    ) -> bytes:
        key = f"{self.fresh_key('once')}/{owner}"

        def act() -> bytes:
            if self.world_rank != owner:
                return b""
            value = action()
            self.share(key, value)
            return value

        own = self.agree_on(stage, act, os_error=os_error)
        return own if self.world_rank == owner else self.fetch(key)

    @contextlib.contextmanager
    def probe(self, folder: Path, stage: str, *, os_error: Callable[[OSError], DistLoraError]) -> Iterator[Path]:
        """A file that rank 0 creates in ``folder``, to learn which ranks see it; it is removed at the end of the ``with``.

        All ranks call it; see ``agree_on``.
        """
        with contextlib.ExitStack() as created:

            def create() -> bytes:
                file = folder / f".probe-{uuid.uuid4().hex}"
                file.touch()
                created.callback(file.unlink, missing_ok=True)
                return file.name.encode()

            yield folder / self.once(stage, create, os_error=os_error).decode()

    def fresh_key(self, what: str) -> str:
        """A new key of the store for ``what``: all ranks ask for it equally often and get the same."""
        self._num_keys[what] = self._num_keys.get(what, 0) + 1
        return f"{what}/{self._num_keys[what]}"

    def _wait_until_heard(self, key: str) -> None:
        """Rank 0 may host the store: it returns once all ranks have read the failure."""
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
        """Tell all ranks that this one ends with ``error``; True on the first to fail, which reports its error."""
        if self.store is None:
            return True
        try:
            is_first = bool(self.store.add("failures", 1) == 1)
            if is_first:
                self.store.set(FAILED_KEY, _describe(error, self.world_rank))
            return is_first
        except RuntimeError:  # the store's host is gone: no rank is left to notify
            return True

    def failure_elsewhere(self) -> dict[str, Any] | None:
        """What another rank published when it failed, if one did."""
        if self.store is None:
            return None
        failures = self.failures or self.store
        try:
            if not failures.check([FAILED_KEY]):
                return None
            failure: dict[str, Any] = json.loads(failures.get(FAILED_KEY))
        except RuntimeError:
            return None
        return None if failure["world_rank"] == self.world_rank else failure

    def raise_if_another_failed(self, stage: str) -> None:
        """Raise ``RankError`` if another rank has failed."""
        failure = self.failure_elsewhere()
        if failure is not None:
            raise RankError(
                f"{stage}: rank {failure['world_rank']} failed: {failure['message']}", exit_code=failure["exit_code"]
            )

    def min(self, key: str, value: int) -> int:
        """The minimum of all ranks' values, on every rank; ``key`` is used once in a run. Not a collective."""
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
        """Whether any rank's ``flag`` is set. A collective of one byte on the hosts: no device is synchronized."""
        is_any = torch.tensor([flag], dtype=torch.uint8)
        if self.world_size > 1:
            dist.all_reduce(is_any, op=dist.ReduceOp.MAX)
        return bool(is_any)

    def stop_watches(self) -> None:
        """Stop watching the other ranks: this one ends by itself."""
        for watch in self.watches:
            watch.leave()

    def leave(self) -> None:
        """End this rank cleanly; the other ranks may still be running."""
        self.stop_watches()
        if dist.is_initialized():
            dist.destroy_process_group()


def _describe(error: BaseException, world_rank: int) -> str:
    exit_code = exit_code_of(error)
    message = str(error) if isinstance(error, DistLoraError) else f"{type(error).__name__}: {error}"
    return json.dumps(
        {"world_rank": world_rank, "host": socket.gethostname(), "message": message, "exit_code": exit_code}
    )


def default_device(local_rank: int) -> torch.device:
    """The GPU of this local rank, or the CPU where there is none; where two ranks get the same, ``rendezvous`` refuses."""
    if torch.cuda.is_available():
        # A single visible GPU may be each rank's own, as srun --gpus-per-task=1 gives them.
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def name_of_gpu(device: torch.device, environment: Mapping[str, str]) -> str:
    """What tells a GPU from all others, on any host; empty on a CPU."""
    if device.type != "cuda":
        return ""
    # A MIG slice has its GPU's uuid: ranks on several slices see them by different names.
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    slice_ = f" ({visible})" if "MIG-" in visible else ""
    return f"{torch.cuda.get_device_properties(device).uuid}{slice_}"


def device_bytes(world: World) -> int:
    """Memory of this rank's device in bytes; on a CPU the host's, divided by the ranks of the node."""
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total) // world.local_size


def computes_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16: NVIDIA's GPUs do from compute capability 8.0 on; CPUs and AMD's Instincts do."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def join(
    launched: LaunchedRank,
    environment: Mapping[str, str],
    *,
    collective_timeout_s: float,
    join_timeout_s: float,
    node_size: int | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    watches_failures: bool = True,
) -> World:
    """Join the rendezvous and start the process group (NCCL with GPUs, gloo without).

    Args:
        watches_failures: this process ends when another rank fails. It then returns once all are connected.
        settings: the config's, by full name; they must be the same on all ranks.

    Raises:
        JoinError: not all processes joined within ``join_timeout_s``, or they can't connect to each other.
        ConfigError: they differ in settings, versions or the number of processes per node.
        RankError: another rank reports one of these.
    """
    local_size = node_size or launched.local_size
    device = default_device(launched.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = open_store(launched, environment, timeout_s=join_timeout_s)
    info = RankInfo.of(launched, settings, gpu=name_of_gpu(device, environment))
    store = dist.PrefixStore(rendezvous(store, launched, info, timeout_s=join_timeout_s), store)
    store.set_timeout(timedelta(seconds=collective_timeout_s))  # from here on ranks wait for each other's work
    _check_node_size(launched, local_size)
    local_rank = launched.world_rank % local_size
    store = dist.PrefixStore("world", store)
    address = address_of_store(launched, environment)
    world = World(
        launched.world_rank, launched.world_size, local_rank, local_size, device, store, store_address=address
    )
    if watches_failures:
        watch = FailureWatch(world)
        world.watches.append(watch)
        watch.start()
    try:
        # gloo has a time limit of its own, and whoever doesn't watch the other ranks has one for the whole (doctor).
        has_limit = device.type != "cuda" or not watches_failures
        with contextlib.nullcontext() if has_limit else _Connecting(world, join_timeout_s):
            _connect(world, timeout_s=collective_timeout_s)
        if watches_failures:
            # One that ended while another still connects would look to it like one that crashed.
            world.agree("joining", None)
    except RankError:
        world.stop_watches()
        raise
    except (dist.DistError, RuntimeError) as error:
        world.stop_watches()
        refused = JoinError(f"the ranks can't connect to each other: {error}")
        if watches_failures and not world.fail(refused):
            raise RankError(str(refused)) from error
        raise refused from error
    return world


def _connect(world: World, *, timeout_s: float) -> None:
    """Start the process group; NCCL connects the GPUs now, not in the first collective, so that a dead link is seen here."""
    is_on_gpu = world.device.type == "cuda"
    if is_on_gpu:
        # NCCL's own monitor ends a process after 480 s (torch 2.13), before a hang is found and its rank named.
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(math.ceil(timeout_s) + 60))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_on_gpu else "gloo",
        store=dist.PrefixStore("collectives", world.store),
        rank=world.world_rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=world.device if is_on_gpu else None,
    )


class _Connecting(threading.Thread):
    """Ends this process if the ranks aren't connected in time: NCCL waits for a link or a port without a limit."""

    def __init__(self, world: World, timeout_s: float, *, end: Callable[[int], None] = os._exit) -> None:
        super().__init__(name="connecting", daemon=True)
        self._world, self._timeout_s, self._end = world, timeout_s, end
        self._is_connected = threading.Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *raised: object) -> None:
        self._is_connected.set()

    def run(self) -> None:
        """See the class."""
        if self._is_connected.wait(self._timeout_s):
            return
        world = self._world
        error = JoinError(
            f"rank {world.world_rank} of {world.world_size} on {socket.gethostname()} has joined, and isn't connected to "
            f"the others after {self._timeout_s:g} s: a firewall between the nodes, a wrong network interface or a dead link. "
            "Start again with NCCL_DEBUG=INFO, which names the interfaces; NCCL_SOCKET_IFNAME chooses one. "
            "dist-lora doctor under the same launcher measures each link. If connecting takes longer, raise parallel.join_timeout."
        )
        if world.fail(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        self._end(EXIT_FAILED)


def _check_node_size(launched: LaunchedRank, local_size: int) -> None:
    """All ranks find the same; rank 0 reports it."""
    try:
        check_node_size(world_size=launched.world_size, local_size=local_size)
    except ConfigError as error:
        if launched.world_rank:
            raise RankError(str(error), exit_code=EXIT_USER) from error
        raise


class FailureWatch(threading.Thread):
    """Checks once a second whether another rank has failed, and ends this process if it doesn't end by itself.

    A rank that waits in a collective for one that is gone may wait for minutes: it can't check by itself.
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
            failure = self._world.failure_elsewhere()
            if failure is None:
                continue
            if not self._stopped.wait(GRACE_S):
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.flush()
                self._end(int(failure["exit_code"]))
            return
