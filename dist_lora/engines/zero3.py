"""Engine ``zero3``: DeepSpeed ZeRO-3 behind the same interface as ``fsdp2``; the only file that imports deepspeed.

A parameter is sharded flat over all ranks, whatever its rows are; the last part may end in padding.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_lora.base.llama import Block, Llama, move_buffers
from dist_lora.base.stream import Slot
from dist_lora.config.schema import OptimSection
from dist_lora.engines.adapters import Adapters, FlatAdapters, Part
from dist_lora.engines.engine import Engine, Forward
from dist_lora.errors import ConfigError
from dist_lora.layout.choices import Layout
from dist_lora.layout.zero3 import max_live_elements, reduced_elements
from dist_lora.lora.attach import TrainedTensor
from dist_lora.lora.state import Kind, Piece
from dist_lora.text import count
from dist_lora.world.world import World

# N elements of a parameter

NEEDED = "0.19.8"
KEPT = -1  # no module's id: while it is among a parameter's users, DeepSpeed keeps the parameter gathered


class Zero3(Engine):
    """Every parameter of the base and the adapters is sharded flat over all ranks and all-gathered block by block."""

    name = "zero3"
    tracing_steps = 2  # DeepSpeed traces the order of modules, and then prefetches by it

    def __init__(self, world: World, layout: Layout) -> None:
        super().__init__(world, layout)
        self._deepspeed = _load_deepspeed(world)
        self._model: Llama | None = None
        self._settings: dict[str, Any] = {}
        self._engine: Any = None  # DeepSpeed's, set by ``adapters``

    def shard(self, model: Llama) -> str:
        """See ``Engine.shard``. Call it while the parameters are on meta."""
        self._model, self._settings = model, self._settings_for(model)
        self._gather_by_block(model)
        converted: dict[int, nn.Parameter] = {}
        init = self._deepspeed.zero.Init(config_dict_or_path=self._settings)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in converted:
                        converted[id(parameter)] = self._converted(parameter, init)
                    module._parameters[name] = converted[id(parameter)]
        return f"the base is sharded flat over {count(self.world.world_size, 'rank')} (ZeRO-3)"

    def _gather_by_block(self, model: Llama) -> None:
        """One all-gather for a block's forward and one for its backward, including the recomputation.

        By default DeepSpeed gathers each linear for its forward, its recomputation and its backward.
        """
        self._deepspeed.utils.set_z3_leaf_modules(model, [Block])
        # DeepSpeed collects a block's gradients once that of its input is computed (0.19.8, stage3.py:1536): if the
        # input needs none, it would do so before there are any.
        trained = (block for block in model.blocks() if any(p.requires_grad for p in block.parameters()))
        first = next(trained, None)
        if first is not None:
            first.register_forward_pre_hook(_ask_for_gradient)

    def _converted(self, parameter: nn.Parameter, init: Any) -> nn.Parameter:
        """A DeepSpeed parameter in place of one on meta: of the same whole shape, and without memory."""
        whole = torch.empty(1, dtype=parameter.dtype, device=self.world.device).expand(parameter.shape)
        parameter = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        init._convert_to_deepspeed_param(parameter)
        return parameter

    def materialize(self, model: Llama) -> None:
        """See ``Engine.materialize``. Only this rank's shard is ever allocated."""
        device, world_size = self.world.device, self.world.world_size
        target = torch.device("cpu") if self.layout.base_on_host else device
        partitions = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
        for parameter in _dynamic(model.parameters()):
            # The state that DeepSpeed's own partition() sets (0.19.8, partition_parameters.py:1789), which needs the
            # whole tensor.
            num_elements = -(-parameter.ds_numel // world_size)
            shard: Any = torch.zeros(num_elements, dtype=parameter.dtype, device=target, pin_memory=target != device)
            shard.ds_numel, shard.final_location = num_elements, None
            shard.status = partitions.PartitionedParamStatus.AVAILABLE
            parameter.ds_tensor, parameter.ds_numel_aligned = shard, num_elements * world_size
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)
            parameter.ds_status = partitions.ZeroParamStatus.NOT_AVAILABLE
        move_buffers(model, device)

    def slots(self, model: Llama) -> list[Slot]:
        """See ``Engine.slots``."""
        named = model.base_parameters()
        return [
            self._slot(parameter, *model.stored_as(name))
            for name, parameter in zip(named, _dynamic(named.values()), strict=True)
        ]

    def _slot(self, parameter: Any, tensor: str, part: str) -> Slot:
        held = _held(parameter, self.world.world_rank)
        return Slot(tensor, part, tuple(parameter.ds_shape), held.start, parameter.ds_tensor[: len(held)])

    def adapters(self, tensors: Sequence[TrainedTensor], *, has_two_rates: bool = False) -> Adapters:
        """See ``Engine.adapters``. All ranks call it."""
        assert self._model is not None, "shard was not called"
        # Its settings from the config, and its state, are set by start_training.
        has_ratio = [has_two_rates and tensor.attribute == "lora_B" for tensor in tensors]
        groups = [
            {"params": [t.parameter for t, has in zip(tensors, has_ratio, strict=True) if has == wanted]}
            for wanted in sorted(set(has_ratio))
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        self._engine = self._deepspeed.initialize(
            model=self._model, optimizer=optimizer, config=self._settings, dist_init_required=False
        )[0]
        return Zero3Adapters(tensors, self._engine, self.world)

    def forward_of(self, model: Llama) -> Forward:
        """See ``Engine.forward_of``."""
        assert self._engine is not None, "adapters was not called"
        forward: Forward = self._engine
        return forward

    @contextlib.contextmanager
    def simulating(self) -> Iterator[None]:
        """See ``Engine.simulating``: while it traces, DeepSpeed compares its order of modules with rank 0's."""
        coordinator: Any = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
        compare = coordinator.assert_ints_same_as_other_ranks
        coordinator.assert_ints_same_as_other_ranks = lambda ints: None
        try:
            yield
        finally:
            coordinator.assert_ints_same_as_other_ranks = compare

    def keep_gathered(self, model: Llama, gathered: bool) -> None:
        """See ``Engine.keep_gathered``. All ranks call it."""
        self._engine.empty_partition_cache()  # frees all, also what was prefetched
        if gathered:
            parameters = _dynamic(model.parameters())
            parameters[0].all_gather(param_list=parameters)
            for parameter in parameters:
                # DeepSpeed frees a parameter after a module's forward unless it lists another module that uses it.
                parameter.ds_active_sub_modules.add(KEPT)

    def _settings_for(self, model: Llama) -> dict[str, Any]:
        """DeepSpeed's configuration. There is no 16-bit section: it would cast scales and adapters."""
        blocks = model.blocks()
        block = max(sum(p.numel() for p in b.parameters()) for b in blocks)
        in_blocks = [sum(p.numel() for p in b.parameters() if p.requires_grad) for b in blocks]
        outside = sum(p.numel() for p in model.parameters() if p.requires_grad) - sum(in_blocks)
        head = model.shape.vocab * model.shape.hidden
        zero: dict[str, Any] = {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # norms are sharded too, not replicated
            "stage3_prefetch_bucket_size": block,  # the next block is gathered while this one computes
            "stage3_max_live_parameters": max_live_elements(head=head, layer=block),
            "stage3_max_reuse_distance": 1,  # only the head is kept from its forward to its backward, which follows
            "reduce_bucket_size": reduced_elements([*in_blocks, outside]),
            "contiguous_gradients": False,  # they are copied once more for the reduction anyway
            "overlap_comm": True,
        }
        host = {"device": "cpu", "pin_memory": self.world.device.type == "cuda"}
        if self.layout.base_on_host:
            zero["offload_param"] = host
        if self.layout.optimizer_on_host:
            zero["offload_optimizer"] = host
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop sets which micro-batch is a step's last
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW on the host too, for identical numbers
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},  # it would synchronize the GPU before each forward
        }


