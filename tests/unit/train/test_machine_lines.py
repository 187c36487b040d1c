"""What a run says of a machine that is not the one its config names."""

from __future__ import annotations

import pytest
import torch

from dist_lora.config.schema import MachineSection
from dist_lora.train.command import machine_lines
from dist_lora.world.world import World

TWO_RANKS = World(0, 2, 0, 2, torch.device("cpu"))


@pytest.mark.parametrize("section", [{}, {"gpus_per_node": 2}, {"nodes": 1}, {"price_per_gpu_hour": 2.0}])
def test_nothing_is_said_where_the_config_names_no_other(section: dict) -> None:
    assert machine_lines(MachineSection(**section), TWO_RANKS) == []


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"gpu": "h100-80gb", "gpus_per_node": 8, "nodes": 4}, "names 4 x 8 x h100-80gb (nodes x GPUs x type), and this run has 1 x 2 ranks, no GPU"),
        ({"gpus_per_node": 8}, "names 1 x 8 x any GPU (nodes x GPUs x type), and this run has 1 x 2 ranks, no GPU"),
        ({"nodes": 2}, "names 2 x any number of x any GPU (nodes x GPUs x type), and this run has 1 x 2 ranks, no GPU"),
    ],
)  # fmt: skip
def test_a_machine_that_is_another_is_one_line(section: dict, told: str) -> None:
    (line,) = machine_lines(MachineSection(**section), TWO_RANKS)
    assert line == f"machine   the config {told}: its plan doesn't apply here"
