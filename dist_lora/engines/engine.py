"""What the loop asks of an engine, and the engine of a single process; sharding ones build on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dist_lora.base.llama import Llama, materialize
from dist_lora.base.stream import Slot
from dist_lora.engines.adapters import Adapters, ReplicatedAdapters
from dist_lora.layout.choices import Layout
from dist_lora.lora.attach import AdapterTensor
from dist_lora.world.world import World

Forward = Callable[..., Any]


class SingleProcess:
    """Engine ``none``: the whole base in one process. The promise that every engine keeps is this class's methods.

    They are called in this order: ``shard``, ``materialize``, ``slots`` (which the caller fills), ``adapters``.
    """

    name = "none"
    learns_in_steps = 0  # how many of the first steps gather otherwise than all that follow

    def __init__(self, world: World, layout: Layout) -> None:
        self.world, self.layout = world, layout

    def shard(self, model: Llama) -> str:
        """Cut the parameters (still on meta) into this rank's shares; returns what was done, in a line."""
        return "the base is whole on this process"

    def materialize(self, model: Llama) -> None:
        """Give this rank's shares memory on its device."""
        materialize(model, self.world.device)

    def slots(self, model: Llama) -> list[Slot]:
        """For each base parameter the elements that this rank holds, and where they go."""
        return [
            Slot(*model.place_on_disk(name), tuple(p.shape), 0, p.data.view(-1))
            for name, p in model.base_parameters().items()
        ]

    def adapters(self, tensors: Sequence[AdapterTensor]) -> Adapters:
        """The trained tensors on this rank's device; their values are still to be set."""
        return ReplicatedAdapters(tensors, self.world, optimizer_on_host=self.layout.optimizer_on_host)

    def forward_of(self, model: Llama) -> Forward:
        """What to call in place of ``model``: a micro-batch's forward as this engine runs it."""
        return model

    def pretending(self) -> contextlib.AbstractContextManager[None]:
        """Entered where the other ranks are pretended: the engine then asks nothing of them that they can't say."""
        return contextlib.nullcontext()

    def keep_gathered(self, model: Llama, gathered: bool) -> None:
        """Hold the base whole between forwards (for generation, where it fits), or go back to shards."""

    def frozen_shares(self, model: Llama) -> list[tuple[str, Tensor]]:
        """The base as this rank keeps it: name and local tensor of each part."""
        return [(f"{slot.name}/{slot.part}", slot.destination) for slot in self.slots(model)]
