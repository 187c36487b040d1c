"""Memory per rank at each moment of a step, by arithmetic: no torch, no weights, a fraction of a second.

It is that of the fullest rank: the first, where rows don't divide evenly. Letters: T tokens of a micro-batch, K of them with
a label, D model width, F feed-forward width, H query heads, G key heads, E width of a head, V vocabulary, R LoRA rank,
L layers; c bytes per number in the compute dtype.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from dist_lora.config.schema import Config, LoraSection, ParallelSection, Quant
from dist_lora.herd.shape import Shape, module_path
from dist_lora.herd.unfrozen import layer_of, trained_weights, unfrozen_weights
from dist_lora.layout.choices import (
    ITEM_BYTES,
    TIGHT,
    Choices,
    Layout,
    WholeBase,
    check_node_size,
    choose,
    choose_recomputed,
    describe_recomputed,
)
from dist_lora.layout.storage import FP32, BasePart, base_parts, quantized_linears
from dist_lora.layout.zero3 import Gradients, Module, Pass, step_of
from dist_lora.text import GIB, size

# Only visible on a machine with such a GPU: CUDA's context and the libraries' kernels, NCCL's buffers, and fragmentation of
# the caching allocator. Figures for CUDA 12 and NCCL 2: about 0.5 GiB, and 0.5 to 1 GiB for several communicators;
# fragmentation as a fraction of the allocated bytes.
CONTEXT_BYTES = 1.5 * GIB
FRAGMENTATION = 0.05
# Elements of the logits that are in fp32 at once: 32 MiB, which a GPU's second-level cache nearly holds.
LOGITS_IN_FP32 = 2**23
# The linears of a layer that share their input.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Setup:
    """What memory, communication and time of a run depend on.

    Args:
        choices: every ``auto`` of the config, resolved.
        accumulation_steps: micro-batches per rank in one step.
        lora_rank: of the adapters, the largest where they differ: what depends on each layer's adapters is an upper bound then.
        lora_ranks: of each adapted linear, by its full name.
        trained_weights: all A and B, the rows of tokens, and unfrozen weights.
        trained_rows: of embedding and head, whose gradient goes through every layer; 0 where none is trained.
        unfrozen: names of the linears and norms whose weights are trained.
        joins_documents: attention is computed per document of a micro-batch, and the outputs are concatenated.
        num_ranks: ranks of the world; ``local_size``: ranks per node.
    """

    shape: Shape
    quant: Quant
    choices: Choices
    lora_rank: int
    lora_ranks: tuple[tuple[str, int], ...]
    trained_weights: int
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    unfrozen: tuple[str, ...]
    micro_tokens: int
    accumulation_steps: int
    joins_documents: bool
    has_dropout: bool
    trained_rows: int
    num_ranks: int
    local_size: int

    @property
    def item_bytes(self) -> int:
        """Bytes per number in the compute dtype (c)."""
        return ITEM_BYTES[self.choices.dtype]

    @property
    def recomputed(self) -> range:
        """The layers whose activations are recomputed in the backward pass."""
        return self.choices.recomputed

    @property
    def layout(self) -> Layout:
        """The engine and its sharding."""
        return self.choices.layout

    @property
    def base_ranks(self) -> int:
        """Number of ranks over which the base is sharded."""
        if self.layout.has_whole_base:
            return 1
        return self.num_ranks if self.layout.base_shard == "world" else self.local_size

    @property
    def adapter_ranks(self) -> int:
        """Number of ranks over which the adapters are sharded."""
        if self.layout.adapters == "replicate":
            return 1
        return self.num_ranks if self.layout.engine == "zero3" else self.local_size

    @property
    def first_trained(self) -> int:
        """The first layer that the backward goes through; their number if nothing before the last norm is trained."""
        if self.trained_rows:
            return 0
        of_unfrozen = (layer for name in self.unfrozen if (layer := layer_of(name)) is not None)
        return min((*self.layers, *of_unfrozen), default=self.shape.num_layers)

    def frees_buffer(self, layer: int) -> bool:
        """Whether all-gathering a layer's sharded adapters frees the buffer of the layer's own all-gather."""
        is_sharded = self.layout.engine == "fsdp2" and self.layout.adapters == "shard"
        return is_sharded and (layer in self.layers or bool(unfrozen_in(self, layer)))


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
    unresolved = _setup(config, shape, choices_with(), num_ranks=num_ranks, local_size=local_size)
    setup = _with_recomputed(unresolved, wanted, gpu_bytes=gpu_bytes)
    whole_base = _whole_base(setup, config.parallel, gpu_bytes=gpu_bytes)
    if whole_base is None:
        return setup
    unresolved = replace(unresolved, choices=choices_with(whole_base=whole_base))
    return _with_recomputed(unresolved, wanted, gpu_bytes=gpu_bytes)


def _setup(config: Config, shape: Shape, choices: Choices, *, num_ranks: int, local_size: int) -> Setup:
    train = config.train
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
        micro_tokens=train.micro_batch * train.sequence_length,
        accumulation_steps=math.ceil(math.ceil(train.global_batch / num_ranks) / train.micro_batch),
        joins_documents=train.micro_batch > 1 and choices.attention != "varlen",
        has_dropout=config.lora.dropout > 0,
        trained_rows=shape.trained_rows(config.lora),
        num_ranks=num_ranks,
        local_size=local_size,
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


# The base


def parts_of(setup: Setup) -> list[BasePart]:
    """Every frozen parameter of the base."""
    return base_parts(setup.shape, quant=setup.quant, item_bytes=setup.item_bytes, unfrozen=frozenset(setup.unfrozen))


def base_bytes_per_rank(setup: Setup) -> int:
    """A rank's shard of the base."""
    return _base_bytes(setup.shape, setup.quant, setup.item_bytes, setup.base_ranks, setup.unfrozen)


