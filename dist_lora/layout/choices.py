"""What a config leaves open, decided once, each choice with its reason: the run obeys it, and the plan reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dist_lora.config.schema import Config, ParallelSection
from dist_lora.errors import ConfigError
from dist_lora.herd.shape import Shape
from dist_lora.layout.storage import base_parts, check_quant
from dist_lora.text import size

EngineName = Literal["none", "fsdp2", "zero3"]
DtypeName = Literal["bf16", "fp32"]
AttentionName = Literal["sdpa", "varlen", "eager"]
ITEM_BYTES: Mapping[DtypeName, int] = {"bf16": 2, "fp32": 4}

BYTES_A_TRAINED_WEIGHT = 16  # fp32: the weight, its gradient and AdamW's two moments
BASE_SHARE = 0.6  # of a device's memory: what a node's shard of the base may take before the world shares it
ADAPTERS_SHARE = 0.05  # of a device's memory: what replicated adapters may take before a node shares them


@dataclass(frozen=True)
class Layout:
    """An engine and where it keeps the base, the adapters and the optimizer; ``reasons`` say why, a line each."""

    engine: EngineName
    base_shard: Literal["node", "world"]
    adapters: Literal["replicate", "shard"]
    base_on_host: bool
    optimizer_on_host: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Choices:
    """All that was decided of a run on its machines.

    Args:
        dtype: in which the base is stored, where it is not quantized, and computed.
        recompute: activations are computed again in the backward.
        reasons: a line for each choice.
    """

    dtype: DtypeName
    attention: AttentionName
    recompute: bool
    layout: Layout
    reasons: tuple[str, ...]


def choose(
    config: Config, shape: Shape, *, name: str | None, world_size: int, local_size: int, device_bytes: int, on_gpu: bool
) -> Choices:
    """The choices of a config for a model on so many ranks.

    Args:
        name: the model's, for errors.
        local_size: ranks of a node.
        device_bytes: memory of one rank's device; on a CPU its part of the host's.
        on_gpu: whether ranks compute on GPUs.

    Raises:
        ConfigError: settings of ``parallel`` contradict each other or the world; a layer that the model doesn't have; its
            linears can't be quantized so.
    """
    check_quant(shape, config.model.quant, name)
    dtype, why_dtype = choose_dtype(config.model.dtype, on_gpu=on_gpu)
    attention, why_attention = choose_attention(config.model.attention, dtype=dtype, on_gpu=on_gpu)
    wanted = config.train.activation_checkpointing
    recompute = on_gpu if wanted == "auto" else wanted
    because = "as set" if wanted != "auto" else "on a GPU memory is short" if on_gpu else "on a CPU time is short"
    targets, layers = config.lora.target_names(), config.lora.layer_indices(shape.num_layers)
    parts = base_parts(shape, quant=config.model.quant, item_bytes=ITEM_BYTES[dtype])
    layout = choose_layout(
        config.parallel,
        world_size=world_size,
        local_size=local_size,
        base_bytes=sum(part.num_bytes for part in parts),
        trained_weights=shape.adapter_parameters(targets, layers, config.lora.rank),
        device_bytes=device_bytes,
    )
    reasons = (
        *layout.reasons,
        f"dtype     {dtype}: {why_dtype}",
        f"attention {attention}: {why_attention}",
        f"recompute {'on' if recompute else 'off'}: {because}",
    )
    return Choices(dtype, attention, recompute, layout, reasons)


def choose_dtype(wanted: Literal["auto", "bf16", "fp32"], *, on_gpu: bool) -> tuple[DtypeName, str]:
    """``model.dtype`` decided, and why."""
    if wanted != "auto":
        return wanted, "as set"
    return ("bf16", "on a GPU") if on_gpu else ("fp32", "on a CPU")


def choose_attention(
    wanted: Literal["auto", "sdpa", "varlen", "eager"], *, dtype: DtypeName, on_gpu: bool
) -> tuple[AttentionName, str]:
    """``model.attention`` decided, and why."""
    if wanted != "auto":
        return wanted, "as set"
    if on_gpu and dtype == "bf16":
        return "varlen", "a flash kernel takes all documents of a micro-batch at once"
    return "sdpa", "flash needs 16 bits" if on_gpu else "flash needs a GPU"


def choose_layout(
    section: ParallelSection,
    *,
    world_size: int,
    local_size: int,
    base_bytes: int,
    trained_weights: int,
    device_bytes: int,
) -> Layout:
    """The layout of a run, ``auto`` resolved.

    Args:
        base_bytes: the frozen base as it is stored, whole.
        device_bytes: memory of one rank's device; on a CPU its part of the host's.

    Raises:
        ConfigError: the settings contradict each other or the world.
    """
    check_section(section, world_size=world_size, local_size=local_size)
    on_host = section.offload
    base_on_host, optimizer_on_host = on_host in ("base", "all"), on_host in ("optimizer", "all")
    engine, why_engine = _engine(section, world_size, base_on_host=base_on_host)
    base_shard, why_base = _base_shard(section, engine, world_size, local_size, base_bytes, device_bytes, base_on_host)
    adapters, why_adapters = _adapters(section, engine, world_size, local_size, trained_weights, device_bytes)
    reasons = (why_engine, why_base, why_adapters)
    return Layout(engine, base_shard, adapters, base_on_host, optimizer_on_host, reasons)


def check_node_size(*, world_size: int, local_size: int) -> None:
    """Raise ``ConfigError`` where nodes of ``local_size`` ranks don't make up the world."""
    if world_size % local_size:
        raise ConfigError(
            f"parallel.node_size: {world_size} processes are not a multiple of {local_size}; "
            "every node must hold the same number"
        )