class Zero3Adapters(FlatAdapters):
    """Trained tensors sharded flat over all ranks, updated by torch's AdamW inside DeepSpeed's optimizer.

    Each rank's parts are in DeepSpeed's flat fp32 partitions; what the forward gathers is ``ds_tensor``, which may
    be the same memory or a copy.
    """

    def __init__(self, tensors: Sequence[TrainedTensor], engine: Any, world: World) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._held: list[Any] = []
        flat_parameters: list[nn.Parameter] = []
        parts: list[Part] = []
        for tensor, parameter in zip(tensors, _dynamic(t.parameter for t in tensors), strict=True):
            held = _held(parameter, world.world_rank)
            if held:
                parts.append(Part(tensor.name, held.start, held.stop, flat_index=len(flat_parameters), offset=0))
                self._held.append(parameter)
                partition = self._partition(parameter, self._zero.fp32_partitioned_groups_flat)
                flat_parameters.append(nn.Parameter(partition))
        super().__init__(tensors, flat_parameters=flat_parameters, parts=parts, world=world, optimizer_on_host=False)
        shapes = zip(tensors, _dynamic(t.parameter for t in tensors), strict=True)
        self.shapes = {tensor.name: tuple(parameter.ds_shape) for tensor, parameter in shapes}

    def _partition(self, parameter: Any, flats: Sequence[Tensor]) -> Tensor:
        """This rank's part of a parameter, with its padding, in the flat tensors of DeepSpeed's groups."""
        group: int
        group, offset, num_elements = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return flats[group].detach()[offset : offset + num_elements]

    def _has_filled(self) -> None:
        self._copy_to_shards()

    def _copy_to_shards(self) -> None:
        for parameter, flat in zip(self._held, self.flat_parameters, strict=True):
            parameter.ds_tensor.copy_(flat.detach())

    def start_training(self, section: OptimSection) -> None:
        """See ``Adapters``."""
        optimizer = self._zero.optimizer
        self._rates = (1.0, section.lr_ratio)[: len(optimizer.param_groups)]
        for group in optimizer.param_groups:
            group["betas"], group["eps"] = (section.beta1, section.beta2), section.eps
            group["weight_decay"] = section.weight_decay
        self._zero.clip_grad = section.max_grad_norm or 0.0
        for flat in self._zero.fp32_partitioned_groups_flat:
            values = flat.detach()
            # fused AdamW needs the step count on the parameter's device, as a tensor.
            count = torch.zeros((), dtype=torch.float32, device=values.device)
            moments = {"exp_avg": torch.zeros_like(values), "exp_avg_sq": torch.zeros_like(values)}
            optimizer.state[flat] = {"step": count, **moments}

    def optimizer_state(self) -> list[Tensor]:
        """See ``FlatAdapters``."""
        return [values for of_flat in self._zero.optimizer.state.values() for values in of_flat.values()]

    def gradients(self) -> list[Tensor]:
        """See ``FlatAdapters``: after a step's last backward, until the step."""
        return [self._zero.get_local_fp32_grad_for_param(parameter) for parameter in self._held]

    def begin_step(self) -> None:
        """See ``Adapters``."""
        self._zero.zero_grad()

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See ``Adapters``. The gradients are summed over the ranks right away."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages over the ranks; ours is a sum.
        self._engine.backward(loss * self.world.world_size, scale_wrt_gas=False)

    def reduce(self, scalars: Tensor) -> None:
        """See ``Adapters``: the gradients were already summed in the backward."""
        self.world.sum(scalars)

    def step(self, lr: float) -> Tensor:
        """See ``Adapters``. DeepSpeed reads the norm itself."""
        for group, rate in zip(self._zero.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * rate
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())  # infinity also where it is NaN
        return torch.tensor(norm, dtype=torch.float64, device=self.world.device)

    def copies_agree(self) -> bool:
        """Whether all ranks that hold the same trained weights hold the same bytes: here no two hold the same."""
        return True

    def restore(self, values: Mapping[Piece, Tensor], *, num_steps: int) -> None:
        """See ``Adapters``."""
        state = self._state()
        for part in self.parts:
            for kind, flats in state.items():
                self._view(part, flats).copy_(values[Piece(part.name, kind, part.start, part.stop)])
        for of_flat in self._zero.optimizer.state.values():
            of_flat["step"].fill_(num_steps)
        self._copy_to_shards()

    def _state(self) -> dict[Kind, Sequence[Tensor]]:
        flats = self._zero.fp32_partitioned_groups_flat
        of_flats = [self._zero.optimizer.state[flat] for flat in flats]

        def of_parts(key: str) -> list[Tensor]:
            return [self._partition(parameter, [of_flat[key] for of_flat in of_flats]) for parameter in self._held]

        return {"adapter": self.flat_parameters, "exp_avg": of_parts("exp_avg"), "exp_avg_sq": of_parts("exp_avg_sq")}

    def _sum_over_shards(self, values: Tensor) -> Tensor:
        return self.world.sum(values)

    def _copies(self) -> tuple[int, int]:
        return 0, 1


