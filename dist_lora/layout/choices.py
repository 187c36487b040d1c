"""Resolves every ``auto`` of a config, once, with a reason for each choice; used by the run and by the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from dist_lora.config.schema import Config, ParallelSection
from dist_lora.errors import ConfigError
from dist_lora.herd.shape import Shape
from dist_lora.herd.unfrozen import trained_weights
from dist_lora.layout.storage import base_parts, check_quant
from dist_lora.text import count, ranges, size

EngineName = Literal["none", "fsdp2", "zero3"]
BaseShard = Literal["gpu", "node", "world"]
DtypeName = Literal["bf16", "fp32"]
AttentionName = Literal["sdpa", "sdpa-repeated", "tiled", "varlen", "eager"]
ITEM_BYTES: Mapping[DtypeName, int] = {"bf16": 2, "fp32": 4}

BYTES_PER_TRAINED_WEIGHT = 16  # fp32: the weight, its gradient and AdamW's two moments
BASE_SHARE = 0.6  # of a device's memory: the base is sharded over the world if a node's shard takes more
TIGHT = (
    0.9  # of a device's memory: from here on what the bytes don't count (fragmentation, another library) may exceed it
)
ADAPTERS_SHARE = 0.05  # of a device's memory: adapters are sharded over a node if they take more


@dataclass(frozen=True)
class Layout:
    """The engine and where it keeps the base, the adapters and the optimizer state; ``reasons`` has a line for each."""

    engine: EngineName
    base_shard: BaseShard
    adapters: Literal["replicate", "shard"]
    base_on_host: bool
    optimizer_on_host: bool
    reasons: tuple[str, ...]

    @property
    def has_whole_base(self) -> bool:
        """Whether each rank keeps the whole base, so that nothing of it is ever gathered."""
        return self.engine == "none" or self.base_shard == "gpu"


@dataclass(frozen=True)
class WholeBase:
    """Whether ``base_shard: auto`` keeps the whole base on each GPU, and why."""

    is_chosen: bool
    because: str


@dataclass(frozen=True)
class Choices:
    """Everything ``auto`` of a run on its machines, resolved.

    Args:
        dtype: of the base, where it is not quantized, and of the computation.
        fused_kernels: elementwise work runs in kernels of our own (``base/kernels``), where the GPU's build of torch can.
        recomputed: the layers whose activations are recomputed in the backward pass, see ``choose_recomputed``.
        reasons: one line per choice.
    """

    dtype: DtypeName
    attention: AttentionName
    fused_kernels: bool
    recomputed: range
    layout: Layout
    reasons: tuple[str, ...]


def choose(
    config: Config,
    shape: Shape,
    *,
    name: str | None,
    world_size: int,
    local_size: int,
    device_bytes: int,
    on_gpu: bool,
    has_bf16: bool = True,
    whole_base: WholeBase | None = None,
) -> Choices:
    """The choices of a config for a model on ``world_size`` ranks: all that doesn't depend on a step's memory.

    No layer recomputes yet: ``memory.setup_of`` adds that choice, and decides on ``whole_base``.

    Args:
        name: the model's, for errors.
        local_size: ranks per node.
        device_bytes: memory of one rank's device; on a CPU its share of the host's.
        on_gpu: whether ranks compute on GPUs.
        has_bf16: whether all of these GPUs compute in bf16 (compute capability 8.0 or newer).

    Raises:
        ConfigError: ``model.dtype`` is bf16 and a GPU has none; settings of ``parallel`` contradict each other or the world; the model lacks a layer; its linears can't
            be quantized with ``model.quant``.
    """
    check_quant(shape, config.model.quant, name)
    dtype, why_dtype = choose_dtype(config.model.dtype, on_gpu=on_gpu, has_bf16=has_bf16)
    attention, why_attention = choose_attention(config.model.attention, dtype=dtype, on_gpu=on_gpu)
    parts = base_parts(shape, quant=config.model.quant, item_bytes=ITEM_BYTES[dtype])
    layout = choose_layout(
        config.parallel,
        world_size=world_size,
        local_size=local_size,
        base_bytes=sum(part.num_bytes for part in parts),
        trained_weights=trained_weights(config, shape),
        device_bytes=device_bytes,
        whole_base=whole_base,
    )
    fused_kernels, why_kernels = choose_kernels(config.train.fused_kernels, on_gpu=on_gpu)
    reasons = (
        *layout.reasons,
        f"dtype     {dtype}: {why_dtype}",
        f"attention {attention}: {why_attention}",
        f"kernels   {'fused' if fused_kernels else 'plain'}: {why_kernels}",
        *lr_lines(config, shape),
    )
    return Choices(dtype, attention, fused_kernels, range(0), layout, reasons)


LR_ALPHA = 32.0  # the alpha at which the formula of ``choose_lr`` was found


def choose_lr(*, hidden: int, alphas: tuple[float, ...]) -> tuple[float, str]:
    """``optim.lr: auto`` of a Llama of width ``hidden``, with the reason: ``5e-4 (2000 / hidden)^0.781``.

    It doesn't depend on the rank: with alpha / rank before ``B A``, and A drawn with a variance of 1 / width, as here and in
    PEFT, the first updates of the adapted weights are equal at any rank. On alpha they do depend, and the formula says nothing
    about another one than the 32 it was found with.

    Source: Tinker's documentation, "Supervised learning hyperparameters": a base of 5e-5, ten times that for LoRA, and an
    exponent of 0.781 for Llama; alpha, the draw of A and one rate for A and B are those of "LoRA Without Regret" (Schulman and
    Thinking Machines Lab, 2025).

    Args:
        alphas: all that an adapter has.

    Raises:
        ConfigError: one is not 32.
    """
    if not alphas:
        raise ConfigError(
            "optim.lr: auto is known for LoRA, and there is no adapter (lora: null). Set a number, like 1e-5"
        )
    lr = float(f"{5e-4 * (2000 / hidden) ** 0.781:.3g}")
    if alphas != (LR_ALPHA,):
        found = ", ".join(f"{alpha:g}" for alpha in alphas)
        near = f", about optim.lr={lr * LR_ALPHA / alphas[0]:.3g}, which begins as alike" if len(alphas) == 1 else ""
        raise ConfigError(
            f"optim.lr: auto is known for lora.alpha: 32 (at any rank), and alpha is {found}. Set lora.alpha=32, or a number{near}"
        )
    return lr, f"5e-4 x (2000 / {hidden:,})^0.781, Tinker's formula for LoRA on a Llama with alpha 32, at any rank"


def lr_lines(config: Config, shape: Shape) -> tuple[str, ...]:
    """The line about ``optim.lr: auto``; none where it is a number.

    Raises:
        ConfigError: see ``choose_lr``.
    """
    if config.optim.lr != "auto":
        return ()
    lr, why = choose_lr(hidden=shape.hidden, alphas=config.lora.all_alphas())
    return (f"lr        {lr:g}: {why}",)


def with_lr(config: Config, shape: Shape) -> Config:
    """The config with a number for ``optim.lr: auto``, as everything that trains takes it.

    Raises:
        ConfigError: see ``choose_lr``.
    """
    if config.optim.lr != "auto":
        return config
    lr, _ = choose_lr(hidden=shape.hidden, alphas=config.lora.all_alphas())
    return config.model_copy(update={"optim": config.optim.model_copy(update={"lr": lr})})


def choose_dtype(
    wanted: Literal["auto", "bf16", "fp32"], *, on_gpu: bool, has_bf16: bool = True
) -> tuple[DtypeName, str]:
    """``model.dtype`` resolved, with the reason.

    Raises:
        ConfigError: it is bf16, and a GPU has none.
    """
    if wanted == "bf16" and on_gpu and not has_bf16:
        raise ConfigError(
            "model.dtype: bf16 needs GPUs of compute capability 8.0 or newer (A100, RTX 3090 and later), and these are older, "
            "like V100 and T4. Set model.dtype=fp32 (or auto): 4 bytes per number, and slower."
        )
    if wanted != "auto":
        return wanted, "as set"
    if on_gpu and not has_bf16:
        return "fp32", "on a GPU without bf16 (compute capability below 8.0)"
    return ("bf16", "on a GPU") if on_gpu else ("fp32", "on a CPU")


def choose_attention(
    wanted: Literal["auto", "sdpa", "varlen", "eager"], *, dtype: DtypeName, on_gpu: bool
) -> tuple[AttentionName, str]:
    """``model.attention`` resolved, with the reason.

    Raises:
        ConfigError: it is varlen, and the device or the dtype has no such kernel.
    """
    if wanted == "varlen" and not (on_gpu and dtype == "bf16"):
        raise ConfigError(
            f"model.attention: varlen is a flash kernel for bf16 on GPUs, and this run computes in {dtype} on "
            f"{'GPUs' if on_gpu else 'CPUs'}. Set model.attention=auto"
        )
    if on_gpu and dtype == "fp32" and wanted in ("auto", "sdpa"):
        # In fp32 only the memory-efficient kernel doesn't store all scores, and it has no grouped heads (torch 2.13).
        return "sdpa-repeated", "the memory-efficient kernel, on repeated key and value heads: flash needs 16 bits"
    if wanted != "auto":
        return wanted, "as set"
    if on_gpu:
        return "varlen", "flash attention over all documents of a micro-batch at once"
    if dtype == "fp32":
        return "tiled", "matrix products of tiles: flash attention needs a GPU"
    return "sdpa", "flash attention needs a GPU"


def choose_kernels(wanted: Literal["auto", "none"], *, on_gpu: bool) -> tuple[bool, str]:
    """``train.fused_kernels`` resolved: whether norms, RoPE, SwiGLU and the loss run in kernels of our own; with the reason."""
    if not on_gpu:
        return False, "the fused ones need a GPU"
    return (False, "as set") if wanted == "none" else (True, "norms, RoPE, SwiGLU and loss by Triton, on a GPU")


def choose_recomputed(
    wanted: Literal["auto", "none", "all"] | int,
    *,
    num_layers: int,
    first_trained: int,
    device_bytes: int | None,
    needed_bytes: Callable[[range], int],
) -> tuple[range, str]:
    """``train.activation_checkpointing`` resolved: the layers that recompute, with the reason. Needs no communication.

    Args:
        first_trained: the first layer that the backward goes through. Those before it save nothing, so recomputing them would
            save nothing.
        device_bytes: a GPU's memory, of which ``auto`` fills up to ``TIGHT``: all of it, not what is free now, so that a run
            that starts again recomputes the same layers; None on a CPU, where it recomputes nothing.
        needed_bytes: bytes that a rank needs if these layers recompute.

    Raises:
        ConfigError: more layers are to recompute than the model has.
    """

    # The first layers recompute and the last ones keep. The backward begins with the last layer, while everything that is kept
    # is still there: if that layer recomputed, its activations would be there once more just then. Kept ones are freed on the
    # way, so that what the first layers recompute finds room.
    def first(num: int) -> range:
        return range(first_trained, min(num_layers, first_trained + num))

    if isinstance(wanted, int):
        if wanted > num_layers:
            raise ConfigError(
                f"train.activation_checkpointing: {wanted} layers can't recompute, since the model has {num_layers}. "
                f"Set at most {num_layers}, or all."
            )
        return first(wanted), "as set"
    if wanted != "auto":
        return first(num_layers if wanted == "all" else 0), "as set"
    if device_bytes is None:
        return first(0), "saves time on a CPU"
    return _fewest(first, num_layers - first_trained, room_bytes=TIGHT * device_bytes, needed_bytes=needed_bytes)


def _fewest(
    first: Callable[[int], range], limit: int, *, room_bytes: float, needed_bytes: Callable[[range], int]
) -> tuple[range, str]:
    """The fewest layers with which the bytes fit, by bisection; if none does, those with which they are least."""
    room = f"{size(room_bytes)} ({TIGHT:.0%} of a GPU)"
    # Up to the last but one, each layer that recomputes saves memory; the last may cost some, see ``choose_recomputed``.
    low, high = 0, limit - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if needed_bytes(first(middle)) < room_bytes else (middle + 1, high)
    needed = {num: needed_bytes(first(num)) for num in (low, limit)}
    chosen = next((num for num in (low, limit) if needed[num] < room_bytes), None)
    if chosen is None:
        chosen = min(needed, key=needed.__getitem__)
        return first(chosen), f"a GPU can't need less than {size(needed[chosen])}, more than {room}"
    if chosen == 0:
        return first(0), f"{size(needed[0])} fit in {room}"
    more = size(needed_bytes(first(chosen - 1)))
    return first(chosen), f"the fewest that fit in {room}: {size(needed[chosen])}, with {chosen - 1} it would be {more}"


def describe_recomputed(recomputed: range, num_layers: int) -> str:
    """``no layer``, ``all 32 layers`` or ``20 of 32 layers (0-19)``."""
    if not recomputed:
        return "no layer"
    if len(recomputed) == num_layers:
        return "the only layer" if num_layers == 1 else f"all {num_layers} layers"
    return f"{len(recomputed)} of {num_layers} layers ({ranges(recomputed)})"


def choose_layout(
    section: ParallelSection,
    *,
    world_size: int,
    local_size: int,
    base_bytes: int,
    trained_weights: int,
    device_bytes: int,
    whole_base: WholeBase | None = None,
) -> Layout:
    """The layout of a run, ``auto`` resolved.

    Args:
        base_bytes: the whole frozen base, as stored.
        device_bytes: memory of one rank's device; on a CPU its share of the host's.
        whole_base: what ``base_shard: auto`` decides by a step's memory; None shards.

    Raises:
        ConfigError: the settings contradict each other or the world.
    """
    check_section(section, world_size=world_size, local_size=local_size)
    on_host = section.offload
    base_on_host, optimizer_on_host = on_host in ("base", "all"), on_host in ("optimizer", "all")
    if section.base_shard == "gpu":
        whole_base = WholeBase(True, "as set")
    engine, why_engine = _engine(section, world_size, base_on_host=base_on_host, whole_base=whole_base)
    base_shard, why_base = _base_shard(
        section, engine, world_size, local_size, base_bytes, device_bytes, base_on_host, whole_base
    )
    adapters, why_adapters = _adapters(
        section, engine, world_size, local_size, trained_weights, device_bytes, is_base_whole=base_shard == "gpu"
    )
    reasons = (why_engine, why_base, why_adapters)
    return Layout(engine, base_shard, adapters, base_on_host, optimizer_on_host, reasons)


def check_node_size(*, world_size: int, local_size: int) -> None:
    """Raise ``ConfigError`` if the world isn't a multiple of ``local_size`` ranks."""
    if world_size % local_size:
        raise ConfigError(
            f"parallel.node_size: {count(world_size, 'process is', 'processes are')} not a multiple of {local_size}; "
            "every node must have the same number"
        )


