"""A step asks the device for its numbers once, and computes what it did when the host did the arithmetic between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dist_lora.checkpoint.saver import Saver
from dist_lora.config.schema import OptimSection
from dist_lora.data.loader import Loader
from dist_lora.engines.adamw import AdamW, norm_of
from dist_lora.engines.adapters import ReplicatedAdapters
from dist_lora.lora.attach import halves_of
from dist_lora.lora.layer import LoraAdapter
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World
from tests.ranks.tiny import config_of, documents, trainee_of

READS = ("tolist", "item", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu")


class Reads(TorchFunctionMode):
    """Notes each call by which the host learns what a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchFunctionMode``."""
        if getattr(func, "__name__", "") in READS:
            self.names.append(func.__name__)
        return func(*args, **kwargs or {})


def test_from_the_third_step_on_the_host_reads_one_tensor_a_step(tiny_llama: Any) -> None:
    config = config_of(
        tiny_llama(), train={"steps": 4, "sequence_length": 64, "micro_batch": 2}, optim={"max_grad_norm": 1e-3}
    )
    world = World.alone(torch.device("cpu"))
    trainee = trainee_of(config, world)
    trainee.adapters.start_training(config.optim)
    loader = Loader(
        documents(seed=0, lengths=[20, 30, 40, 10]), sequence_length=64, packing=False, global_batch=4, micro_batch=2,
        seed=0, world_rank=0, world_size=1,
    )  # fmt: skip
    step = TrainStep(config, trainee, loader=loader, num_steps=4, saver=Saver(world), world=world)
    for number in (1, 2, 3, 4):
        with Reads() as reads:
            line, _ = step.take(number)
        assert line["loss"] > 0 and line["grad_norm"] > 0
        if number > 2:  # before, it looks for gradients that are missing
            assert reads.names == ["tolist"]


@pytest.mark.parametrize("max_norm", [0.25, 1e9, None])
def test_clipping_by_a_tensor_has_the_bits_of_clipping_by_a_number(max_norm: float | None) -> None:
    module = LoraAdapter(999, 1, rank=1, alpha=1, dropout=0.0)
    tensors = halves_of("layer", module)
    section = OptimSection(max_grad_norm=max_norm)
    adapters = ReplicatedAdapters(tensors, World.alone(torch.device("cpu")))
    adapters.start_training(section)
    parameter = torch.nn.Parameter(torch.zeros(1000))
    plain = AdamW([parameter], section)
    draws = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        gradient = torch.randn(1000, generator=draws) * 0.1
        adapters.gradient.copy_(gradient)
        norm = float(norm_of(gradient))
        if max_norm is not None and norm > max_norm:
            torch._foreach_mul_([gradient], max_norm / (norm + 1e-6))
        plain.step([gradient], 0.01 * step)
        assert float(adapters.step(0.01 * step)) == norm
        assert torch.equal(adapters.parameter, parameter)
        for mine, wanted in zip(adapters.optimizer_state(), plain.state(), strict=True):
            assert torch.equal(mine, wanted)
