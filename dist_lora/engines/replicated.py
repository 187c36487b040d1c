"""``base_shard: gpu``: the whole base on each of several ranks, of which only the adapters' gradients are summed."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from dist_lora.base.llama import Llama
from dist_lora.base.stream import Slot
from dist_lora.engines.adapters import share_of
from dist_lora.engines.single import Single
from dist_lora.text import count


class Replicated(Single):
    """Nothing is sharded or wrapped. Each rank reads its part of the rows, and gets the others from the ranks of its node."""

    name = "fsdp2"

    def shard(self, model: Llama) -> str:
        """See ``Engine.shard``."""
        return f"the base is whole on {count(self.world.world_size, 'rank')}"

    def slots(self, model: Llama) -> list[Slot]:
        """See ``Engine.slots``: a part of the rows of each parameter, such that a node reads every row once."""
        return [self._rows_of(whole, self.world.local_rank) for whole in super().slots(model)]

    def exchange_rows(self, model: Llama) -> None:
        """See ``Engine.exchange_rows``: in place, as they are stored, so that no rank quantizes what another has quantized."""
        world = self.world
        if world.local_size == 1:
            return
        world.progress.now("exchanging the base within each node")
        group = None if world.num_nodes == 1 else dist.new_subgroups(world.local_size)[0]  # type: ignore[no-untyped-call]
        first = world.world_rank - world.local_rank
        for whole in super().slots(model):
            for local_rank in range(world.local_size):
                rows = self._rows_of(whole, local_rank).destination
                if rows.numel():
                    dist.broadcast(rows.view(torch.uint8), src=first + local_rank, group=group)
            world.progress.advance()

    def frozen_shards(self, model: Llama) -> list[tuple[str, Tensor]]:
        """See ``Engine.frozen_shards``: all of it, whoever has read it."""
        return [(f"{whole.name}/{whole.part}", whole.destination) for whole in super().slots(model)]

    def _rows_of(self, whole: Slot, local_rank: int) -> Slot:
        """The rows that a rank of this node reads."""
        width = whole.destination.numel() // whole.shape[0]
        rows = share_of(whole.shape[0], local_rank, self.world.local_size)
        first, stop = rows.start * width, rows.stop * width
        return replace(whole, first=first, destination=whole.destination[first:stop])
