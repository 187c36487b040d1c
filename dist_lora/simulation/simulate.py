"""One training step, run only for its memory and traffic: real model, engine and loop, fake tensors and ranks.

Nothing is computed and nothing is sent: tensors are fake (sizes without contents), the process group returns at once.
Reading a tensor's value gives zero; after a run's first steps no allocation or collective depends on values.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dist_lora.base.index import WeightIndex
from dist_lora.base.quant.published import BaseOnDisk
from dist_lora.checkpoint.saver import Saver
from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader, MicroBatch, StepBatch
from dist_lora.data.token_set import TokenSet
from dist_lora.engines.adapters import FlatAdapters
from dist_lora.errors import ConfigError
from dist_lora.herd.shape import Shape
from dist_lora.layout.choices import Layout, check_node_size, with_lr
from dist_lora.lora.origin import BaseIdentity
from dist_lora.lora.tokens import with_as_many
from dist_lora.simulation.collectives import Sent, Traffic, traffic
from dist_lora.simulation.tracker import KINDS, Kind, Memory, Moment, Tracker, register_run
from dist_lora.simulation.world import simulated_world
from dist_lora.text import count
from dist_lora.train.build import Base, ShardedModel, Trainee, shard_model
from dist_lora.train.command import loader_of
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World

MAX_MICRO_BATCHES = 3  # with more, only the first, second and last are run: those between are like the second
STEP = 3  # the first step in which the loop checks neither that gradients arrive nor how long steps take


@dataclass(frozen=True)
class Simulation:
    """Memory and communication of the fullest rank in one step.

    ``assumptions`` are sentences on how a run on the real machine differs.
    """

    peak_bytes: int
    composition: Mapping[Kind, int]  # at the peak
    timeline: tuple[Moment, ...]
    traffic: tuple[Traffic, ...]  # of one rank in the step
    host_bytes: int  # offloaded by this rank
    layout: Layout
    micro_batches: int  # of this rank, in the step
    tokens: int  # of a micro-batch
    assumptions: tuple[str, ...]
    seconds: float  # that the simulation took


class _ZeroValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives zero as the value of a fake tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].dtype.is_floating_point else 0
        return func(*args, **(kwargs or {}))


def simulate(
    config: Config,
    shape: Shape,
    *,
    num_nodes: int,
    gpus_per_node: int,
    device_bytes: int,
    device: Literal["gpu", "cpu"] = "gpu",
    has_bf16: bool = True,
    document_tokens: int | None = None,
) -> Simulation:
    """One optimizer step of a config on simulated machines; takes 5 to 10 s for 8B and 40 to 60 s for 405B on one core.

    Local: it opens a process group of its own, so this process must not have one. It simulates the first rank, whose shards
    are the largest.

    Args:
        device_bytes: memory of a GPU, by which ``parallel``'s ``auto`` is resolved.
        device: for which ``auto`` is resolved for dtype, attention and recomputation.
        has_bf16: whether those GPUs compute in bf16.
        document_tokens: length of every document; None is ``train.sequence_length``. A sequence holds as many as fit, or one
            without ``train.packing``.

    Raises:
        ConfigError: settings contradict each other, the shape or the world; or there is no GPU.
    """
    started_s = time.monotonic()
    config = config.model_copy(update={"lora": with_as_many(config.lora)})
    if num_nodes < 1 or gpus_per_node < 1:
        raise ConfigError(
            f"machines: found {count(num_nodes, 'node')} of {count(gpus_per_node, 'GPU')}, expected at least one of each (--nodes, --gpus-per-node)"
        )
    num_ranks, local_size = num_nodes * gpus_per_node, config.parallel.node_size or gpus_per_node
    check_node_size(world_size=num_ranks, local_size=local_size)
    with simulated_world(num_nodes=num_ranks // local_size, gpus_per_node=local_size) as world:
        micro_batches = full_batches(config, world, document_tokens).batch(0).micro_batches
        loader = full_batches(config, world, document_tokens, _Batches)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        # FSDP2's meshes need real tensors; DeepSpeed creates parameters while it shards, which must be fake.
        with fake if config.parallel.engine == "zero3" else nullcontext():
            sharded = shard_model(
                config, shape, world, name=config.model.name, memory_bytes=device_bytes, on_gpu=device == "gpu",
                has_bf16=has_bf16,
            )  # fmt: skip
        memory, sent, host_bytes = _step(
            config, shape, sharded, world, loader, fake, num_micro_batches=len(micro_batches)
        )
    return Simulation(
        peak_bytes=memory.peak.total_bytes,
        composition=memory.composition,
        timeline=memory.timeline,
        traffic=traffic(sent, world),
        host_bytes=host_bytes,
        layout=sharded.engine.layout,
        micro_batches=len(micro_batches),
        tokens=max(len(micro.ids) for micro in micro_batches),
        assumptions=_assumptions(config, shape, sharded, num_micro_batches=len(micro_batches)),
        seconds=time.monotonic() - started_s,
    )


def _assumptions(config: Config, shape: Shape, sharded: ShardedModel, *, num_micro_batches: int) -> tuple[str, ...]:
    assumptions = [
        "tensors have sizes but no contents, and collectives return at once: nothing is computed or sent",
        "one stream: on a GPU a gathered block may stay allocated until the stream that uses it has finished with it",
        "operators' internal workspace, the CUDA context, NCCL's buffers and fragmentation aren't included",
    ]
    if shape.given_parameters is not None:
        llama = dataclasses.replace(shape, given_parameters=None).num_parameters()
        assumptions.append(
            f"the model is a Llama of these sizes, with {llama:,} weights instead of {shape.given_parameters:,}"
        )
    if sharded.choices.attention == "varlen":
        assumptions.append(
            "flash attention allocates its declared outputs and softmax statistics; its kernel doesn't run"
        )
    if sharded.engine.layout.base_on_host and sharded.engine.name != "none":
        assumptions.append("the gathered block's shards, fetched from the host, aren't counted on the device")
    if num_micro_batches > MAX_MICRO_BATCHES:
        assumptions.append(
            f"of {num_micro_batches} micro-batches the first two and the last were run; those between are like the second"
        )
    return tuple(assumptions)


# The step


def _step(
    config: Config,
    shape: Shape,
    sharded: ShardedModel,
    world: World,
    loader: Loader,
    fake: FakeTensorMode,
    *,
    num_micro_batches: int,
) -> tuple[Memory, list[Sent], int]:
    """Memory and collectives of a step, and the bytes in host memory."""
    model, engine = sharded.model, sharded.engine
    with engine.simulating(), fake, _ZeroValues():  # type: ignore[no-untyped-call]
        engine.materialize(model)
        adapters = engine.adapters(sharded.tensors, has_two_rates=config.optim.lr_ratio != 1.0)
        assert isinstance(adapters, FlatAdapters)
        identity = BaseIdentity(config.model.name, None, None, None)
        base = Base(Path(), {}, shape, BaseOnDisk(WeightIndex(Path(), {}), {}), None, identity)
        trainee = Trainee(base, model, engine, adapters, sharded.choices.attention, sharded.precision, {})
        config = with_lr(config, shape)
        adapters.start_training(config.optim)
        step = TrainStep(config, trainee, loader=loader, num_steps=STEP, saver=Saver(world), world=world)
        model.train()
        for _ in range(engine.tracing_steps):
            step.take(STEP)
        tracker = Tracker()
        register_run(tracker, model, engine, adapters)
        with tracker:
            step.take(STEP)
        tracker.register("gradients", adapters.gradients())
    second = tracker.sent[slice(*tracker.forwards[1:3])] if num_micro_batches > MAX_MICRO_BATCHES else []
    return tracker.memory(), [*tracker.sent, *second * (num_micro_batches - MAX_MICRO_BATCHES)], tracker.host_bytes


class _Batches(Loader):
    """The loop's loader, whose document bounds stay real values under the fake mode."""

    def batch(self, step: int) -> StepBatch:
        """See ``Loader.batch``."""
        with _disable_current_modes():
            batch = super().batch(step)
        self._all = tuple(map(_without_values, batch.micro_batches))  # those that aren't run take memory too
        chosen = self._all
        if len(chosen) > MAX_MICRO_BATCHES:
            chosen = (*chosen[: MAX_MICRO_BATCHES - 1], chosen[-1])
        return dataclasses.replace(batch, micro_batches=chosen)