def check_section(section: ParallelSection, *, world_size: int, local_size: int) -> None:
    """Raise ``ConfigError``, listing all conflicts, if settings of ``parallel`` contradict each other or the world."""
    num_nodes = world_size // local_size
    wanted = section.engine
    faults = []
    if wanted == "none" and world_size > 1:
        faults.append(
            f"parallel.engine: none runs one process and {world_size} were started. "
            "Set parallel.engine=fsdp2 (or auto), or start one process."
        )
    if wanted == "none" and section.adapters == "shard":
        faults.append(
            "parallel.adapters: shard needs several processes, and engine none has one. "
            "Set parallel.adapters=replicate (or auto), or parallel.engine=fsdp2."
        )
    if wanted == "zero3" and section.base_shard == "node" and num_nodes > 1:
        faults.append(
            f"parallel.base_shard: node over {num_nodes} nodes isn't supported by engine zero3, which shards the base "
            "over all ranks. Set parallel.base_shard=world, or parallel.engine=fsdp2."
        )
    if wanted == "zero3" and section.adapters == "replicate":
        faults.append(
            "parallel.adapters: replicate isn't supported by engine zero3, which shards all trained weights over the "
            "ranks. Set parallel.adapters=shard (or auto), or parallel.engine=fsdp2."
        )
    if section.base_shard == "gpu":
        faults.extend(_conflicts_with_whole_base(section, world_size))
    if faults:
        raise ConfigError("\n".join(faults))


