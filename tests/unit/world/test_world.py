"""How ranks agree, wait for each other and end together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_lora.errors import ConfigError, DistLoraError, JoinError, RankError, SaveError
from dist_lora.supervision.hang import collective_timeout_s
from dist_lora.world.launcher import LaunchedRank
from dist_lora.world.world import World, _connect, _Connecting, computes_bf16, join


class SlowReader:
    """A rank's way to the store, which reads what it is for only when it may."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.may_read = store, threading.Event()

    def __getattr__(self, name: str) -> Any:
        if name == "get":
            self.may_read.wait(30)
        return getattr(self.store, name)


def test_rank_0_stays_until_the_others_have_read_why_they_end() -> None:
    """It may host the store: otherwise the rank with the error couldn't report it."""
    store = dist.HashStore()
    slow = SlowReader(store)
    cpu = torch.device("cpu")
    first, second = World(0, 2, 0, 1, cpu, store), World(1, 2, 0, 1, cpu, slow)
    with ThreadPoolExecutor(2) as threads:
        of_second = threads.submit(second.agree, "the stage", ConfigError("another base"))
        of_first = threads.submit(first.agree, "the stage", None)
        with pytest.raises(TimeoutError):
            of_first.result(0.5)
        slow.may_read.set()
        with pytest.raises(ConfigError, match="another base"):
            of_second.result(30)
        with pytest.raises(RankError, match="the stage: rank 1: another base") as caught:
            of_first.result(30)
    assert caught.value.exit_code == 2


# Joining


@pytest.fixture
def come(tmp_path) -> Callable[[int], World]:
    """``come(rank)`` joins a world of two."""
    environment = {"DIST_LORA_RENDEZVOUS": str(tmp_path / "rendezvous")}
    return lambda rank: join(LaunchedRank(rank, 2, rank, 2), environment, collective_timeout_s=30, join_timeout_s=30)


def watches() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "failure-watch"]


def test_no_rank_has_joined_before_all_are_connected(come, monkeypatch) -> None:
    """One that came, had nothing to do and left would close the connection that another is still making."""
    may_connect = threading.Event()
    monkeypatch.setattr(dist, "init_process_group", lambda *_, rank, **__: may_connect.wait(30) if rank == 0 else None)
    with ThreadPoolExecutor(2) as threads:
        slow, quick = threads.submit(come, 0), threads.submit(come, 1)
        with pytest.raises(TimeoutError):
            quick.result(0.5)
        may_connect.set()
        for joined in (slow, quick):
            joined.result(30).leave()


def test_a_rank_that_can_not_connect_ends_one_that_is_connected_and_no_watch_is_left(come, monkeypatch) -> None:
    """A watch that stayed would end this process seconds later."""

    def connect(*_: object, rank: int, **__: object) -> None:
        if rank == 0:
            raise RuntimeError("no route to host")

    monkeypatch.setattr(dist, "init_process_group", connect)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.submit(come, 0), threads.submit(come, 1)
        with pytest.raises(JoinError, match=r"^the ranks can't connect to each other: no route to host$"):
            first.result(30)
        with pytest.raises(RankError, match="rank 0 failed: the ranks can't connect to each other: no route to host"):
            second.result(30)
    for watch in watches():
        watch.join(30)
    assert watches() == []


def test_a_rank_that_is_never_connected_is_named_and_ends_in_time(come, monkeypatch, capsys) -> None:
    """NCCL waits without a limit for a link that is dead or a port that is closed."""
    world = World(1, 2, 1, 2, torch.device("cpu"), dist.HashStore())
    codes: list[int] = []
    connecting = _Connecting(world, 0.01, end=codes.append)
    with connecting:
        connecting.join(30)
    assert codes == [1]
    assert "error: rank 1 of 2 on " in (shown := capsys.readouterr().err)
    assert "has joined, and isn't connected to the others after 0.01 s" in shown and "NCCL_DEBUG=INFO" in shown
    with _Connecting(world, 30, end=codes.append) as in_time:
        pass
    assert in_time is None and codes == [1]


