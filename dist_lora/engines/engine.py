"""What the loop asks of an engine; each engine has a file of its own."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from dist_lora.base.llama import Llama
from dist_lora.base.stream import Slot
from dist_lora.engines.adapters import Adapters
from dist_lora.layout.choices import EngineName, Layout
from dist_lora.lora.attach import AdapterTensor
from dist_lora.world.world import World

Forward = Callable[..., Any]


class Engine(ABC):
    """How the base and the adapters are sharded over the ranks, and how a forward runs on the shards.

    The methods are called in this order: ``shard``, ``materialize``, ``slots`` (which the caller fills), ``adapters``.
    """

    name: ClassVar[EngineName]
    learns_in_steps: ClassVar[int] = 0  # how many of the first steps gather otherwise than all that follow

    def __init__(self, world: World, layout: Layout) -> None:
        self.world, self.layout = world, layout

    @abstractmethod
    def shard(self, model: Llama) -> str:
        """Shard the parameters, while they are on meta, to this rank's shares; returns what was done, in a line."""

    @abstractmethod
    def materialize(self, model: Llama) -> None:
        """Give this rank's shares memory on its device."""

    @abstractmethod
    def slots(self, model: Llama) -> list[Slot]:
        """For each base parameter the elements that this rank holds, and where they go."""

    @abstractmethod
    def adapters(self, tensors: Sequence[AdapterTensor]) -> Adapters:
        """The trained tensors on this rank's device; their values are still to be set. All ranks call it."""

    @abstractmethod
    def keep_gathered(self, model: Llama, gathered: bool) -> None:
        """Hold the base whole between forwards (for generation, where it fits), or go back to shards. All ranks call it."""

    def forward_of(self, model: Llama) -> Forward:
        """What to call in place of ``model``: a micro-batch's forward as this engine runs it."""
        return model

    def simulating(self) -> contextlib.AbstractContextManager[None]:
        """Entered where the other ranks are simulated: the engine then asks nothing of them that they can't answer."""
        return contextlib.nullcontext()

    def frozen_shares(self, model: Llama) -> list[tuple[str, Tensor]]:
        """The base as this rank keeps it: name and local tensor of each part."""
        return [(f"{slot.name}/{slot.part}", slot.destination) for slot in self.slots(model)]
