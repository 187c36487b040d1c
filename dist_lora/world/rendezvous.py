"""Where the processes of a run meet: within a time all are there, alike, or it is said who is missing or differs.

They meet in a key-value store. torchrun hands the same store to the workers that it starts again, so what an earlier attempt
has left there is told from what is new: each process brings a nonce, and the first rank begins when all have answered
to theirs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

import dist_lora
from dist_lora.errors import EXIT_FAILED, EXIT_USER, ConfigError, JoinError, RankError, StopNow
from dist_lora.world.launcher import Place

POLL_S = 0.1
HEARD_S = 3.0  # how long the first rank stays, for the others to hear why it ends: the store may be its own
LATE_S = 5.0  # how much later than the others the first rank may begin to count
PACKAGES = ("transformers", "deepspeed", "bitsandbytes", "safetensors")


@dataclass(frozen=True)
class Told:
    """What a process says of itself, for the first rank to compare."""

    host: str
    world_size: int
    local_size: int
    versions: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)


@functools.cache
def versions_of_this_process() -> dict[str, str]:
    """What must be the same on all nodes, by name; ``code`` is a digest of this package's own source."""
    found = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "dist_lora": dist_lora.__version__,
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    digest = xxhash.xxh3_64()
    root = Path(dist_lora.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return found | {"code": digest.hexdigest()}


def open_store(place: Place, environment: Mapping[str, str], *, timeout_s: float) -> Any:
    """The store of all processes.

    Raises:
        ConfigError: the launcher has not said where they meet.
        JoinError: it can't be opened, or nobody answers there within the time; RankError on a node's other ranks.
    """
    if place.world_size == 1:
        return dist.HashStore()
    file = environment.get("DIST_LORA_RENDEZVOUS")
    if file:
        return dist.FileStore(file, place.world_size)
    host, port = place.rendezvous or _address(environment)
    # torchrun's agent keeps the store, or leaves it to the first rank.
    is_host = place.world_rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(
            host,
            port,
            place.world_size,
            is_master=is_host,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=is_host,
        )
    except (dist.DistError, RuntimeError) as error:
        if is_host:
            raise JoinError(
                f"rank 0 can't be met at {host}:{port}: {_first_line(error)}. Is another run at that port (then set "
                f"MASTER_PORT to another), and is {host} an address of {socket.gethostname()}?"
            ) from error
        if place.local_rank:
            raise RankError(f"rank {place.world_rank} found nobody at {host}:{port}") from error
        raise JoinError(
            f"nobody answers at {host}:{port}, where rank 0 is to be met, within {timeout_s:g} s: {_first_line(error)}. "
            f"Is the first node started, is {host} its name here, and may this node reach that port?"
        ) from error


def meeting_place(place: Place, environment: Mapping[str, str]) -> str:
    """Where the store of all processes is, in words."""
    file = environment.get("DIST_LORA_RENDEZVOUS")
    if place.world_size == 1 or file:
        return file or "this process"
    return "{}:{}".format(*(place.rendezvous or _address(environment)))


def _address(environment: Mapping[str, str]) -> tuple[str, int]:
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"MASTER_ADDR is {host or 'not set'} and MASTER_PORT is {port or 'not set'}, expected the first node's name "
            "and a port: RANK says that a launcher started this process, and it sets both. Start by torchrun, deepspeed, "
            "accelerate launch or srun, or unset RANK to start local ranks."
        )
    return host, int(port)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def meet(store: Any, place: Place, told: Told, *, timeout_s: float) -> str:
    """Wait until all are there and alike; returns a name for this meeting, under which nothing in the store is old.

    All processes call it.

    Raises:
        JoinError: some have not come within ``timeout_s``, or two say they are the same rank.
        ConfigError: they are not alike.
        RankError: another rank has raised one of these, which is told once.
    """
    meeting = _Meeting(dist.PrefixStore("meeting", store), place, told, timeout_s)
    try:
        return meeting.lead() if place.world_rank == 0 else meeting.follow()
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, RankError):
            raise
        kind = RankError if place.local_rank else JoinError
        raise kind(f"the store in which the ranks meet is gone, as rank 0 is: {_first_line(error)}") from error