# Kept, since a choice of ``auto`` and a search for what fits ask for the same base hundreds of times.
@functools.lru_cache(maxsize=64)
def _base_bytes(shape: Shape, quant: Quant, item_bytes: int, num_ranks: int, unfrozen: tuple[str, ...]) -> int:
    parts = base_parts(shape, quant=quant, item_bytes=item_bytes, unfrozen=frozenset(unfrozen))
    return sum(part.shard_bytes(num_ranks) for part in parts)


def base_bytes_on_host(setup: Setup) -> int:
    """What of a rank's shard of the base is in host memory; engine none keeps embedding, last norm and head on the device."""
    if not setup.layout.base_on_host:
        return 0
    if setup.layout.engine != "none":
        return base_bytes_per_rank(setup)
    parts = parts_of(setup)
    return sum(part.num_bytes for part in parts if part.block is not None)


def block_bytes(setup: Setup) -> int:
    """One whole layer of the base: the largest, where some have linears that were left unquantized."""
    return _block_bytes(setup.shape, setup.quant, setup.item_bytes, setup.unfrozen)


@functools.lru_cache(maxsize=64)
def _block_bytes(shape: Shape, quant: Quant, item_bytes: int, unfrozen: tuple[str, ...]) -> int:
    by_layer = Counter[int]()
    for part in base_parts(shape, quant=quant, item_bytes=item_bytes, unfrozen=frozenset(unfrozen)):
        if part.block is not None:
            by_layer[part.block] += part.num_bytes
    return max(by_layer.values(), default=0)


def block_bytes_of(setup: Setup, layer: int) -> int:
    """What is frozen of one whole layer; of those without unfrozen weights the largest."""
    return block_bytes(setup) if not setup.unfrozen else _blocks(setup)[layer]


@functools.lru_cache(maxsize=16)
def _blocks(setup: Setup) -> list[int]:
    by_layer = Counter[int]()
    for part in parts_of(setup):
        if part.block is not None:
            by_layer[part.block] += part.num_bytes
    largest = block_bytes(setup)
    return [by_layer[i] if unfrozen_in(setup, i) else largest for i in range(setup.shape.num_layers)]


def embedding_bytes(setup: Setup) -> int:
    """The whole embedding, or the whole head."""
    return setup.shape.vocab * setup.shape.hidden * setup.item_bytes


# Activations and logits


