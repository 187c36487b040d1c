"""The rendezvous of a run's processes: all join in time and match, or an error says which are missing or differ.

It goes through a key-value store. torchrun hands the same store to workers that it restarts, so what an earlier attempt
left there must be distinguished from what is new: each process brings a nonce, and rank 0 begins once every rank has
acknowledged a call that carries its nonce.
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
from dist_lora.text import count
from dist_lora.world.launcher import LaunchedRank

POLL_S = 0.1
HEARD_S = 3.0  # how long rank 0 stays for the others to hear why it ends: it may host the store
LATE_S = 5.0  # how much later than the others rank 0's time limit may begin
PACKAGES = ("transformers", "deepspeed", "bitsandbytes", "safetensors")


@dataclass(frozen=True)
class RankInfo:
    """What a process publishes about itself, for rank 0 to compare."""

    host: str
    world_size: int
    local_size: int
    versions: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    gpu: str = ""  # what tells its GPU from all others; empty on a CPU

    @staticmethod
    def of(launched: LaunchedRank, settings: Mapping[str, Any], *, gpu: str) -> RankInfo:
        """The info of this process."""
        versions = versions_of_this_process()
        return RankInfo(socket.gethostname(), launched.world_size, launched.local_size, versions, dict(settings), gpu)


@functools.cache
def versions_of_this_process() -> dict[str, str]:
    """The versions that must be the same on all nodes, by name; ``code`` is a digest of this package's own source."""
    versions = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "dist_lora": dist_lora.__version__,
    }
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    digest = xxhash.xxh3_64()
    root = Path(dist_lora.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return versions | {"code": digest.hexdigest()}


def open_store(launched: LaunchedRank, environment: Mapping[str, str], *, timeout_s: float) -> Any:
    """The key-value store of all processes.

    Raises:
        ConfigError: the launcher hasn't set its address.
        JoinError: it can't be opened, or doesn't answer in time; RankError on a node's other ranks.
    """
    if launched.world_size == 1:
        return dist.HashStore()
    file = environment.get("DIST_LORA_RENDEZVOUS")
    if file:
        return dist.FileStore(file, launched.world_size)
    host, port = launched.rendezvous or _master_address(environment)
    # torchrun's agent hosts the store, or leaves it to rank 0.
    is_host = launched.world_rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(
            host,
            port,
            launched.world_size,
            is_master=is_host,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=is_host,
        )
    except (dist.DistError, RuntimeError) as error:
        if is_host:
            raise JoinError(
                f"rank 0 can't open the store at {host}:{port}: {_first_line(error)}. Does another run use that port (then "
                f"set MASTER_PORT to another), and is {host} an address of {socket.gethostname()}?"
            ) from error
        if launched.local_rank:
            raise RankError(f"rank {launched.world_rank} got no answer from {host}:{port}") from error
        raise JoinError(
            f"rank 0 doesn't answer at {host}:{port} within {timeout_s:g} s: {_first_line(error)}. "
            f"Is the first node started, is {host} its name here, and can this node reach that port?"
        ) from error


def address_of_store(launched: LaunchedRank, environment: Mapping[str, str]) -> str:
    """Where the store of all processes is, for messages."""
    file = environment.get("DIST_LORA_RENDEZVOUS")
    if launched.world_size == 1 or file:
        return file or "this process"
    return "{}:{}".format(*(launched.rendezvous or _master_address(environment)))


def _master_address(environment: Mapping[str, str]) -> tuple[str, int]:
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"MASTER_ADDR is {host or 'not set'} and MASTER_PORT is {port or 'not set'}, expected the first node's name "
            "and a port: RANK says that a launcher started this process, and it sets both. Start with torchrun, deepspeed, "
            "accelerate launch or srun, or unset RANK to start local ranks."
        )
    return host, int(port)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def rendezvous(store: Any, launched: LaunchedRank, info: RankInfo, *, timeout_s: float) -> str:
    """Wait until all have joined and match; returns a name of this rendezvous, a prefix for keys that are new in the store.

    All processes call it.

    Raises:
        JoinError: some haven't joined within ``timeout_s``, or two claim to be the same rank.
        ConfigError: they don't match.
        RankError: another rank has raised one of these, which is reported once.
    """
    attempt = _Rendezvous(dist.PrefixStore("rendezvous", store), launched, info, timeout_s)
    try:
        return attempt.lead() if launched.world_rank == 0 else attempt.follow()
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, RankError):
            raise
        kind = RankError if launched.local_rank else JoinError
        raise kind(f"the store of the rendezvous is gone, and so is rank 0: {_first_line(error)}") from error


