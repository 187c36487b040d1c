"""Pinned memory takes what it holds: the settings of PyTorch's allocator, and their arithmetic."""

from __future__ import annotations

import math

import pytest

from dist_lora.herd.members import MEMBERS
from dist_lora.layout.storage import base_parts
from dist_lora.world.allocator import PINNED_MIB, allocator_settings

OURS = "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": OURS}),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            {"PYTORCH_ALLOC_CONF": f"expandable_segments:True,{OURS}"},
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:True,{OURS}"},
        ),
        ({"PYTORCH_ALLOC_CONF": "pinned_max_cached_size_mb:64"}, {}),
    ],
)
def test_settings_are_added_to_the_users_own(environment: dict[str, str], settings: dict[str, str]) -> None:
    assert allocator_settings(environment, installed="2.13.0+cu130") == settings


def test_an_older_torch_gets_no_setting_that_it_may_not_know() -> None:
    assert allocator_settings({}, installed="2.12.1") == {}
    assert allocator_settings({}, installed="3.0.0a1") != {}


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
