"""Engine ``none``: the whole base in one process, on its device or with its layers in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dist_lora.base.llama import Llama, materialize
from dist_lora.base.stream import Slot
from dist_lora.engines.adapters import Adapters, ReplicatedAdapters
from dist_lora.engines.engine import Engine
from dist_lora.engines.host_layers import HostLayers
from dist_lora.layout.choices import EngineName, Layout
from dist_lora.lora.attach import TrainedTensor
from dist_lora.world.world import World


class Single(Engine):
    """Nothing is sharded and nothing is communicated."""

    name: ClassVar[EngineName] = "none"

    def __init__(self, world: World, layout: Layout) -> None:
        super().__init__(world, layout)
        self._on_host: HostLayers | None = None

    def shard(self, model: Llama) -> str:
        """See ``Engine.shard``."""
        return "the base is not sharded" + ", its layers are in host memory" * self.layout.base_on_host

    def materialize(self, model: Llama) -> None:
        """See ``Engine.materialize``. Embedding, last norm and head stay on the device: they are used at once and not in turn."""
        if self.layout.base_on_host:
            self._on_host = HostLayers(model.blocks(), self.world.device)
        materialize(model, self.world.device)

    def slots(self, model: Llama) -> list[Slot]:
        """See ``Engine.slots``."""
        on_host = {} if self._on_host is None else self._on_host.host_tensors
        tensors = {name: on_host.get(p, p.data) for name, p in model.base_parameters().items()}
        return [Slot(*model.stored_as(name), tuple(t.shape), 0, t.view(-1)) for name, t in tensors.items()]

    def is_on_host(self, slot: Slot) -> bool:
        """See ``Engine.is_on_host``."""
        return super().is_on_host(slot) and slot.name.startswith("model.layers.")

    def adapters(self, tensors: Sequence[TrainedTensor], *, has_two_rates: bool = False) -> Adapters:
        """See ``Engine.adapters``."""
        return ReplicatedAdapters(tensors, self.world, optimizer_on_host=self.layout.optimizer_on_host)

    def keep_gathered(self, model: Llama, gathered: bool) -> None:
        """See ``Engine.keep_gathered``: all that isn't on the device is the layers in host memory."""
        if self._on_host is not None:
            self._on_host.keep_on_device(gathered)
