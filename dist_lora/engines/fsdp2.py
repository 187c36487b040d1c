"""Engine ``fsdp2``: the frozen base in row shards, all-gathered block by block while it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_lora.base.llama import Llama, materialize
from dist_lora.base.stream import Slot
from dist_lora.base.trained import TrainedWeight
from dist_lora.engines.adapters import Adapters, FlatAdapters, Part, ReplicatedAdapters, same_on_all
from dist_lora.engines.engine import Engine
from dist_lora.layout.choices import Layout
from dist_lora.lora.attach import TrainedTensor
from dist_lora.lora.layer import LoraAdapter, TokenRows
from dist_lora.text import count
from dist_lora.world.world import World


class Fsdp2(Engine):
    """Every base parameter is sharded by rows over the ranks of a node or of the world.

    Adapters are replicated on every rank, ignored by FSDP2 (only their gradients are reduced, once per step), or
    sharded by rows within each node on a mesh of their own.
    """

    name = "fsdp2"

    def __init__(self, world: World, layout: Layout) -> None:
        super().__init__(world, layout)
        self._groups: list[FSDPModule] = []  # of sharded adapters, one per block, and of trained rows
        self._meshes: dict[str, DeviceMesh] = {}  # cached: each creates process groups of its own

    def shard(self, model: Llama) -> str:
        """See ``Engine.shard``. Call it while the parameters are on meta."""
        layout = self.layout
        frozen = {id(p) for p in model.base_parameters().values()}
        trained = {p for p in model.parameters() if id(p) not in frozen}
        if layout.adapters == "shard":
            mesh = self._mesh("node")
            held = [_trained_modules(block, LoraAdapter) for block in model.model.layers]
            held.append(_trained_modules(model, TokenRows))
            self._groups = [_shard_adapters(modules, mesh) for modules in held if modules]
            # Gathered in the dtype that they are computed in: half the bytes, where that has 16 bits.
            mixed = MixedPrecisionPolicy(
                param_dtype=model.model.embed_tokens.weight.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            unfrozen = [_trained_modules(block, TrainedWeight) for block in (*model.model.layers, model.model.norm)]
            self._groups += [_shard_adapters(modules, mesh, mixed) for modules in unfrozen if modules]
            trained = set()
        mesh = self._mesh(layout.base_shard)
        policy = self._offload_policy()
        # No MixedPrecisionPolicy: the base is stored in the type it is computed in, and a policy would
        # also cast what must not be cast (the scales of a quantized base).
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained, offload_policy=policy)
        if not model.shape.tied:
            for end in (model.model.embed_tokens, model.lm_head):
                fully_shard(end, mesh=mesh, reshard_after_forward=True, ignored_params=trained, offload_policy=policy)
                # The loss makes its gradient in the forward and a frozen embedding needs none: neither is used again.
                end.set_unshard_in_backward(False)  # type: ignore[operator]
        # The root holds the last norm and, where the head is tied, the embedding that input and head share.
        fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=trained, offload_policy=policy)
        return f"the base is sharded by rows over {count(mesh.shape[-1], 'rank')} (FSDP2)"

    def _mesh(self, over: str) -> DeviceMesh:
        if over not in self._meshes:
            self._meshes[over] = self._make_mesh(over)
        return self._meshes[over]

    def _make_mesh(self, over: str) -> DeviceMesh:
        world = self.world
        kind = world.device.type
        if over == "node" and world.num_nodes > 1:
            return init_device_mesh(kind, (world.num_nodes, world.local_size), mesh_dim_names=("node", "shard"))
        return init_device_mesh(kind, (world.world_size,), mesh_dim_names=("shard",))

    def _offload_policy(self) -> OffloadPolicy:
        if not self.layout.base_on_host:
            return OffloadPolicy()
        # Between ranks a layer's shards are copied to the device on a stream of FSDP2's own, ahead of the layer's all-gather
        # (torch 2.13, foreach_all_gather). A single rank copies them on the stream that computes: engine none is for that.
        return CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")

    def materialize(self, model: Llama) -> None:
        """See ``Engine.materialize``."""
        device = self.world.device
        materialize(model, device, base_device=torch.device("cpu") if self.layout.base_on_host else device)

    def slots(self, model: Llama) -> list[Slot]:
        """See ``Engine.slots``."""
        return [_slot(name, parameter, *model.stored_as(name)) for name, parameter in model.base_parameters().items()]

    def frozen_shards(self, model: Llama) -> list[tuple[str, Tensor]]:
        """See ``Engine.frozen_shards``. The root stays gathered after a forward: it is resharded first."""
        for module in _sharded_modules(model):
            module.reshard()
        return super().frozen_shards(model)

    def adapters(self, tensors: Sequence[TrainedTensor], *, has_two_rates: bool = False) -> Adapters:
        """See ``Engine.adapters``."""
        on_host = self.layout.optimizer_on_host
        if self.layout.adapters == "replicate":
            return ReplicatedAdapters(tensors, self.world, optimizer_on_host=on_host)
        return ShardedAdapters(tensors, self.world, self._groups, mesh=self._mesh("node"), optimizer_on_host=on_host)

    def keep_gathered(self, model: Llama, gathered: bool) -> None:
        """See ``Engine.keep_gathered``. All ranks call it."""
        for module in _sharded_modules(model):
            module.set_reshard_after_forward(not gathered and not isinstance(module, Llama), recurse=False)
            if not gathered:
                module.reshard()


class ShardedAdapters(FlatAdapters):
    """Trained tensors sharded by rows over the ranks of a node by FSDP2, and replicated over nodes.

    A micro-batch's gradients are summed within the node, where each rank keeps those of its rows; between nodes they
    are summed once per step.
    """

    def __init__(
        self,
        tensors: Sequence[TrainedTensor],
        world: World,
        groups: Sequence[FSDPModule],
        *,
        mesh: DeviceMesh,
        optimizer_on_host: bool,
    ) -> None:
        self._groups, self._shard_group = list(groups), mesh["shard"].get_group()
        self._replica_group = mesh["node"].get_group() if mesh.ndim > 1 else None
        for group in groups:
            # The first all-gather may move a shard to a padded copy: after it the shard stays in place.
            group.unshard()
            group.reshard()
        self._held: list[nn.Parameter] = []
        flat_parameters: list[nn.Parameter] = []
        parts: list[Part] = []
        for tensor in tensors:
            rows = _Rows(tensor.parameter.data)
            if rows.local.numel() == 0:
                continue  # fewer rows than ranks
            end = rows.first + rows.local.numel()
            parts.append(Part(tensor.name, rows.first, end, flat_index=len(flat_parameters), offset=0))
            flat_parameters.append(nn.Parameter(rows.local.detach().view(-1)))
            self._held.append(tensor.parameter)
        super().__init__(
            tensors, flat_parameters=flat_parameters, parts=parts, world=world, optimizer_on_host=optimizer_on_host
        )

    def gradients(self) -> list[Tensor]:
        """See ``FlatAdapters``."""
        gradients = []
        for parameter, flat in zip(self._held, self.flat_parameters, strict=True):
            gradient = parameter.grad
            assert gradient is None or isinstance(gradient, DTensor)
            gradients.append(torch.zeros_like(flat) if gradient is None else gradient.to_local().reshape(-1))
        return gradients

    def begin_step(self) -> None:
        """See ``Adapters``."""
        for tensor in self.tensors:
            tensor.parameter.grad = None

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See ``Adapters``."""
        for group in self._groups:
            group.set_requires_all_reduce(is_last)
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, scalars: Tensor) -> None:
        """See ``Adapters``: the gradients were already summed in the backward."""
        self.world.sum(scalars)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return self._sum_over_shards(torch.zeros((), dtype=torch.float64, device=self.world.device)).sqrt()
        return super()._norm(gradients)

    def _sum_over_shards(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self._shard_group)
        return values

    def copies_agree(self) -> bool:
        """See ``Adapters``."""
        is_same = self._replica_group is None or same_on_all(
            self.flat_parameters, self.world.device, group=self._replica_group
        )
        return not self.world.sum(torch.tensor([float(not is_same)], device=self.world.device)).item()

    def _copies(self) -> tuple[int, int]:
        return self.world.world_rank // self.world.local_size, self.world.num_nodes