def saved_bytes_of_layer(setup: Setup, layer: int) -> int:
    """What autograd saves in a layer's forward for its backward, without recomputation.

    In the letters of this file, per token in c bytes: the inputs of both norms (2 D), queries, attention output, keys and
    values (2 H E + 2 G E), gate and up (2 F); R numbers for each adapter. The normed inputs, and that of down, are computed
    again. In fp32: a log-sum-exp per head and two norm scales. In 16 bits A and B are cast, and the casts are saved. With
    dropout each adapter has a mask of its input, of a byte per number. Before the first adapter there is no graph, and
    nothing is saved; the input of the first adapters is saved itself.
    """
    if layer < setup.first_trained:
        return 0
    shape, c = setup.shape, setup.item_bytes
    targets = set(setup.targets) if layer in setup.layers else set()
    whole = set(unfrozen_in(setup, layer))
    begin = _begin_of_graph(setup, layer)
    # A norm that is trained keeps what its own gradient needs, as where its input has one.
    has_first, has_second = begin < 0 or "input_layernorm" in whole, begin < 2 or "post_attention_layernorm" in whole
    heads = shape.num_heads * shape.head_dim
    numbers = fp32_numbers = 0
    if begin <= 0:  # the first norm's input, or what it gives
        numbers += shape.hidden
        fp32_numbers += has_first
        is_repeated, is_tiled = (setup.choices.attention == name for name in ("sdpa-repeated", "tiled"))
        numbers += heads + 2 * (heads if is_repeated else shape.num_kv_heads * shape.head_dim)
        # The kernel keeps its result, and so does o_proj's adapter: concatenated, where documents are.
        has_own = is_tiled or setup.joins_documents
        numbers += heads * (not is_tiled) + heads * (has_own and "o_proj" in targets | whole)
        fp32_numbers += 0 if is_tiled else shape.num_heads
    elif begin == 1:
        numbers += heads
    if begin <= 2:  # the second norm's input, or what it gives
        numbers += shape.hidden + 2 * shape.ffn
        fp32_numbers += has_second
    else:
        numbers += shape.ffn
    sizes = [shape.linear_shapes()[name] for name in targets]
    numbers += setup.lora_rank * len(targets)
    masks = sum(width for _, width in sizes) if setup.has_dropout else 0
    casts = 0 if c == FP32 else c * setup.lora_rank * sum(out + width for out, width in sizes)
    return setup.micro_tokens * (c * numbers + FP32 * fp32_numbers + masks) + casts


def _begin_of_graph(setup: Setup, layer: int) -> int:
    """The group of linears where a layer's graph begins; -1 if its input has a gradient. Not for those before the first trained."""
    if layer > setup.first_trained or setup.trained_rows:
        return -1
    whole = set(unfrozen_in(setup, layer))
    trained = whole | (set(setup.targets) if layer in setup.layers else set())
    norms = ("input_layernorm", "", "post_attention_layernorm", "")
    return next(i for i, group in enumerate(_GROUPS) if trained.intersection(group) or norms[i] in whole)