class _Meeting:
    """The first rank reads what all say, calls them by their nonces, and begins once all have nodded."""

    def __init__(self, store: Any, place: Place, told: Told, timeout_s: float) -> None:
        self._store, self._place, self._told, self._timeout_s = store, place, told, timeout_s
        self._nonce = uuid.uuid4().hex
        store.set(f"told/{place.world_rank}", json.dumps({"nonce": self._nonce, "told": vars(told)}))

    def lead(self) -> str:
        """The first rank's part."""
        ranks = range(self._place.world_size)
        deadline = time.monotonic() + self._timeout_s
        told: dict[int, dict[str, Any]] = {}
        nodded: set[int] = set()
        name, pause_s = "", 0.001
        while True:
            for rank in set(ranks) - nodded:
                found = self._get(f"told/{rank}")
                if found is not None and found != told.get(rank):
                    told[rank], name = found, ""
            if not name and len(told) == len(ranks):
                name, nodded = uuid.uuid4().hex, {0}
                self._store.set("called", json.dumps({"name": name, "nonces": [told[r]["nonce"] for r in ranks]}))
            nodded |= {rank for rank in set(ranks) - nodded if name and self._get(f"nod/{rank}") == name}
            if len(nodded) == len(ranks):
                break
            self._raise_if_twice()
            if time.monotonic() > deadline:
                # Who has said something and doesn't nod when called is not there: it was an earlier attempt's.
                present = {rank: told[rank]["told"]["host"] for rank in (nodded if name else told)}
                self._publish("missing", "", told, num_others=len(present) - 1)
                raise JoinError(missing_text(present, self._place, self._timeout_s))
            pause_s = _rest(pause_s)
        differences = differences_of([Told(**told[rank]["told"]) for rank in ranks])
        self._publish("refused" if differences else "begun", name, told, num_others=len(ranks) - 1)
        if differences:
            raise ConfigError(differences)
        return name

    def follow(self) -> str:
        """The part of any other rank."""
        deadline = time.monotonic() + self._timeout_s
        nodded, has_waited_for_first, pause_s = "", False, 0.001
        while True:
            called = self._get("called")
            is_meant = called is not None and self._nonce in called["nonces"]
            if is_meant and called["name"] != nodded:
                nodded = called["name"]
                self._store.set(f"nod/{self._place.world_rank}", json.dumps(nodded))
            outcome = self._get("outcome")
            if outcome is not None and self._nonce in outcome["nonces"]:
                self._store.add(f"heard/{outcome['id']}", 1)
                if outcome["kind"] == "begun":
                    return str(outcome["name"])
                # A launcher ends the first rank before it has told, where another one of its node ends earlier; what
                # it then asks of this one changes nothing.
                with contextlib.suppress(StopNow):
                    time.sleep(HEARD_S)
                code = EXIT_USER if outcome["kind"] == "refused" else EXIT_FAILED
                raise RankError("rank 0 has told why the ranks don't begin", exit_code=code)
            self._raise_if_twice()
            if time.monotonic() > deadline:
                present = {rank: found["told"]["host"] for rank in range(self._place.world_size)
                           if (found := self._get(f"told/{rank}")) is not None}  # fmt: skip
                if 0 in present and not has_waited_for_first:  # it began to count when it came
                    deadline, has_waited_for_first = time.monotonic() + self._timeout_s + LATE_S, True
                elif min(present) == self._place.world_rank:
                    raise JoinError(missing_text(present, self._place, self._timeout_s))
                else:
                    raise RankError("the lowest rank that is there tells who is missing")
            pause_s = _rest(pause_s)

    def _publish(self, kind: str, name: str, told: Mapping[int, dict[str, Any]], *, num_others: int) -> None:
        """Let the others know the outcome, and stay until they do where this process then ends: the store may be its own."""
        outcome = {
            "id": uuid.uuid4().hex,
            "kind": kind,
            "name": name,
            "nonces": [each["nonce"] for each in told.values()],
        }
        self._store.set("outcome", json.dumps(outcome))
        deadline = time.monotonic() + HEARD_S
        while kind != "begun" and time.monotonic() < deadline:
            if self._store.add(f"heard/{outcome['id']}", 0) >= num_others:
                return
            time.sleep(POLL_S)

    def _raise_if_twice(self) -> None:
        found = self._get(f"told/{self._place.world_rank}")
        if found is not None and found["nonce"] != self._nonce:
            raise JoinError(
                f"two processes say that they are rank {self._place.world_rank} of {self._place.world_size}: one on "
                f"{self._told.host}, one on {found['told']['host']}. Give each node a node rank of its own, and each run "
                "an address or port of its own."
            )

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


