"""What ranks that agree on the way to their end owe each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_lora.errors import ConfigError, RankError
from dist_lora.world.launcher import Place
from dist_lora.world.world import World, join


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


def test_no_rank_has_joined_before_all_are_connected(tmp_path, monkeypatch) -> None:
    """One that came, had nothing to do and left would close the connection that another is still making."""
    may_connect = threading.Event()
    monkeypatch.setattr(dist, "init_process_group", lambda *_, rank, **__: may_connect.wait(30) if rank == 0 else None)
    environment = {"DIST_LORA_RENDEZVOUS": str(tmp_path / "rendezvous")}

    def come(rank: int) -> World:
        return join(Place(rank, 2, rank, 2), environment, collective_timeout_s=30, join_timeout_s=30)

    with ThreadPoolExecutor(2) as threads:
        slow, quick = threads.submit(come, 0), threads.submit(come, 1)
        with pytest.raises(TimeoutError):
            quick.result(0.5)
        may_connect.set()
        for joined in (slow, quick):
            joined.result(30).leave()
