"""Pinned memory takes what it holds: the settings of PyTorch's allocator, and their arithmetic."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest

from dist_lora.herd.members import MEMBERS
from dist_lora.layout.storage import base_parts
from dist_lora.world.allocator import PINNED_MIB, allocator_settings

PINNED = "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"
EXPANDABLE = "expandable_segments:True"
KNOWN = {"installed": "2.13.0+cu130", "system": "linux 6.8.0-generic"}


@pytest.mark.parametrize(
    ("environment", "value"),
    [
        ({}, f"{EXPANDABLE},{PINNED}"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, f"expandable_segments:False,{PINNED}"),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, f"backend:cudaMallocAsync,{PINNED}"),
        ({"PYTORCH_ALLOC_CONF": "pinned_num_register_threads:2"}, f"pinned_num_register_threads:2,{EXPANDABLE},{PINNED}"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, f"max_split_size_mb:64,{PINNED}"),
        ({"PYTORCH_ALLOC_CONF": "pinned_max_cached_size_mb:64"}, f"pinned_max_cached_size_mb:64,{EXPANDABLE}"),
        ({"PYTORCH_ALLOC_CONF": f"{EXPANDABLE},pinned_max_cached_size_mb:64"}, None),
        ({"TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK": "1"}, PINNED),
    ],
)  # fmt: skip
def test_settings_are_added_to_the_users_own(environment: dict[str, str], value: str | None) -> None:
    name = next((name for name in environment if name.endswith("ALLOC_CONF")), "PYTORCH_ALLOC_CONF")
    assert allocator_settings(environment, is_offloaded=True, **KNOWN) == ({} if value is None else {name: value})


def test_without_offload_pinned_memory_is_left_to_torch() -> None:
    assert allocator_settings({}, is_offloaded=False, **KNOWN) == {"PYTORCH_ALLOC_CONF": EXPANDABLE}
    assert allocator_settings({"PYTORCH_ALLOC_CONF": EXPANDABLE}, is_offloaded=False, **KNOWN) == {}


@pytest.mark.parametrize("system", ["win32 10", "darwin 24.1", "linux 5.15.148-tegra"])
def test_where_segments_cannot_grow_torch_is_not_told_to_let_them(system: str) -> None:
    assert allocator_settings({}, is_offloaded=False, installed="2.13.0", system=system) == {}


def test_an_older_torch_gets_no_setting_that_it_may_not_know() -> None:
    assert allocator_settings({}, is_offloaded=True, installed="2.12.1") == {}
    assert allocator_settings({}, is_offloaded=True, installed="3.0.0a1") != {}


def test_torch_here_takes_the_settings_without_a_word() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import torch; torch.ones(2).sum()"],
        env={**os.environ, **allocator_settings({}, is_offloaded=True)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")


def pinned_bytes(num_bytes: int, *, mib: float = PINNED_MIB) -> int:
    """The pinned memory that PyTorch takes for a block: up to ``mib`` the next power of two, above it what it holds."""
    return num_bytes if num_bytes > mib * 2**20 else 1 << max(0, num_bytes - 1).bit_length()


@pytest.mark.parametrize(
    ("member", "ranks", "rounded"), [("3.1-405b", 8, 1.18), ("3.1-70b", 8, 1.11), ("3.1-8b", 16, 1.1)]
)
def test_an_offloaded_base_takes_what_the_plan_says_and_without_the_settings_far_more(
    member: str, ranks: int, rounded: float
) -> None:
    parts = base_parts(MEMBERS[member].shape, quant="none", item_bytes=2)
    exact = sum(part.shard_bytes(ranks) for part in parts)
    assert sum(pinned_bytes(part.shard_bytes(ranks)) for part in parts) < 1.001 * exact
    assert sum(pinned_bytes(part.shard_bytes(ranks), mib=math.inf) for part in parts) > rounded * exact
