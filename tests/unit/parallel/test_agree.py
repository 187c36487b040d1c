"""What ranks that agree on the way to their end owe each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_lora.errors import ConfigError, RankError
from dist_lora.parallel.world import World


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
