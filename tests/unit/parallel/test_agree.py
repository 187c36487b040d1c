"""What ranks that agree on the way to their end owe each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_lora.errors import ConfigError, JoinError, RankError
from dist_lora.parallel.place import Place
from dist_lora.parallel.world import World, join


class SlowReader:
    """A rank's way to the store, which reads what it is for only when it may."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.may_read = store, threading.Event()

    def __getattr__(self, name: str) -> Any:
        if name == "get":
            self.may_read.wait(30)
        return getattr(self.store, name)


def test_the_first_rank_stays_until_the_others_have_read_why_they_end() -> None:
    """The store may be in its process: the rank that has the error could not tell it otherwise."""
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
    return lambda rank: join(Place(rank, 2, rank, 2), environment, collective_timeout_s=30, join_timeout_s=30)


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
        with pytest.raises(JoinError, match=r"^the ranks can't reach each other to compute: no route to host$"):
            first.result(30)
        with pytest.raises(
            RankError, match="rank 0 failed: the ranks can't reach each other to compute: no route to host"
        ):
            second.result(30)
    for watch in watches():
        watch.join(30)
    assert watches() == []


def test_a_store_that_goes_while_ranks_connect_is_told_as_such(come, monkeypatch) -> None:
    def gone(world: World, stage: str, error: BaseException | None) -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(World, "agree", gone)
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(come, rank).exception for rank in (0, 1)]
        errors = [exception(30) for exception in found]
    assert {type(error) for error in errors} == {JoinError, RankError}  # one of them tells
    assert {str(error) for error in errors} == {"the ranks can't reach each other to compute: Connection reset by peer"}