def _ask_for_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A hook before a block's forward: makes its input a leaf that requires a gradient, if it isn't part of a graph."""
    x, *rest = inputs
    if x.requires_grad or not torch.is_grad_enabled():
        return None
    return (x.detach().requires_grad_(), *rest)


def _held(parameter: Any, world_rank: int) -> range:
    """The elements of a whole parameter that a rank holds; the rest of its shard is padding."""
    num_elements, per_rank = parameter.ds_numel, parameter.ds_tensor.ds_numel
    return range(min(num_elements, world_rank * per_rank), min(num_elements, (world_rank + 1) * per_rank))


def _dynamic(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """The parameters with DeepSpeed's attributes, which their type doesn't declare."""
    return list(parameters)


# DeepSpeed itself


def _load_deepspeed(world: World) -> Any:
    """The module, on the world's process group, warning on the first rank's stderr only.

    Raises:
        ConfigError: it isn't installed, can't be imported, or is older than ``NEEDED``.
    """
    assert dist.is_initialized(), "zero3 needs a process group, even for a single process"
    _set_environment(world)
    deepspeed = _import_deepspeed()
    _check_version(str(deepspeed.__version__))
    _quieten(deepspeed, world)
    # The groups that it caches may be those of an earlier run in this process.
    importlib.import_module("deepspeed.utils.groups")._release_process_group_references()
    if world.device.type == "cpu":
        # Its shared-memory helper for inference would be compiled now (g++, ninja, a minute), and is never used here. On a
        # GPU there is none, and touching this table tries out all of DeepSpeed's operators, with lines on stdout (0.19.8).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    return deepspeed


def _set_environment(world: World) -> None:
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # unset, it is guessed, with a warning
    # It gets its device from these two. On a CPU, without the second, it calls numactl at each reduction.
    os.environ["LOCAL_RANK"] = str(world.local_rank if world.device.index is None else world.device.index)
    os.environ["LOCAL_SIZE"] = str(world.local_size)


def _import_deepspeed() -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        is_absent = error.name == "deepspeed"
        problem = "it is not installed" if is_absent else f"the installed one lacks {error.name}"
        raise _needed(problem) from error
    except Exception as error:  # built against another torch, a broken extension: importing it runs a lot of code
        spec = importlib.util.find_spec("deepspeed")
        where = spec.origin if spec else "the installed one"
        raise _needed(f"{where} can't be imported ({type(error).__name__}: {error})") from error


def _check_version(installed: str) -> None:
    from packaging.version import Version

    if Version(installed) < Version(NEEDED):
        raise _needed(
            f"{installed} is installed: before 0.19.3 activation checkpointing fails over a frozen base, and before "
            "0.19.8 a NaN gradient is treated as one of norm 1 and trained on"
        )


def _needed(problem: str) -> ConfigError:
    return ConfigError(
        f"parallel.engine: zero3 needs DeepSpeed {NEEDED} or newer, and {problem}. "
        f'Run pip install "deepspeed>={NEEDED}" where torch is installed already, or set parallel.engine=fsdp2.'
    )


def _quieten(deepspeed: Any, world: World) -> None:
    logger: logging.Logger = deepspeed.utils.logger
    logger.setLevel(logging.WARNING if world.is_first else logging.ERROR)
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:  # a handler of another kind keeps its stream
            handler.setStream(sys.stderr)  # stdout is for results
    # torch 2.13 has new names for functions that DeepSpeed calls, and warns on each rank.
    warnings.filterwarnings(
        "ignore", message=r".*torch\.distributed\.\w+_tensor. is deprecated", category=FutureWarning
    )