class _Rendezvous:
    """Rank 0 reads the infos of all ranks, publishes a call with their nonces, and begins once all have acknowledged it."""

    def __init__(self, store: Any, launched: LaunchedRank, info: RankInfo, timeout_s: float) -> None:
        self._store, self._launched, self._info, self._timeout_s = store, launched, info, timeout_s
        self._nonce = uuid.uuid4().hex
        store.set(f"info/{launched.world_rank}", json.dumps({"nonce": self._nonce, "info": vars(info)}))

    def lead(self) -> str:
        """Rank 0's part."""
        ranks = range(self._launched.world_size)
        deadline = time.monotonic() + self._timeout_s
        infos: dict[int, dict[str, Any]] = {}
        acked: set[int] = set()
        name, pause_s = "", 0.001
        while True:
            for rank in set(ranks) - acked:
                published = self._get(f"info/{rank}")
                if published is not None and published != infos.get(rank):
                    infos[rank], name = published, ""
            if not name and len(infos) == len(ranks):
                name, acked = uuid.uuid4().hex, {0}
                self._store.set("call", json.dumps({"name": name, "nonces": [infos[r]["nonce"] for r in ranks]}))
            acked |= {rank for rank in set(ranks) - acked if name and self._get(f"ack/{rank}") == name}
            if len(acked) == len(ranks):
                break
            self._raise_if_twice()
            if time.monotonic() > deadline:
                # A rank whose info is there but that doesn't acknowledge a call is missing: the info is an earlier attempt's.
                present = {rank: infos[rank]["info"]["host"] for rank in (acked if name else infos)}
                self._publish("missing", "", infos, num_others=len(present) - 1)
                raise JoinError(missing_text(present, self._launched, self._timeout_s))
            pause_s = _rest(pause_s)
        all_infos = [RankInfo(**infos[rank]["info"]) for rank in ranks]
        differences = differences_of(all_infos) or shared_gpus(all_infos)
        self._publish("refused" if differences else "begun", name, infos, num_others=len(ranks) - 1)
        if differences:
            raise ConfigError(differences)
        return name

    def follow(self) -> str:
        """Any other rank's part."""
        deadline = time.monotonic() + self._timeout_s
        acked, has_waited_for_first, pause_s = "", False, 0.001
        while True:
            call = self._get("call")
            is_meant = call is not None and self._nonce in call["nonces"]
            if is_meant and call["name"] != acked:
                acked = call["name"]
                self._store.set(f"ack/{self._launched.world_rank}", json.dumps(acked))
            outcome = self._get("outcome")
            if outcome is not None and self._nonce in outcome["nonces"]:
                self._store.add(f"heard/{outcome['id']}", 1)
                if outcome["kind"] == "begun":
                    return str(outcome["name"])
                # If another rank of its node exits earlier, a launcher ends rank 0 before it has reported; a request to
                # stop that this rank then gets changes nothing.
                with contextlib.suppress(StopNow):
                    time.sleep(HEARD_S)
                code = EXIT_USER if outcome["kind"] == "refused" else EXIT_FAILED
                raise RankError("rank 0 has reported why the run doesn't begin", exit_code=code)
            self._raise_if_twice()
            if time.monotonic() > deadline:
                present = {rank: published["info"]["host"] for rank in range(self._launched.world_size)
                           if (published := self._get(f"info/{rank}")) is not None}  # fmt: skip
                if 0 in present and not has_waited_for_first:  # its time limit began when it joined
                    deadline, has_waited_for_first = time.monotonic() + self._timeout_s + LATE_S, True
                elif min(present) == self._launched.world_rank:
                    raise JoinError(missing_text(present, self._launched, self._timeout_s))
                else:
                    raise RankError("the lowest rank that has joined reports which are missing")
            pause_s = _rest(pause_s)

    def _publish(self, kind: str, name: str, infos: Mapping[int, dict[str, Any]], *, num_others: int) -> None:
        """Publish the outcome; if this process then ends, wait until the others have read it: it may host the store."""
        outcome = {
            "id": uuid.uuid4().hex,
            "kind": kind,
            "name": name,
            "nonces": [published["nonce"] for published in infos.values()],
        }
        self._store.set("outcome", json.dumps(outcome))
        deadline = time.monotonic() + HEARD_S
        while kind != "begun" and time.monotonic() < deadline:
            if self._store.add(f"heard/{outcome['id']}", 0) >= num_others:
                return
            time.sleep(POLL_S)

    def _raise_if_twice(self) -> None:
        published = self._get(f"info/{self._launched.world_rank}")
        if published is not None and published["nonce"] != self._nonce:
            raise JoinError(
                f"two processes claim to be rank {self._launched.world_rank} of {self._launched.world_size}: one on "
                f"{self._info.host}, one on {published['info']['host']}. Give each node its own node rank, and each run "
                "its own address or port."
            )

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


