"""What tests on a GPU share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dist_lora.world.launcher import LaunchedRank
from dist_lora.world.world import World, join


@pytest.fixture
def world() -> Iterator[World]:
    """A world of one process with a process group: what fsdp2 needs on one GPU."""
    made = join(LaunchedRank(0, 1, 0, 1), {}, collective_timeout_s=60, join_timeout_s=60)
    assert made.device.type == "cuda"
    yield made
    made.leave()
