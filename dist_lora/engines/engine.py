"""The interface between the training loop and an engine; each engine has a file of its own."""

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
from dist_lora.lora.attach import TrainedTensor
from dist_lora.world.world import World

Forward = Callable[..., Any]


class Engine(ABC):
    """How the base and the adapters are sharded over the ranks, and how a forward runs on the shards.

    The methods are called in this order: ``shard``, ``materialize``, ``slots`` (which the caller fills), ``exchange_rows``,
    ``adapters``.
    """

    name: ClassVar[EngineName]
    tracing_steps: ClassVar[int] = 0  # number of first steps whose all-gathers differ from those of all later steps

    def __init__(self, world: World, layout: Layout) -> None:
        self.world, self.layout = world, layout

    @abstractmethod
    def shard(self, model: Llama) -> str:
        """Shard the parameters over the ranks, while they are on meta; returns a description for the log."""

    @abstractmethod
    def materialize(self, model: Llama) -> None:
        """Allocate this rank's shards on its device."""

    @abstractmethod
    def slots(self, model: Llama) -> list[Slot]:
        """For each base parameter the elements that this rank reads, and their destination."""

    def exchange_rows(self, model: Llama) -> None:  # noqa: B027
        """Give and get what one rank has read and others hold too, once all slots are filled. All ranks call it."""

    def is_on_host(self, slot: Slot) -> bool:
        """Whether the elements of a slot are kept in host memory, and on the device only while they are needed."""
        return self.layout.base_on_host

    @abstractmethod
    def adapters(self, tensors: Sequence[TrainedTensor], *, has_two_rates: bool = False) -> Adapters:
        """The trained tensors on this rank's device, not yet initialized. All ranks call it.

        ``has_two_rates``: A and B have learning rates of their own (``optim.lr_ratio``).
        """

    @abstractmethod
    def keep_gathered(self, model: Llama, gathered: bool) -> None:
        """Keep the base gathered between forwards (for generation, where it fits), or reshard it. All ranks call it."""

    def forward_of(self, model: Llama) -> Forward:
        """What to call in place of ``model`` for a micro-batch's forward."""
        return model

    def simulating(self) -> contextlib.AbstractContextManager[None]:
        """A context for runs where the other ranks are simulated: the engine skips its checks against them."""
        return contextlib.nullcontext()

    def frozen_shards(self, model: Llama) -> list[tuple[str, Tensor]]:
        """This rank's shards of the base: name and local tensor of each part."""
        return [(f"{slot.name}/{slot.part}", slot.destination) for slot in self.slots(model)]
