"""Memory per rank at the peak of a step, by arithmetic: no torch, no weights, a fraction of a second.

It is that of the fullest rank: the first, where rows don't divide evenly.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

from dist_lora.config.schema import Config, LoraSection, ParallelSection
from dist_lora.herd.shape import Shape, module_path
from dist_lora.herd.unfrozen import trained_weights, unfrozen_weights
from dist_lora.layout.choices import (
    TIGHT,
    Choices,
    WholeBase,
    check_node_size,
    choose,
    choose_recomputed,
    describe_recomputed,
)
from dist_lora.layout.moments import moments_of
from dist_lora.layout.setup import Setup, base_bytes_on_host, base_bytes_per_rank, cut_of_step
from dist_lora.layout.storage import FP32
from dist_lora.text import GIB, size

# Only visible on a machine with such a GPU: CUDA's context and the libraries' kernels, NCCL's buffers, and fragmentation of
# the caching allocator. Figures for CUDA 12 and NCCL 2: about 0.5 GiB, and 0.5 to 1 GiB for several communicators;
# fragmentation as a fraction of the allocated bytes.
CONTEXT_BYTES = 1.5 * GIB
FRAGMENTATION = 0.05


def setup_of(
    config: Config,
    shape: Shape,
    *,
    num_nodes: int,
    gpus_per_node: int,
    device_bytes: int,
    on_gpu: bool = True,
    has_bf16: bool = True,
    name: str | None = None,
) -> Setup:
    """The setup of a config on ``num_nodes`` nodes, with ``auto`` resolved as in a run, which calls it too.

    Args:
        device_bytes: memory of one rank's device, the smallest of all; on a CPU its share of the host's.
        name: the model's, for errors; None takes ``model.name``.

    Raises:
        ConfigError: a GPU has no bf16, as set; settings of ``parallel`` contradict each other or the world; the model lacks a
            layer, or the number of them that are to recompute; its linears can't be quantized with ``model.quant``.
    """
    num_ranks = num_nodes * gpus_per_node
    local_size = config.parallel.node_size or gpus_per_node
    check_node_size(world_size=num_ranks, local_size=local_size)
    choices_with = functools.partial(
        choose,
        config,
        shape,
        name=name or config.model.name,
        world_size=num_ranks,
        local_size=local_size,
        device_bytes=device_bytes,
        on_gpu=on_gpu,
        has_bf16=has_bf16,
    )
    gpu_bytes, wanted = device_bytes if on_gpu else None, config.train.activation_checkpointing
    unresolved = _setup(config, shape, choices_with(), num_ranks=num_ranks, local_size=local_size, on_gpu=on_gpu)
    setup = _with_recomputed(unresolved, wanted, gpu_bytes=gpu_bytes)
    whole_base = _whole_base(setup, config.parallel, gpu_bytes=gpu_bytes)
    if whole_base is None:
        return setup
    unresolved = replace(unresolved, choices=choices_with(whole_base=whole_base))
    return _with_recomputed(unresolved, wanted, gpu_bytes=gpu_bytes)


def _setup(config: Config, shape: Shape, choices: Choices, *, num_ranks: int, local_size: int, on_gpu: bool) -> Setup:
    train = config.train
    rank_sequences, micro_sequences, accumulation_steps = cut_of_step(train, num_ranks)
    return Setup(
        shape=shape,
        quant=config.model.quant,
        choices=choices,
        lora_rank=max(config.lora.all_ranks(), default=0),
        lora_ranks=_lora_ranks(config.lora, num_layers=shape.num_layers),
        trained_weights=trained_weights(config, shape),
        targets=config.lora.target_names(),
        layers=config.lora.layer_indices(shape.num_layers),
        unfrozen=unfrozen_weights(config, shape),
        micro_sequences=micro_sequences,
        sequence_tokens=train.sequence_length,
        rank_sequences=rank_sequences,
        global_batch=train.global_batch,
        accumulation_steps=accumulation_steps,
        joins_documents=micro_sequences > 1 and choices.attention != "varlen",
        has_dropout=config.lora.dropout > 0,
        trained_rows=shape.trained_rows(config.lora),
        num_ranks=num_ranks,
        local_size=local_size,
        on_gpu=on_gpu,
    )


def _lora_ranks(section: LoraSection, *, num_layers: int) -> tuple[tuple[str, int], ...]:
    if section.modules is not None:
        return tuple((module.name, module.rank) for module in section.modules)
    layers, targets = section.layer_indices(num_layers), section.target_names()
    return tuple((module_path(target, layer=layer), section.rank) for layer in layers for target in targets)


def _whole_base(setup: Setup, section: ParallelSection, *, gpu_bytes: int | None) -> WholeBase | None:
    """Whether ``auto`` keeps the whole base on each GPU: where that fits, and no layer more recomputes for it.

    A gathered layer crosses fast links while another computes; a layer that recomputes costs time on any machine.

    Args:
        setup: with the base sharded, and the layers that recompute then.
        gpu_bytes: a GPU's memory, see ``choose_recomputed``; None on a CPU.

    Returns:
        None where there is nothing to decide: it is set, one rank holds all anyway, or the base isn't in the GPUs' memory.
    """
    layout = setup.layout
    if section.base_shard != "auto" or setup.num_ranks == 1 or layout.engine != "fsdp2" or layout.base_on_host:
        return None
    if gpu_bytes is None:
        return WholeBase(False, "not whole on each, since ranks on CPUs share the host's memory")
    if section.adapters == "shard":
        return WholeBase(False, "not whole on each, since the adapters are sharded (parallel.adapters)")
    whole = replace(layout, base_shard="gpu", adapters="replicate")
    needed, room = _needed_bytes(replace(setup, choices=replace(setup.choices, layout=whole))), TIGHT * gpu_bytes
    compared = f"in {size(room)} ({TIGHT:.0%} of a GPU)"
    if needed < room:
        return WholeBase(True, f"{size(needed)} with all that a step holds fit {compared}")
    return WholeBase(False, f"whole on each, {size(needed)} with all that a step holds don't fit {compared}")


def _needed_bytes(setup: Setup) -> int:
    held = memory_of(setup).device
    return held + reserve_bytes(held)


def _with_recomputed(setup: Setup, wanted: Literal["auto", "none", "all"] | int, *, gpu_bytes: int | None) -> Setup:
    def with_layers(layers: range) -> Setup:
        return replace(setup, choices=replace(setup.choices, recomputed=layers))

    num_layers = setup.shape.num_layers
    recomputed, because = choose_recomputed(
        wanted,
        num_layers=num_layers,
        first_trained=setup.first_trained,
        device_bytes=gpu_bytes,
        needed_bytes=lambda layers: _needed_bytes(with_layers(layers)),
    )
    line = f"recompute {describe_recomputed(recomputed, num_layers)}: {because}"
    reasons = (*setup.choices.reasons, line)
    return replace(setup, choices=replace(setup.choices, recomputed=recomputed, reasons=reasons))


def reserve_bytes(held_bytes: int) -> int:
    """What a GPU needs besides a run's tensors: CUDA's context, NCCL's buffers, fragmentation."""
    return int(CONTEXT_BYTES + FRAGMENTATION * held_bytes)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank's device at the peak, by kind, and per rank in ``host`` memory; ``disk``: one checkpoint.

    ``when`` names the moment of the peak.
    """

    base: int
    adapters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int
    workspace: int
    when: str
    host: int
    disk: int

    @property
    def device(self) -> int:
        """Total bytes on the device."""
        return (
            self.base + self.adapters + self.gradients + self.optimizer + self.gathered + self.activations + self.loss
            + self.workspace
        )  # fmt: skip


def _updated_on_host(setup: Setup, share: int) -> int:
    """AdamW's moments, what it updates in place of the GPU's weights, and from a GPU the gradients, which come there for an update."""
    return FP32 * share * (4 if setup.on_gpu else 3)


def memory_of(setup: Setup) -> Memory:
    """The fullest rank's memory at the peak of a step."""
    layout = setup.layout
    share = math.ceil(setup.trained_weights / setup.adapter_ranks)
    base, on_host = base_bytes_per_rank(setup), base_bytes_on_host(setup)
    fullest = max(moments_of(setup), key=lambda moment: moment.num_bytes)
    moments = 2 * FP32 * share
    # DeepSpeed keeps a shard of the parameters and, for AdamW, an fp32 copy, though ours are fp32 already.
    copies = 2 if layout.engine == "zero3" else 1
    return Memory(
        base=base - on_host,
        adapters=copies * FP32 * share,
        gradients=FP32 * share,
        optimizer=0 if layout.optimizer_on_host else moments,
        gathered=fullest.gathered,
        activations=fullest.activations,
        loss=fullest.loss,
        workspace=fullest.workspace,
        when=fullest.name,
        # Saving a checkpoint copies the trained state to the host.
        host=on_host + (_updated_on_host(setup, share) if layout.optimizer_on_host else 0) + 3 * FP32 * share,
        disk=3 * FP32 * setup.trained_weights,
    )