def _conflicts_with_whole_base(section: ParallelSection, world_size: int) -> Iterator[str]:
    if section.engine == "zero3":
        yield (
            "parallel.base_shard: gpu isn't supported by engine zero3, which shards the base over all ranks. "
            "Set parallel.base_shard=world, or parallel.engine=fsdp2."
        )
    elif section.adapters == "shard":
        yield (
            "parallel.adapters: shard isn't supported with parallel.base_shard: gpu, which keeps everything whole on each "
            "GPU. Set parallel.adapters=replicate (or auto), or parallel.base_shard=node."
        )
    if section.offload in ("base", "all") and world_size > 1:
        yield (
            f"parallel.offload: {section.offload} keeps the base in host memory, and parallel.base_shard: gpu on each GPU. "
            "Set parallel.base_shard=node, or parallel.offload=none (or optimizer)."
        )


def _engine(
    section: ParallelSection, world_size: int, *, base_on_host: bool, whole_base: WholeBase | None
) -> tuple[EngineName, str]:
    wanted = section.engine
    if wanted != "auto":
        return wanted, f"engine    {wanted}: as set"
    if world_size > 1:
        is_whole = whole_base is not None and whole_base.is_chosen
        return (
            "fsdp2",
            f"engine    fsdp2: {world_size} processes {'hold the base each' if is_whole else 'share the base'}",
        )
    if base_on_host:
        return "none", "engine    none: one process, which fetches each layer while the one before it computes"
    return "none", "engine    none: one process holds the whole base"


