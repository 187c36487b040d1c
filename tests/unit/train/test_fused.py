"""A run whose elementwise work is done by the operators, and one without: the same numbers, and why it isn't."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from dist_lora.base.llama import build_on_meta
from dist_lora.layout import choices
from dist_lora.train import build
from dist_lora.world.world import World
from tests.ranks.test_frozen_base import losses_and_norms_of
from tests.ranks.tiny import config_of, trainee_of
from tests.unit.base.test_linear import SMALL


def losses_and_norms(folder: Path, *, is_fused: bool, recompute: bool) -> tuple[list[float], list[float]]:
    """Of three steps on the CPU, where the operators are plain torch, which overwrites as the kernels do."""
    trainee = trainee_of(config_of(folder, train={"activation_checkpointing": recompute}), World.alone())
    assert all(block.mlp.is_fused == is_fused for block in trainee.model.blocks())
    return losses_and_norms_of(trainee, World.alone())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_has_the_losses_of_one_without(tiny_llama, monkeypatch, recompute) -> None:
    folder = tiny_llama("llama31")
    plain = losses_and_norms(folder, is_fused=False, recompute=recompute)
    monkeypatch.setattr(choices, "choose_kernels", lambda wanted, on_gpu: (True, "as if on a GPU"))
    fused = losses_and_norms(folder, is_fused=True, recompute=recompute)
    assert len(fused[0]) == 6
    assert fused[0] == pytest.approx(plain[0], rel=1e-5) and fused[1] == pytest.approx(plain[1], rel=1e-5)


def test_a_gpu_that_cannot_run_the_kernels_is_said_once_and_computes_without(monkeypatch, caplog) -> None:
    on_gpu = World(0, 1, 0, 1, torch.device("cuda", 0))
    second = World(1, 2, 1, 2, torch.device("cuda", 1))
    for reason, is_fused in ((None, True), ("Triton isn't installed", False)):
        monkeypatch.setattr(build, "why_not", lambda device, dtype, reason=reason: reason)
        for world in (on_gpu, second):
            model = build_on_meta(SMALL, dtype=torch.bfloat16)
            with caplog.at_level(logging.WARNING):
                build._fuse(model, torch.bfloat16, world)
            assert {module.is_fused for module in model.modules() if hasattr(module, "is_fused")} == {is_fused}
    assert caplog.messages == [
        "kernels   plain instead of fused: Triton isn't installed. The run is the same, and slower"
    ]