def _trained_modules(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, kind)]


def _shard_adapters(
    adapters: list[nn.Module], mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None
) -> FSDPModule:
    """One FSDP group of what is trained and used one after the other: of a block, or the rows of embedding and head."""
    group = fully_shard(adapters, mesh=mesh, reshard_after_forward=True, mp_policy=policy or MixedPrecisionPolicy())[0]
    # Sums, not means: the loss of a micro-batch is already divided by the targets of the whole step.
    group.set_gradient_divide_factor(1.0)
    group.set_force_sum_reduction_for_comms(True)
    return group


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that hold the base; adapters have FSDP groups of their own."""
    trained = {id(module) for module in model.modules() if isinstance(module, LoraAdapter | TokenRows | TrainedWeight)}
    return [m for m in model.modules() if isinstance(m, FSDPModule) and id(m) not in trained]


class _Rows:
    """The rows of a row-sharded tensor that this rank holds: ``local``, and the number of its first element."""

    def __init__(self, sharded: Tensor) -> None:
        assert isinstance(sharded, DTensor)
        assert all(p in (Shard(0),) or p.is_replicate() for p in sharded.placements), sharded.placements
        _, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
        self.local: Tensor = sharded.to_local()
        # Not sharded[0].numel(): indexing a DTensor is a collective.
        self.width = math.prod(sharded.shape[1:])
        self.first = int(offset[0]) * self.width if self.local.numel() else 0


def _slot(name: str, parameter: nn.Parameter, tensor: str, part: str) -> Slot:
    sharded = parameter.data
    rows = _Rows(sharded)
    return Slot(tensor, part, tuple(sharded.shape), rows.first, rows.local.view(-1))