def _rest(pause_s: float) -> float:
    time.sleep(pause_s)
    return min(pause_s * 1.5, POLL_S)


def missing_text(hosts: Mapping[int, str], launched: LaunchedRank, timeout_s: float) -> str:
    """Which ranks are missing, of which nodes, and which have joined; ``hosts`` are the hosts of those."""
    size, per_node = launched.world_size, launched.local_size
    missing = [rank for rank in range(size) if rank not in hosts]
    nodes: dict[int, list[int]] = {}
    for rank in missing:
        nodes.setdefault(rank // per_node, []).append(rank)
    num_nodes = -(-size // per_node)
    absent = [node for node, ranks in nodes.items() if len(ranks) == min(per_node, size - node * per_node)]
    num_joined = (
        f"{num_nodes - len(absent)} of {num_nodes} nodes"
        if absent and num_nodes > 1
        else f"{len(hosts)} of {count(size, 'process', 'processes')}"
    )
    of_nodes = ""
    if absent and len(absent) == len(nodes) and num_nodes > 1:
        of_nodes = f" (node{'s' if len(absent) > 1 else ''} {_list(absent)})"
    by_host: dict[str, list[int]] = {}
    for rank in sorted(hosts):
        by_host.setdefault(hosts[rank], []).append(rank)
    joined = "; ".join(f"{_ranks(ranks)} on {host}" for host, ranks in by_host.items())
    return (
        f"{num_joined} joined within {timeout_s:g} s: missing {_ranks(missing)}{of_nodes}. Joined: {joined}. "
        "Is every node started, by the same command, with the same address, port and numbers of nodes and processes? "
        "If starting takes longer, raise parallel.join_timeout."
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_list(ranks)}"


def _list(numbers: Sequence[int]) -> str:
    """``0, 1, 4-7``: three or more consecutive numbers are a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def differences_of(infos: Sequence[RankInfo]) -> str:
    """What differs from rank 0, host by host; empty where all ranks match."""
    first = infos[0]
    ranks_by_difference: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for rank, other in enumerate(infos):
        differences = tuple(_differences(other, first))
        if differences:
            ranks_by_difference.setdefault((other.host, differences), []).append(rank)
    if not ranks_by_difference:
        return ""
    lines = [f"  {host} ({_ranks(ranks)}): {'; '.join(texts)}" for (host, texts), ranks in ranks_by_difference.items()]
    return (
        f"the processes of this run don't match. Different from {first.host} (rank 0):\n"
        + "\n".join(lines)
        + "\nGive every node the same installation, config and arguments, and the same number of processes."
    )


def shared_gpus(infos: Sequence[RankInfo]) -> str:
    """Which ranks have the same GPU; empty where each has its own."""
    ranks_by_gpu: dict[str, list[int]] = {}
    for rank, info in enumerate(infos):
        if info.gpu:
            ranks_by_gpu.setdefault(info.gpu, []).append(rank)
    shared = {gpu: ranks for gpu, ranks in ranks_by_gpu.items() if len(ranks) > 1}
    if not shared:
        return ""
    lines = [f"  {_ranks(ranks)} on {infos[ranks[0]].host}: {gpu}" for gpu, ranks in shared.items()]
    return (
        "several ranks have the same GPU, and each needs one of its own:\n"
        + "\n".join(lines)
        + "\nStart one rank per GPU, and see that each sees its own (CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1)."
    )


def _differences(other: RankInfo, first: RankInfo) -> list[str]:
    lines = []
    if other.world_size != first.world_size:
        lines.append(f"expects {count(other.world_size, 'process', 'processes')}, not {first.world_size}")
    if other.local_size != first.local_size:
        lines.append(f"{count(other.local_size, 'process', 'processes')} on this node, not {first.local_size}")
    for own, wanted in ((other.versions, first.versions), (other.settings, first.settings)):
        for name in sorted(own.keys() | wanted.keys()):
            if own.get(name) != wanted.get(name):
                lines.append(_difference(name, own.get(name), wanted.get(name)))
    return lines


def _difference(name: str, own: Any, wanted: Any) -> str:
    if name == "code":
        return "dist_lora's own source files differ"
    return f"{name} is {own!r}, not {wanted!r}" if not isinstance(own, str) else f"{name} is {own}, not {wanted}"