def check_section(section: ParallelSection, *, world_size: int, local_size: int) -> None:
    """Raise ``ConfigError``, telling all of them, where settings of ``parallel`` contradict each other or the world."""
    num_nodes = world_size // local_size
    wanted = section.engine
    faults = []
    if wanted == "none" and world_size > 1:
        faults.append(
            f"parallel.engine: none runs one process and {world_size} were started. "
            "Set parallel.engine=fsdp2 (or auto), or start one process."
        )
    if wanted == "none" and section.offload in ("base", "all"):
        faults.append(
            f"parallel.offload: {section.offload} brings the base in layer by layer, which engine none can't. "
            "Set parallel.engine=fsdp2 (or auto): one process is enough."
        )
    if wanted == "none" and section.adapters == "shard":
        faults.append(
            "parallel.adapters: shard needs several processes and engine none has one. "
            "Set parallel.adapters=replicate (or auto), or parallel.engine=fsdp2."
        )
    if wanted == "zero3" and section.base_shard == "node" and num_nodes > 1:
        faults.append(
            f"parallel.base_shard: node over {num_nodes} nodes is not there with engine zero3, which cuts the base "
            "over all ranks. Set parallel.base_shard=world, or parallel.engine=fsdp2."
        )
    if wanted == "zero3" and section.adapters == "replicate":
        faults.append(
            "parallel.adapters: replicate is not there with engine zero3, which cuts all that it trains over the "
            "ranks. Set parallel.adapters=shard (or auto), or parallel.engine=fsdp2."
        )
    if faults:
        raise ConfigError("\n".join(faults))


def _engine(section: ParallelSection, world_size: int, *, base_on_host: bool) -> tuple[EngineName, str]:
    wanted = section.engine
    if wanted != "auto":
        return wanted, f"engine    {wanted}: as set"
    if world_size > 1:
        return "fsdp2", f"engine    fsdp2: {world_size} processes share the base"
    if base_on_host:
        return "fsdp2", "engine    fsdp2: it brings the base from the host layer by layer"
    return "none", "engine    none: one process holds the whole base"


def _base_shard(
    section: ParallelSection,
    engine: EngineName,
    world_size: int,
    local_size: int,
    base_bytes: int,
    device_bytes: int,
    base_on_host: bool,
) -> tuple[Literal["node", "world"], str]:
    wanted = section.base_shard
    by_node, by_world = base_bytes / local_size, base_bytes / world_size
    num_nodes = world_size // local_size
    if engine == "none":
        return "node", f"base      whole on this process: {size(base_bytes)}"
    if engine == "zero3":
        return "world", f"base      cut over all {world_size} ranks, {size(by_world)} each: ZeRO-3 knows no nodes"
    if num_nodes == 1:
        return "node", f"base      cut over {local_size} ranks of one node, {size(by_node)} each"
    crossing = f"{size(by_world * (world_size - local_size))} of it cross the network to each rank, twice a pass"
    if wanted == "auto":
        room = device_bytes * BASE_SHARE
        fits = base_on_host or by_node <= room
        wanted = "node" if fits else "world"
        because = f"{size(by_node)} a rank {'fit' if fits else 'do not fit'} in {size(room)} of a device"
    else:
        because = "as set"
    if wanted == "node":
        return "node", (
            f"base      cut over the {local_size} ranks of each node, {size(by_node)} each, and no byte of it crosses "
            f"the network: {because}"
        )
    return "world", f"base      cut over all {world_size} ranks, {size(by_world)} each; {crossing}: {because}"


def _adapters(
    section: ParallelSection,
    engine: EngineName,
    world_size: int,
    local_size: int,
    trained_weights: int,
    device_bytes: int,
) -> tuple[Literal["replicate", "shard"], str]:
    wanted = section.adapters
    whole = trained_weights * BYTES_A_TRAINED_WEIGHT
    what = f"{size(whole)} with gradients and AdamW's moments"
    if engine == "zero3":
        return "shard", f"adapters  cut over all {world_size} ranks by ZeRO-3: {what}, {size(whole / world_size)} each"
    if engine == "none":
        return "replicate", f"adapters  {what}"
    if wanted == "auto":
        fits = local_size == 1 or whole <= device_bytes * ADAPTERS_SHARE
        wanted = "replicate" if fits else "shard"
        because = f"{'within' if fits else 'more than'} {ADAPTERS_SHARE:.0%} of a device"
    else:
        because = "as set"
    if wanted == "replicate":
        return "replicate", f"adapters  whole on every rank, {what}: {because}"
    return "shard", (
        f"adapters  cut over the {local_size} ranks of each node, {what}, {size(whole / local_size)} each: {because}"
    )
