"""Engine ``none``: the whole base in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dist_lora.base.llama import Llama, materialize
from dist_lora.base.stream import Slot
from dist_lora.engines.adapters import Adapters, ReplicatedAdapters
from dist_lora.engines.engine import Engine
from dist_lora.layout.choices import EngineName
from dist_lora.lora.attach import AdapterTensor


class Single(Engine):
    """Nothing is sharded and nothing is communicated."""

    name: ClassVar[EngineName] = "none"

    def shard(self, model: Llama) -> str:
        """See ``Engine.shard``."""
        return "the base is not sharded"

    def materialize(self, model: Llama) -> None:
        """See ``Engine.materialize``."""
        materialize(model, self.world.device)

    def slots(self, model: Llama) -> list[Slot]:
        """See ``Engine.slots``."""
        return [
            Slot(*model.stored_as(name), tuple(p.shape), 0, p.data.view(-1))
            for name, p in model.base_parameters().items()
        ]

    def adapters(self, tensors: Sequence[AdapterTensor]) -> Adapters:
        """See ``Engine.adapters``."""
        return ReplicatedAdapters(tensors, self.world, optimizer_on_host=self.layout.optimizer_on_host)

    def keep_gathered(self, model: Llama, gathered: bool) -> None:
        """See ``Engine.keep_gathered``: the base is always whole."""
