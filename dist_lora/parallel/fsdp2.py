"""Engine ``fsdp2``: the frozen base in row shards, gathered block by block while it is used."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_lora.base.llama import Llama
from dist_lora.base.stream import Slot
from dist_lora.parallel.engine import SingleProcess
from dist_lora.parallel.world import World


class Fsdp2(SingleProcess):
    """Every base parameter is cut by rows over the ranks of a node or of the world; adapters are replicated.

    FSDP2 never sees an adapter: it has nothing to reduce, and the trained state is summed once a step.
    """

    name = "fsdp2"

    def __init__(self, world: World, *, base_shard: str) -> None:
        super().__init__(world)
        # Within a node by default: then no byte of the base crosses the network.
        self.base_shard = "node" if base_shard == "auto" else base_shard

    def shard(self, model: Llama) -> str:
        """See ``SingleProcess.shard``. Call it while the parameters are on meta."""
        world = self.world
        mesh = self._mesh()
        trained = {p for name, p in model.named_parameters() if ".adapter." in name}
        # No MixedPrecisionPolicy: the base is stored in the type it is computed in, and a policy would
        # also cast what must not be cast (the scales of a quantized base).
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
        if not model.shape.tied:
            fully_shard(model.model.embed_tokens, mesh=mesh, reshard_after_forward=True)
            fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
        # The root holds the last norm and, where the head is tied, the embedding that both ends use.
        fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=trained)
        shards = mesh.shape[-1]
        copies = f", {world.world_size // shards} copies" if shards < world.world_size else ""
        return f"the base is cut by rows over {shards} ranks (FSDP2, base_shard {self.base_shard}{copies})"

    def _mesh(self) -> DeviceMesh:
        world = self.world
        kind = world.device.type
        if self.base_shard == "node" and world.num_nodes > 1:
            return init_device_mesh(kind, (world.num_nodes, world.local_size), mesh_dim_names=("node", "shard"))
        return init_device_mesh(kind, (world.world_size,), mesh_dim_names=("shard",))

    def slots(self, model: Llama) -> list[Slot]:
        """See ``SingleProcess.slots``."""
        return [_slot(name, parameter) for name, parameter in model.base_parameters().items()]

    def keep_gathered(self, model: Llama, gathered: bool) -> None:
        """See ``SingleProcess.keep_gathered``. All ranks call it."""
        for module in _sharded_modules(model):
            module.set_reshard_after_forward(not gathered and not isinstance(module, Llama), recurse=False)
            if not gathered:
                module.reshard()


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _slot(name: str, parameter: nn.Parameter) -> Slot:
    sharded = parameter.data
    assert isinstance(sharded, DTensor), name
    assert all(placement in (Shard(0),) or placement.is_replicate() for placement in sharded.placements), name
    local_shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    local: torch.Tensor = sharded.to_local()
    num_rows = local_shape[0] if local.numel() else 0
    return Slot(name, tuple(sharded.shape), int(offset[0]) if num_rows else 0, num_rows, local)
