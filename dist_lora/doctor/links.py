"""Bandwidth between ranks: all-gather and all-reduce along each axis of the mesh, and each link of its rings."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dist_lora.world.world import World

AxisName = Literal["within a node", "between nodes", "over all ranks"]
Kind = Literal["all-gather", "all-reduce"]
SIZES = tuple(2**power for power in (20, 22, 24, 26, 28))  # bytes of the whole tensor: from part of a layer to a layer
SMALL_BYTES = 1024
REPEATS = 5
MOST_S = 0.5  # how long a collective may take: sizes that would take longer are skipped
PAIR_S = 0.2  # about how long a message of a ring takes


@dataclass(frozen=True)
class AxisRate:
    """Bytes per second that a rank receives in a collective, counted as a ring, from slow to fast over sizes and repeats.

    The slowest repeat of each size is dropped. ``latency_s`` is the time of a small one. All times are the slowest rank's.
    """

    kind: Kind
    axis: AxisName
    num_ranks: int
    bytes_per_s: tuple[float, float]
    latency_s: float
    by_size: tuple[tuple[int, tuple[float, float]], ...]  # the same for each size, in bytes of the whole tensor


@dataclass(frozen=True)
class PairRate:
    """One link of a ring, while all links of the ring are in use."""

    axis: AxisName
    sender: int
    receiver: int
    sender_host: str
    receiver_host: str
    bytes_per_s: float

    def __str__(self) -> str:
        return f"from rank {self.sender} on {self.sender_host} to rank {self.receiver} on {self.receiver_host}"


def axes_of(world: World) -> dict[AxisName, dist.ProcessGroup | None]:
    """The groups in which an engine's collectives run; None is the group of all ranks. All ranks call it."""
    if world.num_nodes == 1:
        return {"within a node": None}
    if world.local_size == 1:
        return {"between nodes": None}
    mesh = init_device_mesh(world.device.type, (world.num_nodes, world.local_size), mesh_dim_names=("node", "shard"))
    return {
        "within a node": mesh.get_group("shard"),
        "between nodes": mesh.get_group("node"),
        "over all ranks": None,
    }


def measure_links(world: World, *, hosts: Sequence[str]) -> tuple[list[AxisRate], list[PairRate]]:
    """Collectives by axis, and the links of each axis' rings; all ranks call it and get the same. Takes some seconds.

    Args:
        hosts: of each rank.

    Raises:
        RuntimeError: a collective failed, or timed out.
    """
    rates, pairs = [], []
    for axis, group in axes_of(world).items():
        gathered = _rate("all-gather", axis, group, world)
        rates += [gathered, _rate("all-reduce", axis, group, world)]
        if axis != "over all ranks":
            num_bytes = int(gathered.bytes_per_s[1] * PAIR_S)
            pairs += _ring(axis, group, world, hosts, num_bytes=min(max(num_bytes, 2**16), 2**26))
    return rates, pairs


def _rate(kind: Kind, axis: AxisName, group: dist.ProcessGroup | None, world: World) -> AxisRate:
    size = dist.get_world_size(group)
    received = (size - 1) / size * (2 if kind == "all-reduce" else 1)
    small = _times(_collective(kind, SMALL_BYTES, size, group, world.device), 4 * REPEATS, world)
    latency_s = statistics.median(small)
    by_size: list[tuple[int, tuple[float, float]]] = []
    for num_bytes in SIZES:
        if by_size and received * num_bytes / by_size[-1][1][0] > MOST_S:
            break
        times = sorted(_times(_collective(kind, num_bytes, size, group, world.device), REPEATS, world))[:-1]
        by_size.append((num_bytes, (received * num_bytes / times[-1], received * num_bytes / times[0])))
    slow, fast = min(rate[0] for _, rate in by_size), max(rate[1] for _, rate in by_size)
    return AxisRate(kind, axis, size, (slow, fast), latency_s, tuple(by_size))


def _collective(
    kind: Kind, num_bytes: int, size: int, group: dist.ProcessGroup | None, device: torch.device
) -> Callable[[], object]:
    """One collective over ``num_bytes`` of the whole tensor, as an engine starts it."""
    if kind == "all-reduce":
        values = torch.zeros(max(1, num_bytes // 4), dtype=torch.float32, device=device)
        return lambda: dist.all_reduce(values, group=group)
    part = torch.zeros(max(1, math.ceil(num_bytes / size)), dtype=torch.uint8, device=device)
    whole = torch.empty(size * len(part), dtype=torch.uint8, device=device)
    return lambda: dist.all_gather_single(whole, part, group=group)


def _times(start: Callable[[], object], repeats: int, world: World) -> list[float]:
    """Seconds of each repeat on the slowest rank, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        _wait_for_device(world.device)
        started_s = time.perf_counter()
        start()
        _wait_for_device(world.device)
        times.append(time.perf_counter() - started_s)
    return _slowest(times[1:], world)


def _slowest(seconds: Sequence[float], world: World) -> list[float]:
    """The maximum over ranks, elementwise: all ranks decide by the same numbers."""
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    slowest: list[float] = most.tolist()
    return slowest


def _ring(
    axis: AxisName, group: dist.ProcessGroup | None, world: World, hosts: Sequence[str], *, num_bytes: int
) -> list[PairRate]:
    """Each rank sends to the next of its group and receives from the one before, all at once."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    i = ranks.index(world.world_rank)
    after, before = ranks[(i + 1) % len(ranks)], ranks[i - 1]
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=world.device)
    received = torch.empty_like(sent)
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        _wait_for_device(world.device)
        started_s = time.perf_counter()
        moves = [dist.P2POp(dist.irecv, received, before), dist.P2POp(dist.isend, sent, after)]
        works = dist.batch_isend_irecv(moves)
        works[0].wait()  # the receive; over NCCL the only one
        _wait_for_device(world.device)
        times.append(time.perf_counter() - started_s)
        for work in works[1:]:
            work.wait()
    own = torch.tensor([[before, world.world_rank, num_bytes / statistics.median(times)]], dtype=torch.float64)
    table = own.new_empty((world.world_size, 3))
    dist.all_gather_single(table, own)
    return [
        PairRate(axis, int(sender), int(receiver), hosts[int(sender)], hosts[int(receiver)], rate)
        for sender, receiver, rate in _rows(table)
    ]


def _rows(table: Tensor) -> list[tuple[float, float, float]]:
    rows: list[tuple[float, float, float]] = [tuple(row) for row in table.tolist()]
    return rows


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