def _base_shard(
    section: ParallelSection,
    engine: EngineName,
    world_size: int,
    local_size: int,
    base_bytes: int,
    device_bytes: int,
    base_on_host: bool,
    whole_base: WholeBase | None,
) -> tuple[BaseShard, str]:
    wanted = section.base_shard
    by_node, by_world = base_bytes / local_size, base_bytes / world_size
    num_nodes = world_size // local_size
    if engine == "none":
        where = ", layers in host memory, embedding and head on the device" * base_on_host
        return "node", f"base      not sharded: {size(base_bytes)}{where}"
    if engine == "zero3":
        return "world", f"base      {_over_all(world_size, size(base_bytes), size(by_world))}: ZeRO-3 ignores nodes"
    if whole_base is not None and whole_base.is_chosen and not base_on_host:
        ranks = "on the only rank" if world_size == 1 else f"on each of {world_size} ranks"
        return "gpu", f"base      whole {ranks}, {size(base_bytes)}: {whole_base.because}"
    why_sharded = "" if whole_base is None or whole_base.is_chosen else f"; {whole_base.because}"
    if num_nodes == 1:
        return "node", f"base      {_over_node(local_size, size(base_bytes), size(by_node), 'one node')}{why_sharded}"
    crossing = f"each receives {size(by_world * (world_size - local_size))} over the network, twice per micro-batch"
    if wanted == "auto":
        room = device_bytes * BASE_SHARE
        fits = base_on_host or by_node <= room
        wanted, result = ("node", "fit") if fits else ("world", "don't fit")
        because = f"{size(by_node)} per rank {result} in {size(room)} of a device{why_sharded}"
    else:
        because = "as set"
    if wanted == "node":
        return "node", (
            f"base      {_over_node(local_size, size(base_bytes), size(by_node), 'each node')}, none of it crosses the "
            f"network: {because}"
        )
    return "world", f"base      {_over_all(world_size, size(base_bytes), size(by_world))}; {crossing}: {because}"


