"""What the loop asks of an engine, and the engine of a single process; sharding ones build on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_lora.base.llama import Llama, materialize
from dist_lora.base.stream import Slot
from dist_lora.config.schema import ParallelSection
from dist_lora.errors import ConfigError
from dist_lora.lora.attach import AdapterTensor
from dist_lora.parallel.adapters import ReplicatedAdapters
from dist_lora.parallel.world import World


@dataclass(frozen=True)
class Range:
    """A rank's share of the flat buffer of all trained tensors: elements ``[start, stop)``."""

    start: int
    stop: int


class SingleProcess:
    """Engine ``none``: the whole base in one process. The promise that every engine keeps is this class's methods."""

    name = "none"

    def __init__(self, world: World) -> None:
        self.world = world

    def shard(self, model: Llama) -> str:
        """Cut the base's parameters (still on meta) into this rank's shares; returns what was done, in a line."""
        return "the base is whole on this process"

    def materialize(self, model: Llama) -> None:
        """Give this rank's shares memory on its device."""
        materialize(model, self.world.device)

    def slots(self, model: Llama) -> list[Slot]:
        """For each base tensor the rows that this rank holds, and where they go."""
        return [Slot(name, tuple(p.shape), 0, p.shape[0], p.data) for name, p in model.base_parameters().items()]

    def adapters(self, tensors: list[AdapterTensor]) -> ReplicatedAdapters:
        """The trained tensors on this rank's device."""
        return ReplicatedAdapters(tensors, self.world.device)

    def reduce(self, adapters: ReplicatedAdapters, scalars: Tensor) -> None:
        """Sum the gradient and ``scalars`` (fp32) over all ranks, in place: all that a step sends."""
        self.world.sum(adapters.gradient)
        self.world.sum(scalars)

    def share(self, adapters: ReplicatedAdapters) -> Range:
        """The part of the trained state that this rank writes: replicated state is split evenly, in order."""
        return share_of_rank(adapters.parameter.numel(), self.world.world_rank, self.world.world_size)

    def keep_gathered(self, model: Llama, gathered: bool) -> None:
        """Hold the base whole between forwards (for generation, where it fits), or go back to shards."""


def share_of_rank(num_elements: int, world_rank: int, world_size: int) -> Range:
    """The ``world_rank``-th of ``world_size`` contiguous parts of ``num_elements``; the first ones are larger by one."""
    small, larger = divmod(num_elements, world_size)
    start = world_rank * small + min(world_rank, larger)
    return Range(start, start + small + (world_rank < larger))


def check_engine(section: ParallelSection, world: World) -> None:
    """Raise ``ConfigError`` where ``parallel.engine`` can't run in this world."""
    if section.engine == "none" and world.world_size > 1:
        raise ConfigError(
            f"parallel.engine: none runs one process and {world.world_size} were started. "
            "Set parallel.engine=fsdp2 (or auto), or start one process."
        )


def make_engine(section: ParallelSection, world: World) -> SingleProcess:
    """The engine of ``parallel.engine``; ``auto`` shards by FSDP2 where there is more than one process."""
    from dist_lora.parallel.fsdp2 import Fsdp2

    wanted = section.engine
    if wanted == "auto":
        wanted = "fsdp2" if world.world_size > 1 else "none"
    return Fsdp2(world, base_shard=section.base_shard) if wanted == "fsdp2" else SingleProcess(world)


def base_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type that the base is stored and computed in for ``model.dtype``; ``auto`` is bf16 on a GPU, else fp32."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
