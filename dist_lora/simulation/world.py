"""A world of any size with one real process in it: collectives return at once and bring nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dist_lora.world.world import World


@contextmanager
def pretended_world(*, num_nodes: int, gpus_per_node: int) -> Iterator[World]:
    """The first rank's world of ``num_nodes`` nodes, the other ranks pretended; its tensors lie on the CPU.

    The first rank's shards are the largest where rows don't divide evenly. Only one process group is open at a time:
    a process that has one already can't pretend another.
    """
    # Not at the top: it registers a backend with torch, which a run has no use for.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "this process already belongs to a world"
    environment = dict(os.environ)  # DeepSpeed writes this rank's place there, for whoever is started later to find
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_nodes * gpus_per_node)
    try:
        yield World(0, num_nodes * gpus_per_node, 0, gpus_per_node, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