def _without_values(micro: MicroBatch) -> MicroBatch:
    ids, positions, index, labels = (
        torch.empty(len(values), dtype=values.dtype)
        for values in (micro.ids, micro.positions, micro.target_index, micro.labels)
    )
    return dataclasses.replace(micro, ids=ids, positions=positions, target_index=index, labels=labels)


def full_batches(
    config: Config, world: World, document_tokens: int | None = None, kind: type[Loader] = Loader
) -> Loader:
    """The loop's loader with full sequences, in which every token but the first is trained on."""
    train = config.train
    length = min(document_tokens or train.sequence_length, train.sequence_length)
    per_sequence = train.sequence_length // length if train.packing else 1
    count = train.global_batch * per_sequence
    ids = np.broadcast_to(np.zeros(1, np.uint32), count * length)
    lengths = np.full(count, length, np.int64)
    documents = TokenSet(
        ids=ids,
        is_target=np.broadcast_to(np.ones(1, bool), count * length),
        starts=np.arange(count, dtype=np.int64) * length,
        lengths=lengths,
        num_targets=lengths - 1,
        sample_ids=np.arange(count),
    )
    # They are of no set, whatever sets the config has.
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": "full sequences"})})
    return loader_of(config, documents, world, kind)


def as_json(simulation: Simulation) -> dict[str, Any]:
    """A simulation in JSON's types; a moment of the timeline is [event, phase, bytes of each of ``kinds``]."""
    plain = dataclasses.asdict(simulation)
    plain["pretended"] = plain.pop("assumptions")
    plain["kinds"] = list(KINDS)
    plain["timeline"] = [[moment.event, moment.phase, *moment.by_kind] for moment in simulation.timeline]
    return plain
