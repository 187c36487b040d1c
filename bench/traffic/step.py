"""Runs one real training step on the meta device, with its batch on the CPU, under the counter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch

from bench.traffic.counter import Counter
from dist_lora.base.index import WeightIndex
from dist_lora.base.quant.published import BaseOnDisk
from dist_lora.checkpoint.saver import Saver
from dist_lora.config.schema import Config, Quant
from dist_lora.herd.members import MEMBERS
from dist_lora.herd.shape import Shape
from dist_lora.layout.memory import setup_of
from dist_lora.layout.setup import Setup
from dist_lora.lora.origin import BaseIdentity
from dist_lora.plan.hardware import find_gpu
from dist_lora.simulation.simulate import STEP, full_batches
from dist_lora.train import build
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World

GPU = find_gpu("h100-80gb")


@dataclass(frozen=True)
class Case:
    """A run to count: one micro-batch of ``sequences`` full documents of ``length`` tokens per GPU and step.

    ``recompute`` is ``train.activation_checkpointing``, ``fused_kernels`` the setting of that name.
    """

    model: str = "3.1-8b"
    quant: Quant = "none"
    rank: int = 16
    sequences: int = 2
    length: int = 4096
    recompute: Any = "auto"
    gpus: int = 1
    fused_kernels: Literal["auto", "none"] = "auto"

    @property
    def tokens(self) -> int:
        """Of a GPU's micro-batch."""
        return self.sequences * self.length

    @property
    def shape(self) -> Shape:
        """The model's sizes."""
        return MEMBERS[self.model].shape

    @property
    def title(self) -> str:
        """The case in words."""
        quant = "bf16" if self.quant == "none" else self.quant.upper()
        return f"{self.model} {quant}, {self.sequences} x {self.length} tokens, rank {self.rank}"

    def config(self) -> Config:
        """Its config: everything else as it is by default."""
        return Config.model_validate(
            {
                "run": "counted",
                "model": {"name": self.model, "quant": self.quant, "dtype": "bf16"},
                "lora": {"rank": self.rank},
                "data": {"train": "unused"},
                "train": {
                    "micro_batch": self.sequences,
                    "global_batch": self.sequences * self.gpus,
                    "sequence_length": self.length,
                    "activation_checkpointing": self.recompute,
                    "fused_kernels": self.fused_kernels,
                },
            }
        )

    def setup(self) -> Setup:
        """What the plan makes of it."""
        return setup_of(self.config(), self.shape, num_nodes=1, gpus_per_node=self.gpus, device_bytes=GPU.memory_bytes)


def count_step(case: Case, *, num_layers: int | None = None) -> Counter:
    """The counted third optimizer step of one GPU, on which the whole base lies (what sharding adds is ``sharding.py``'s).

    What ``auto`` chooses is that of the case's own number of GPUs. ``num_layers``: of a model cut to so many.
    """
    shape = case.shape if num_layers is None else dataclasses.replace(case.shape, num_layers=num_layers)
    world = World(0, 1, 0, 1, torch.device("meta"))
    config = case.config()
    counter = Counter(documents=(case.length,) * case.sequences)
    one = config.model_copy(update={"train": config.train.model_copy(update={"global_batch": case.sequences})})
    with _on_meta():
        sharded = _built(case, one, shape, world)
        model, engine = sharded.model, sharded.engine
        engine.materialize(model)
        adapters = engine.adapters(sharded.tensors)
        identity = BaseIdentity(case.model, None, None, None)
        base = build.Base(Path(), {}, shape, BaseOnDisk(WeightIndex(Path(), {}), {}), None, identity)
        trainee = build.Trainee(
            base, model, engine, adapters, sharded.choices.attention, sharded.precision, checksums={}
        )
        adapters.start_training(config.optim)
        step = TrainStep(one, trainee, loader=full_batches(one, world), num_steps=STEP, saver=Saver(world), world=world)
        model.train()
        counter.watch(model)
        with counter:
            step.take(STEP)
    return counter


def _built(case: Case, config: Config, shape: Shape, world: World) -> build.ShardedModel:
    """The model as a GPU of the case's has it, but for the sharding."""

    def as_on_all(*args: Any, **kwargs: Any) -> Setup:
        setup = setup_of(*args, **kwargs | {"num_nodes": 1, "gpus_per_node": case.gpus})
        layout = dataclasses.replace(setup.layout, engine="none", adapters="replicate")
        return dataclasses.replace(setup, choices=dataclasses.replace(setup.choices, layout=layout))

    with patch.object(build, "setup_of", as_on_all):
        return build.shard_model(
            config, shape, world, name=case.model, memory_bytes=GPU.memory_bytes, on_gpu=True, has_bf16=True
        )


@contextmanager
def _on_meta() -> Iterator[None]:
    """Fused AdamW may be made for the meta device: it is only counted."""
    with patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]):
        yield