def _rest(pause_s: float) -> float:
    time.sleep(pause_s)
    return min(pause_s * 1.5, POLL_S)


def missing_text(hosts: Mapping[int, str], place: Place, timeout_s: float) -> str:
    """Who has not come, of which nodes, and who has; ``hosts`` are those of the ranks that are there."""
    size, per_node = place.world_size, place.local_size
    missing = [rank for rank in range(size) if rank not in hosts]
    nodes: dict[int, list[int]] = {}
    for rank in missing:
        nodes.setdefault(rank // per_node, []).append(rank)
    num_nodes = -(-size // per_node)
    whole = [node for node, ranks in nodes.items() if len(ranks) == min(per_node, size - node * per_node)]
    there = (
        f"{num_nodes - len(whole)} of {num_nodes} nodes"
        if whole and num_nodes > 1
        else f"{len(hosts)} of {size} processes"
    )
    of_nodes = f" (those of node {_list([*whole])})" if whole and len(whole) == len(nodes) and num_nodes > 1 else ""
    by_host: dict[str, list[int]] = {}
    for rank in sorted(hosts):
        by_host.setdefault(hosts[rank], []).append(rank)
    joined = "; ".join(f"{_ranks(ranks)} on {host}" for host, ranks in by_host.items())
    return (
        f"{there} joined within {timeout_s:g} s: missing {_ranks(missing)}{of_nodes}. Here are {joined}. "
        "Is every node started, by the same command, with the same address, port and numbers of nodes and processes? "
        "Where starting takes longer, raise parallel.join_timeout."
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_list(ranks)}"


def _list(numbers: Sequence[int]) -> str:
    """``0, 1, 4-7``: three and more in a row are a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def differences_of(told: Sequence[Told]) -> str:
    """What is not the same on all ranks, host by host, against rank 0; empty where all are alike."""
    first = told[0]
    found: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for rank, other in enumerate(told):
        lines = tuple(_differences(other, first))
        if lines:
            found.setdefault((other.host, lines), []).append(rank)
    if not found:
        return ""
    told_of = [f"  {host} ({_ranks(ranks)}): {'; '.join(each)}" for (host, each), ranks in found.items()]
    return (
        f"not all processes of this run are alike. Other than on {first.host} (rank 0):\n"
        + "\n".join(told_of)
        + "\nGive every node the same installation, config and arguments, and the same number of processes."
    )


def _differences(other: Told, first: Told) -> list[str]:
    lines = []
    if other.world_size != first.world_size:
        lines.append(f"counts on {other.world_size} processes, not {first.world_size}")
    if other.local_size != first.local_size:
        lines.append(f"{other.local_size} processes on this node, not {first.local_size}")
    for here, there in ((other.versions, first.versions), (other.settings, first.settings)):
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                lines.append(_difference(name, here.get(name), there.get(name)))
    return lines


def _difference(name: str, here: Any, there: Any) -> str:
    if name == "code":
        return "dist_lora's own files are others"
    return f"{name} is {here!r}, not {there!r}" if not isinstance(here, str) else f"{name} is {here}, not {there}"