def _adapters(
    section: ParallelSection,
    engine: EngineName,
    world_size: int,
    local_size: int,
    trained_weights: int,
    device_bytes: int,
    *,
    is_base_whole: bool,
) -> tuple[Literal["replicate", "shard"], str]:
    wanted = section.adapters
    total = trained_weights * BYTES_PER_TRAINED_WEIGHT
    footprint = f"{size(total)} with gradients and AdamW's moments"
    if engine == "zero3":
        return (
            "shard",
            f"adapters  {_over_all(world_size, footprint, f'{footprint}, {size(total / world_size)}')}: by ZeRO-3",
        )
    if world_size == 1:
        return "replicate" if wanted == "auto" else wanted, f"adapters  {footprint}"
    if wanted == "auto" and is_base_whole:
        wanted, because = "replicate", "like the base"
    elif wanted == "auto" and local_size == 1:
        wanted, because = "replicate", "one rank per node"
    elif wanted == "auto":
        fits = total <= device_bytes * ADAPTERS_SHARE
        wanted = "replicate" if fits else "shard"
        because = f"{'within' if fits else 'more than'} {ADAPTERS_SHARE:.0%} of a device"
    else:
        because = "as set"
    if wanted == "replicate":
        return "replicate", f"adapters  replicated, {footprint}: {because}"
    each = f"{footprint}, {size(total / local_size)}"
    return "shard", f"adapters  {_over_node(local_size, footprint, each, 'each node')}: {because}"


def _over_all(world_size: int, whole: str, each: str) -> str:
    return f"sharded over all {world_size} ranks, {each} each" if world_size > 1 else f"on the only rank: {whole}"


def _over_node(local_size: int, whole: str, each: str, node: str) -> str:
    if local_size == 1:
        return f"whole on the only rank of {node}: {whole}"
    return f"sharded over {'the ' * (node != 'one node')}{local_size} ranks of {node}, {each} each"
