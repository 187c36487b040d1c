"""A simulated world of any size with one real process: collectives return at once and transfer nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dist_lora.world.world import World


@contextmanager
def simulated_world(*, num_nodes: int, gpus_per_node: int) -> Iterator[World]:
    """The world of the first rank on ``num_nodes`` nodes, with the other ranks simulated; its tensors are on the CPU.

    The first rank's shards are the largest where rows don't divide evenly. A process can have only one process group: this
    one must not have one yet.
    """
    # Imported late: it registers a backend with torch, which a run doesn't need.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "this process already has a process group"
    environment = dict(os.environ)  # DeepSpeed sets RANK, WORLD_SIZE, ... there
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_nodes * gpus_per_node)
    try:
        yield World(0, num_nodes * gpus_per_node, 0, gpus_per_node, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