def test_on_gpus_nccl_connects_at_once_and_its_monitor_leaves_time_to_name_a_hang(monkeypatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options, backend=backend))
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", raising=False)
    gpu = torch.device("cuda", 1)
    _connect(World(1, 2, 1, 2, gpu, dist.HashStore()), timeout_s=collective_timeout_s(600))
    assert asked["backend"] == "cpu:gloo,cuda:nccl" and asked["device_id"] == gpu
    assert int(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > collective_timeout_s(600) > 600
    _connect(World(1, 2, 1, 2, torch.device("cpu"), dist.HashStore()), timeout_s=9)
    assert asked["backend"] == "gloo" and asked["device_id"] is None


def test_a_store_that_goes_while_ranks_connect_is_told_as_such(come, monkeypatch) -> None:
    def gone(world: World, stage: str, error: BaseException | None) -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(World, "agree", gone)
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(come, rank).exception for rank in (0, 1)]
        errors = [exception(30) for exception in found]
    assert {type(error) for error in errors} == {JoinError, RankError}  # one of them tells
    assert {str(error) for error in errors} == {"the ranks can't connect to each other: Connection reset by peer"}


# What one rank does for others


def on_threads(work: Callable[[World], Any], *, ranks: int = 4, per_node: int = 2) -> list[Any]:
    """What ``work`` returns or raises on each rank, one thread per rank, over one store in memory."""
    store = dist.HashStore()

    def run(rank: int) -> Any:
        try:
            return work(World(rank, ranks, rank % per_node, per_node, torch.device("cpu"), store))
        except DistLoraError as error:
            return error

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run, range(ranks)))


def test_what_the_first_rank_does_is_known_to_all_and_done_once() -> None:
    done: list[int] = []

    def work(world: World) -> list[bytes]:
        def act() -> bytes:
            done.append(world.world_rank)
            return f"by {world.world_rank}, time {len(done)}".encode()

        return [world.once("it", act), world.once("it", act)]

    assert on_threads(work) == [[b"by 0, time 1", b"by 0, time 2"]] * 4
    assert done == [0, 0]


def test_what_the_first_rank_of_a_node_does_is_known_to_its_node() -> None:
    def work(world: World) -> bytes:
        return world.once_per_node("it", lambda: str(world.world_rank).encode())

    assert on_threads(work) == [b"0", b"0", b"2", b"2"]


def test_only_the_first_rank_has_what_it_did_for_itself() -> None:
    assert on_threads(lambda world: world.on_first("it", lambda: world.world_rank + 10)) == [10, None, None, None]


def test_a_refusal_of_the_system_where_one_rank_acts_ends_all_in_our_words() -> None:
    def work(world: World) -> bytes:
        def act() -> bytes:
            if world.world_rank == 2:
                raise PermissionError(13, "Permission denied")
            return b""

        return world.once_per_node("it", act, os_error=lambda error: SaveError(f"no: {error.strerror}"))

    found = on_threads(work)
    assert [type(each) for each in found] == [RankError, RankError, SaveError, RankError]
    assert str(found[2]) == "no: Permission denied" and isinstance(found[2].__cause__, PermissionError)
    assert {str(found[rank]) for rank in (0, 1, 3)} == {"it: rank 2: no: Permission denied"}
    assert {error.exit_code for error in found} == {found[2].exit_code}


def test_a_refusal_of_the_system_that_nobody_names_stays_what_it_is() -> None:
    def act() -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError):
        World.alone(torch.device("cpu")).agree_on("it", act)


def test_alone_one_does_it_all() -> None:
    world = World.alone(torch.device("cpu"))
    assert world.once("it", lambda: b"x") == b"x" == world.once_per_node("it", lambda: b"x")
    assert world.on_first("it", lambda: 3) == 3 == world.agree_on("it", lambda: 3)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)]
)
def test_a_gpu_computes_in_bf16_from_capability_8_on(monkeypatch, capability: tuple[int, int], expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert computes_bf16(torch.device("cuda", 0)) is expected
    assert computes_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")  # whose capabilities count otherwise
    assert computes_bf16(torch.device("cuda", 0))