def rows_of_slice(vocab: int, *, item_bytes: int) -> int:
    """Rows of a slice of logits: 1,024 in 16 bits and 256 in fp32 at Llama 3's vocabulary, never fewer than 128.

    The head is read twice for each slice, so fewer rows would wait for memory on a GPU. A multiple of 128, the rows of a tile of
    its matmuls. With 1,024 the product that gives the gradient has a tile for each multiprocessor, even at D = 4,096.
    """
    slice_bytes = 2**28 if item_bytes == 2 else 2**27
    return max(128, slice_bytes // (item_bytes * vocab) // 128 * 128)


def fp32_rows_of_slice(vocab: int) -> int:
    """Rows of logits that are in fp32 at once, where the slice is in 16 bits."""
    return max(1, LOGITS_IN_FP32 // vocab)


def unfrozen_in(setup: Setup, layer: int) -> tuple[str, ...]:
    """The kinds of linears and norms of a layer whose weights are trained, as ``q_proj``."""
    return _unfrozen_by_layer(setup.unfrozen).get(layer, ())


@functools.lru_cache(maxsize=16)
def _unfrozen_by_layer(names: tuple[str, ...]) -> dict[int | None, tuple[str, ...]]:
    kinds: dict[int | None, tuple[str, ...]] = {}
    for name in names:
        layer = layer_of(name)
        kinds[layer] = (*kinds.get(layer, ()), name.rpartition(".")[2])
    return kinds


def ranks_in(setup: Setup, layer: int) -> Mapping[str, int]:
    """The ranks of a layer's adapters, by the kind of linear, as ``q_proj``."""
    return _ranks_by_layer(setup.lora_ranks).get(layer, {})


@functools.lru_cache(maxsize=16)
def _ranks_by_layer(lora_ranks: tuple[tuple[str, int], ...]) -> dict[int | None, dict[str, int]]:
    ranks: dict[int | None, dict[str, int]] = {}
    for name, rank in lora_ranks:
        ranks.setdefault(layer_of(name), {})[name.rpartition(".")[2]] = rank
    return ranks


def unfrozen_groups(setup: Setup) -> list[tuple[str, ...]]:
    """The kinds of unfrozen linears and norms that are sharded together: of each layer, and the last norm."""
    return list(_unfrozen_by_layer(setup.unfrozen).values())


def unfrozen_weights_in(setup: Setup, layer: int) -> int:
    """Weights of a layer's linears and norms that are trained themselves."""
    shapes = setup.shape.linear_shapes()
    return sum(math.prod(shapes.get(kind, (setup.shape.hidden,))) for kind in unfrozen_in(setup, layer))


def _replicated_gradients(setup: Setup, layer: int) -> int:
    """Whole gradients of a layer's unfrozen weights at once, in its backward, before they are added to those of the step.

    Those of the linears of one input, in fp32, and one in the compute dtype before it is cast.
    """
    c, shapes, kinds = setup.item_bytes, setup.shape.linear_shapes(), unfrozen_in(setup, layer)
    groups = [[math.prod(shapes[kind]) for kind in group if kind in kinds] for group in _GROUPS]
    return max(FP32 * sum(sizes) + (c if c != FP32 else 0) * max(sizes, default=0) for sizes in groups)


def _saved_by_layer(setup: Setup) -> list[int]:
    """``saved_bytes_of_layer`` of every layer, computed once for those that are alike."""
    first, adapted = setup.first_trained, set(setup.layers)
    kinds = [
        (layer < first, layer == first, layer in adapted, unfrozen_in(setup, layer))
        for layer in range(setup.shape.num_layers)
    ]
    of_kind = {kind: saved_bytes_of_layer(setup, kinds.index(kind)) for kind in set(kinds)}
    return [of_kind[kind] for kind in kinds]


def logit_rows(setup: Setup) -> int:
    """Tokens of a micro-batch whose logits are computed at once."""
    return min(setup.micro_tokens, rows_of_slice(setup.shape.vocab, item_bytes=setup.item_bytes))


def logits_bytes(setup: Setup) -> int:
    """Bytes of logits: a slice, and in 16 bits without fused kernels some of its rows in fp32. All slices have the same memory."""
    vocab, rows = setup.shape.vocab, logit_rows(setup)
    in_fp32 = 0 if setup.item_bytes == FP32 or setup.choices.fused_kernels else min(rows, fp32_rows_of_slice(vocab))
    return vocab * (rows * setup.item_bytes + in_fp32 * FP32)


def dequantized_bytes(setup: Setup) -> int:
    """The largest linear, dequantized for a product; 0 if the base is not quantized."""
    if setup.quant == "none":
        return 0
    return setup.item_bytes * max((out * width for out, width in quantized_linears(setup.shape).values()), default=0)


def _largest_cast(setup: Setup, layer: int) -> int:
    """The largest linear of a layer that is trained itself, in the compute dtype, in which its products are computed."""
    shapes, c = setup.shape.linear_shapes(), setup.item_bytes
    sizes = (math.prod(shapes[kind]) for kind in unfrozen_in(setup, layer) if kind in shapes)
    return 0 if c == FP32 else c * max(sizes, default=0)


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


@dataclass(frozen=True)
class _Moment:
    """What a rank holds at one moment of a step, besides the base, the adapters and their optimizer state."""

    name: str
    gathered: int
    activations: int
    loss: int
    workspace: int

    @property
    def num_bytes(self) -> int:
        return self.gathered + self.activations + self.loss + self.workspace


@dataclass(frozen=True)
class _Gathered:
    """All-gathered bytes of the base, and of sharded adapters, at the moments of a step."""

    at_embedding: int = 0
    in_first_layer: int = 0
    in_later_layer: int = 0
    at_end_of_forward: int = 0
    at_loss: int = 0
    in_backward_of_norm: int = 0


def _gathered(setup: Setup) -> _Gathered:
    if setup.layout.has_whole_base:
        # Two buffers of a layer's size, for the whole run, if its layers are in host memory.
        buffers = 2 * block_bytes(setup) if setup.layout.base_on_host else 0
        return _Gathered(*(buffers,) * len(fields(_Gathered)))
    of_base = _gathered_by_fsdp2(setup)
    # Sharded rows are gathered from the embedding to the head: an upper bound for the rest of the step.
    rows = FP32 * setup.trained_rows * setup.shape.hidden if setup.adapter_ranks > 1 else 0
    return _Gathered(*(getattr(of_base, moment.name) + rows for moment in fields(_Gathered)))


def _gathered_by_fsdp2(setup: Setup) -> _Gathered:
    """In the forward FSDP2 keeps the buffer of an all-gather until the next one has been copied out of its own.

    So the new layer is held twice, and the previous one once more. Sharded adapters are all-gathered within their layer,
    which frees its buffer. A tied embedding stays gathered through forward and backward.
    """
    end, block, num_layers = embedding_bytes(setup), block_bytes(setup), setup.shape.num_layers
    buffers = 1 if setup.base_ranks > 1 else 0  # a single rank copies, without a buffer
    twice, root = 1 + buffers, end if setup.shape.tied else 0
    last = num_layers - 1
    of_last = 0 if setup.frees_buffer(last) else buffers * block
    if setup.frees_buffer(last) and _ends_with_unfrozen(setup, last):
        of_last = buffers * setup.item_bytes * unfrozen_weights_in(setup, last)
    if setup.adapter_ranks > 1 and "model.norm" in setup.unfrozen:
        of_last = 0  # all-gathering the last norm's own group frees it
    # A layer's own group of unfrozen weights is gathered after its frozen ones, as these are.
    thrice = (1 + 2 * buffers) * setup.item_bytes
    unfrozen = max(
        (
            block_bytes_of(setup, i) + thrice * unfrozen_weights_in(setup, i)
            for i in range(num_layers)
            if setup.adapter_ranks > 1 and unfrozen_in(setup, i)
        ),
        default=0,
    )
    # Gathering sharded rows after the embedding frees the buffer of the embedding's own all-gather.
    of_embedding = 0 if setup.trained_rows and setup.layout.adapters == "shard" else buffers * end
    return _Gathered(
        at_embedding=twice * end,
        in_first_layer=root + of_embedding + twice * block,
        in_later_layer=root + max(buffers * block + twice * block, unfrozen),
        at_end_of_forward=of_last + (root + block if setup.shape.tied else twice * end),
        at_loss=root + of_last if setup.shape.tied else twice * end,
        in_backward_of_norm=root + block,
    )


def _ends_with_unfrozen(setup: Setup, layer: int) -> bool:
    """Whether a layer's sharded unfrozen weights are all-gathered after its adapters: a group is when its first module computes."""
    order = ["input_layernorm", *_GROUPS[0], *_GROUPS[1], "post_attention_layernorm", *_GROUPS[2], *_GROUPS[3]]
    first_of = [
        min(map(order.index, kinds), default=-1) for kinds in (unfrozen_in(setup, layer), ranks_in(setup, layer))
    ]
    return first_of[0] > first_of[1]


def _gathered_in_backward(setup: Setup, layer: int) -> int:
    """All-gathered bytes of the base, of sharded adapters and of unfrozen weights in the backward of a layer.

    By FSDP2 a layer, and the buffer of the next one; and its adapters and its unfrozen weights.
    """
    if setup.layout.has_whole_base:
        return 2 * block_bytes(setup) if setup.layout.base_on_host else 0
    buffers, root = int(setup.base_ranks > 1), embedding_bytes(setup) if setup.shape.tied else 0
    block, c = block_bytes_of(setup, layer), setup.item_bytes
    is_sharded = setup.adapter_ranks > 1
    if is_sharded and layer not in setup.layers and unfrozen_in(setup, layer):
        below = max(layer - 1, 0)
        following = block_bytes_of(setup, below) or c * unfrozen_weights_in(setup, below)
        return root + block + c * unfrozen_weights_in(setup, layer) + buffers * following
    adapters = 2 * FP32 * setup.shape.adapter_parameters(setup.targets, (0,), setup.lora_rank) if is_sharded else 0
    unfrozen = c * unfrozen_weights_in(setup, layer) if is_sharded else 0
    return root + block + buffers * block_bytes(setup) + adapters + unfrozen


class _Activations:
    """Bytes that a step's activations take.

    ``stream`` is a layer's output, ``wide`` a gate or the input of down_proj, ``in_fp32`` a layer's output in fp32.
    """

    def __init__(self, setup: Setup) -> None:
        shape, c = setup.shape, setup.item_bytes
        self._setup = setup
        self.stream, self.wide = setup.micro_tokens * shape.hidden * c, setup.micro_tokens * shape.ffn * c
        self.in_fp32 = setup.micro_tokens * shape.hidden * FP32
        self._of_layers = _saved_by_layer(setup)
        rotary = setup.micro_tokens * shape.head_dim * c  # cosines and sines, shared by all layers
        kept = (self.stream if i in setup.recomputed else saved for i, saved in enumerate(self._of_layers))
        self._kept = list(itertools.accumulate(kept, initial=rotary))
        has_dropout = setup.has_dropout and "down_proj" in setup.targets
        self._dropped, self._dequantized = self.wide if has_dropout else 0, dequantized_bytes(setup)
        self.of_last_norm = self.stream + setup.micro_tokens * FP32

    def kept_before(self, layer: int) -> int:
        """What the layers before ``layer`` save for the backward: everything, or only their inputs."""
        return self._kept[layer]

    @property
    def kept(self) -> int:
        """What all layers save for the backward."""
        return self._kept[-1]

    def at_backward_of(self, layer: int) -> int:
        """What layers have saved at the backward of ``layer``, which makes its own again if it recomputes; its input is kept."""
        if layer not in self._setup.recomputed:
            return self._kept[layer + 1]
        is_kept = layer > self._setup.first_trained or self._setup.trained_rows
        return self._kept[layer + 1] + self._of_layers[layer] - (self.stream if is_kept else 0)

    def in_forward_of(self, layer: int) -> int:
        """What a layer holds at its down_proj: its input, the sum that the second norm takes, gate, up, down's input and output.

        A layer that doesn't recompute saves more; of those it saves gate and up, or down's input, and what its norms take.
        """
        setup, dense = self._setup, max(self._dequantized, _largest_cast(self._setup, layer))
        held = 3 * self.stream + 3 * self.wide + max(self._dropped, dense)
        if not setup.choices.fused_kernels:  # SiLU of the gate before it is multiplied; down's output isn't there yet
            held = max(held, 2 * self.stream + 4 * self.wide)
        if layer < setup.first_trained or layer in setup.recomputed:
            return held
        begin = _begin_of_graph(setup, layer)
        of_norms = 2 if begin < 0 else int(begin < 2)
        saved = self.wide if begin == 3 else 2 * self.wide + of_norms * self.stream
        return held + self._of_layers[layer] - saved

    @property
    def in_backward_of_down(self) -> int:
        """The gradient of a layer's output, and of down's input beside its weight or its dropped copy, or of gate and up.

        With fused kernels these lie where gate and up were.
        """
        dropped = self._dropped if self._setup.choices.fused_kernels else self.wide + self._dropped
        return self.stream + self.wide + max(dropped, self._dequantized)

    @property
    def at_embedding(self) -> int:
        """The embedding's output; with trained rows the frozen rows, the trained ones and what is chosen of both."""
        return 3 * self.stream if self._setup.trained_rows else self.stream

    @property
    def at_loss(self) -> int:
        """Beside the logits the gradient of what the head takes; with trained rows also that through these."""
        setup = self._setup
        of_rows = logit_rows(setup) * setup.shape.hidden * setup.item_bytes if setup.trained_rows else 0
        return 2 * self.stream + of_rows

    @property
    def in_backward_of_norm(self) -> int:
        """The gradients of what the last norm gives, of what it takes, and of all rows."""
        return 3 * (self.stream if self._setup.choices.fused_kernels else self.in_fp32) + self.stream


def moments_of(setup: Setup) -> list[_Moment]:
    """The moments of a step at which memory can peak."""
    of = _Activations(setup)
    return _moments_by_zero3(setup, of) if setup.layout.engine == "zero3" else _moments(setup, of)


def _moments(setup: Setup, of: _Activations) -> list[_Moment]:
    """Those of one process and of FSDP2, which gathers as much at each layer but for unfrozen weights."""
    gathered, last, stream = _gathered(setup), setup.shape.num_layers - 1, of.stream

    def in_backward(name: str, layer: int) -> list[_Moment]:
        gathered_bytes = _gathered_in_backward(setup, layer)
        return [_Moment(name, gathered_bytes, kept, 0, work) for kept, work in _in_backward(setup, layer, of)]

    at_end, at_loss = of.kept + of.of_last_norm, of.kept + of.of_last_norm + stream
    moments = [
        _Moment("at the embedding", gathered.at_embedding, 0, 0, of.at_embedding),
        _Moment("in the first layer", gathered.in_first_layer, 0, 0, stream),
        _Moment("at the end of the forward", gathered.at_end_of_forward, at_end, 0, 2 * stream),
        _Moment("at the loss", gathered.at_loss, at_loss, logits_bytes(setup), of.at_loss),
        _Moment("in the backward of the last norm", gathered.in_backward_of_norm, at_end, 0, of.in_backward_of_norm),
    ]
    if last >= setup.first_trained:
        moments += in_backward("in the backward of the last layer", last)
    if setup.recomputed and last not in setup.recomputed:  # all layers after it are freed
        moments += in_backward("in the backward of a recomputed layer", setup.recomputed[-1])
    for layer in range(setup.first_trained, last + 1):
        if unfrozen_in(setup, layer) or unfrozen_in(setup, layer + 1):
            moments += in_backward("in the backward of a layer", layer)
    later = [layer for layer in range(1, setup.shape.num_layers) if not setup.frees_buffer(layer - 1)]
    if later:
        moments.append(
            _Moment("while a layer is gathered", gathered.in_later_layer, of.kept_before(later[-1]), 0, stream)
        )
    return moments


def _moments_by_zero3(setup: Setup, of: _Activations) -> list[_Moment]:
    """Those of ZeRO-3: before and in every module, since what is gathered differs from one to the next."""
    step = step_of(
        setup.shape, setup.quant, setup.item_bytes, setup.unfrozen, setup.lora_ranks,
        trained_rows=setup.trained_rows, first_trained=setup.first_trained, num_ranks=setup.num_ranks,
        is_on_host=setup.layout.base_on_host,
    )  # fmt: skip
    stream, num_layers, logits = of.stream, setup.shape.num_layers, logits_bytes(setup)
    moments: list[_Moment] = []

    def at(
        way: Pass, module: Module, name: str, *, before: int, within: Iterable[tuple[int, int]], loss: int = 0
    ) -> None:
        """Activations while a module's parameters are gathered; activations and workspace while it computes."""
        held = step.gathered[way, module]
        moments.append(_Moment(f"before {name}", held.fetching, before, 0, 0))
        moments.extend(_Moment(f"in {name}", held.computing, kept, loss, work) for kept, work in within)

    at("forward", "embedding", "the embedding", before=0, within=[(0, of.at_embedding)])
    for layer in range(num_layers):
        kept = of.kept_before(layer)
        at("forward", layer, "a layer", before=kept + stream, within=[(kept, of.in_forward_of(layer))])
    # The last layer's output, the rows of it whose next token is predicted, and what the norm makes of them.
    at_end, in_norm = of.kept + of.of_last_norm, stream + (stream if setup.choices.fused_kernels else 2 * of.in_fp32)
    at("forward", "norm", "the last norm", before=of.kept + 2 * stream, within=[(at_end, in_norm)])
    at("forward", "head", "the loss", before=at_end + 2 * stream, within=[(at_end + stream, of.at_loss)], loss=logits)
    at("backward", "head", "the backward of the loss", before=at_end + stream, within=[(at_end + stream, stream)])
    in_norm = of.in_backward_of_norm
    at("backward", "norm", "the backward of the last norm", before=at_end + stream, within=[(at_end, in_norm)])
    for layer in range(setup.first_trained, num_layers):
        gradients = step.gradients[layer]
        before = of.kept_before(layer + 1) + stream + gradients.waiting
        within = _in_backward_by_zero3(setup, layer, of, gradients)
        at("backward", layer, "the backward of a layer", before=before, within=within)
    if setup.trained_rows:
        kept = of.kept_before(0) + stream
        at("backward", "embedding", "the backward of the embedding", before=kept, within=[(kept, stream)])
    return moments


def _in_backward(setup: Setup, layer: int, of: _Activations) -> Iterator[tuple[int, int]]:
    """Activations and workspace in a layer's backward, without engine or by FSDP2.

    Gradients of unfrozen weights that are sharded stay, whole, in the compute dtype until all are there, beside the fp32 copies of
    those of the layer above that are on their way, which a reduction of that layer's adapters ends. Then the layer's own are copied,
    while they take no more than the gathered weights did; in the first trained layer also the buffer of the next one is free.
    """
    if setup.adapter_ranks == 1:
        yield of.at_backward_of(layer), of.in_backward_of_down + _replicated_gradients(setup, layer)
        return
    above = 0 if layer + 1 in setup.layers else unfrozen_weights_in(setup, layer + 1)
    yield from _by_group(setup, layer, of, waiting=FP32 * above, item_bytes=setup.item_bytes)
    if layer > setup.first_trained:
        yield of.kept_before(layer), 2 * of.stream + FP32 * unfrozen_weights_in(setup, layer)


def _in_backward_by_zero3(setup: Setup, layer: int, of: _Activations, gradients: Gradients) -> list[tuple[int, int]]:
    """Activations and workspace in a layer's backward: gradients of weights stay, whole, until all of the layer's are there."""
    waiting = gradients.waiting + _largest_cast(setup, layer)
    at_reduction = of.kept_before(layer), 2 * of.stream + gradients.reducing
    return [*_by_group(setup, layer, of, waiting=waiting, item_bytes=FP32), at_reduction]


def _by_group(
    setup: Setup, layer: int, of: _Activations, *, waiting: int, item_bytes: int
) -> Iterator[tuple[int, int]]:
    """Activations and workspace in the backward of a layer's down_proj, of gate and up, and of attention.

    Args:
        waiting: bytes of gradients of layers above, which come up last first.
        item_bytes: of the layer's own gradients of weights, each of which stays.
    """
    held, gradients = of.at_backward_of(layer), waiting
    of_down, of_mlp, *of_attention = reversed(_weights_trained_by_group(setup, layer))
    has_wide = layer > setup.first_trained or setup.trained_rows or _begin_of_graph(setup, layer) < 3
    for weights, activations, workspace in (
        (of_down, held, of.in_backward_of_down),
        (of_mlp, held, 3 * of.stream),
        (sum(of_attention), held - (2 * of.wide if has_wide else 0), 2 * of.stream),
    ):
        gradients += item_bytes * weights
        yield activations, workspace + gradients


def _weights_trained_by_group(setup: Setup, layer: int) -> list[int]:
    """Weights of adapters, and of linears that are trained themselves, of each group of linears that share their input."""
    shapes, ranks, unfrozen = setup.shape.linear_shapes(), ranks_in(setup, layer), unfrozen_in(setup, layer)

    def weights(kind: str) -> int:
        return ranks.get(kind, 0) * sum(shapes[kind]) + (math.prod(shapes[kind]) if kind in unfrozen else 0)

    return [sum(weights(kind) for kind in group) for group in _GROUPS]


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
        host=on_host + (moments if layout.optimizer_on_host else 0) + 3 * FP32 * share,
        disk=3 * FP32 * setup.trained_weights,
    )
