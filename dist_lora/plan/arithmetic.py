"""What each rank of a run holds, sends and computes, by arithmetic: no torch, no weights, a fraction of a second.

The rank that is meant is the one that holds most: the first, where rows do not divide. Letters: T tokens of a
micro-batch, K of them with a label, D model width, F feed-forward width, H and G heads of queries and of keys, E width
of a head, V vocabulary, R LoRA rank, L layers; c bytes of a number in the type that is computed in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dist_lora.config.schema import Config
from dist_lora.herd.facts import Shape
from dist_lora.plan.layout import Layout, choose_layout

FP32 = 4
LOGITS_AT_ONCE = 2**25  # as the loss has it
NF4_BLOCK = 64


@dataclass(frozen=True)
class Setup:
    """A run, as far as memory, wires and time depend on it.

    Args:
        item_bytes: c, of the type that is computed in.
        recompute: activations are computed again in the backward.
        num_ranks: R of the world; ``local_size`` of a node.
    """

    shape: Shape
    quant: str
    item_bytes: int
    lora_rank: int
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    micro_tokens: int
    passes: int
    recompute: bool
    layout: Layout
    num_ranks: int
    local_size: int

    @property
    def base_ranks(self) -> int:
        """Over how many ranks the base is cut."""
        if self.layout.engine == "none":
            return 1
        return self.num_ranks if self.layout.base_shard == "world" else self.local_size

    @property
    def adapter_ranks(self) -> int:
        """Over how many ranks the adapters are cut."""
        if self.layout.adapters == "replicate":
            return 1
        return self.num_ranks if self.layout.engine == "zero3" else self.local_size

    @property
    def trained_weights(self) -> int:
        """Elements of all A and B."""
        return self.shape.adapter_parameters(self.targets, self.layers, self.lora_rank)


def setup_of(
    config: Config, shape: Shape, *, num_nodes: int, gpus_per_node: int, device_bytes: int, on_gpu: bool = True
) -> Setup:
    """The setup of a config on so many nodes, ``auto`` resolved as a run resolves it.

    Raises:
        ConfigError: settings of ``parallel`` contradict each other or the world; a layer that the model doesn't have.
    """
    num_ranks = num_nodes * gpus_per_node
    is_half = config.model.dtype == "bf16" or (config.model.dtype == "auto" and on_gpu)
    item_bytes = 2 if is_half else 4
    targets, layers = config.lora.target_names(), config.lora.layer_indices(shape.num_layers)
    layout = choose_layout(
        config.parallel,
        world_size=num_ranks,
        local_size=config.parallel.node_size or gpus_per_node,
        base_bytes=sum(part.num_bytes for part in base_parts(shape, quant=config.model.quant, item_bytes=item_bytes)),
        trained_weights=shape.adapter_parameters(targets, layers, config.lora.rank),
        device_bytes=device_bytes,
    )
    train = config.train
    wanted = train.activation_checkpointing
    return Setup(
        shape=shape,
        quant=config.model.quant,
        item_bytes=item_bytes,
        lora_rank=config.lora.rank,
        targets=targets,
        layers=layers,
        micro_tokens=train.micro_batch * train.sequence_length,
        passes=math.ceil(math.ceil(train.global_batch / num_ranks) / train.micro_batch),
        recompute=on_gpu if wanted == "auto" else wanted,
        layout=layout,
        num_ranks=num_ranks,
        local_size=config.parallel.node_size or gpus_per_node,
    )


# The base


@dataclass(frozen=True)
class BasePart:
    """A frozen parameter: ``rows`` rows of ``row_bytes``; ``block`` is its layer, or None at the ends."""

    name: str
    rows: int
    row_bytes: int
    block: int | None

    @property
    def num_bytes(self) -> int:
        """Of the whole."""
        return self.rows * self.row_bytes

    def shard_bytes(self, num_ranks: int) -> int:
        """Of the largest shard by rows."""
        return math.ceil(self.rows / num_ranks) * self.row_bytes


def base_parts(shape: Shape, *, quant: str, item_bytes: int) -> list[BasePart]:
    """Every frozen parameter as a run keeps it: linears of the layers quantized, all else as it is."""
    parts = [BasePart("embed_tokens", shape.vocab, shape.hidden * item_bytes, None)]
    for layer in range(shape.num_layers):
        for name, (out, width) in shape.linear_shapes().items():
            parts += [
                BasePart(f"{name}.{part}", out, size, layer) for part, size in _row_bytes(quant, width, item_bytes)
            ]
        parts += [BasePart(f"norm{i}", shape.hidden, item_bytes, layer) for i in (1, 2)]
    parts.append(BasePart("norm", shape.hidden, item_bytes, None))
    if not shape.tied:
        parts.append(BasePart("lm_head", shape.vocab, shape.hidden * item_bytes, None))
    return parts


def _row_bytes(quant: str, width: int, item_bytes: int) -> Iterator[tuple[str, int]]:
    if quant == "nf4":
        yield "codes", width // 2
        yield "absmax", FP32 * (width // NF4_BLOCK)
    elif quant == "int8":
        yield "codes", width
        yield "scale", FP32
    else:
        yield "weight", width * item_bytes


def base_bytes_of_a_rank(setup: Setup) -> int:
    """The rank's share of the base."""
    parts = base_parts(setup.shape, quant=setup.quant, item_bytes=setup.item_bytes)
    return sum(part.shard_bytes(setup.base_ranks) for part in parts)


def block_bytes(setup: Setup) -> int:
    """One layer of the base, whole."""
    parts = base_parts(setup.shape, quant=setup.quant, item_bytes=setup.item_bytes)
    return sum(part.num_bytes for part in parts if part.block == 0)


def end_bytes(setup: Setup) -> int:
    """The embedding, or the head, whole."""
    return setup.shape.vocab * setup.shape.hidden * setup.item_bytes


# What a pass keeps


def kept_bytes_of_a_layer(setup: Setup, *, num_targets: int | None = None) -> float:
    """What the backward of one layer needs of its forward, without recomputation.

    By the letters of this file, for each token: the inputs of both norms, of q k v and of gate and up (4 D), queries,
    keys, values and what attention gave (2 H E + 2 G E), gate, up, silu and their product (4 F), each in c bytes (the
    norms' inputs in fp32), a log-sum for each head and two scales of norms in fp32, and R numbers for each adapter.
    In 16 bits an adapter's A and B are cast, and the casts kept.
    """
    shape, c, tokens = setup.shape, setup.item_bytes, setup.micro_tokens
    heads = 2 * shape.num_heads * shape.head_dim + 2 * shape.num_kv_heads * shape.head_dim
    numbers = 2 * shape.hidden + heads + 4 * shape.ffn
    fp32_numbers = 2 * shape.hidden + shape.num_heads + 2
    linears = shape.linear_shapes()
    per_token = c * numbers + FP32 * fp32_numbers + c * setup.lora_rank * len(setup.targets)
    casts = setup.lora_rank * sum(sum(linears[name]) for name in setup.targets) * c if c != FP32 else 0
    return tokens * per_token + casts


def loss_bytes(setup: Setup) -> int:
    """What the loss takes beside the head: hidden rows and their gradient (K D each), and a slice of logits.

    K is taken as T. A slice is held twice in fp32 while its log-sum is taken.
    """
    shape, c = setup.shape, setup.item_bytes
    rows = min(setup.micro_tokens, max(1, LOGITS_AT_ONCE // shape.vocab))
    return 2 * setup.micro_tokens * shape.hidden * c + 2 * FP32 * rows * shape.vocab


def dense_bytes(setup: Setup) -> int:
    """The largest linear made dense for a product; 0 where it is stored so."""
    if setup.quant == "none":
        return 0
    return setup.item_bytes * max(out * width for out, width in setup.shape.linear_shapes().values())


@dataclass(frozen=True)
class Memory:
    """What the fullest rank's device holds when most is held, by what it is, in bytes; ``host`` beside it, and ``disk``.

    ``when`` names the moment.
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
        """All of it."""
        return (
            self.base + self.adapters + self.gradients + self.optimizer + self.gathered + self.activations + self.loss
            + self.workspace
        )  # fmt: skip


def memory_of(setup: Setup) -> Memory:
    """The fullest rank at the fullest moment of a step: at the loss, or in the backward of the last layer."""
    layout, shape, c = setup.layout, setup.shape, setup.item_bytes
    share = math.ceil(setup.trained_weights / setup.adapter_ranks)
    base = base_bytes_of_a_rank(setup)
    is_cut = layout.engine != "none"
    stream = setup.micro_tokens * shape.hidden * c  # one layer's output
    of_layer = kept_bytes_of_a_layer(setup)
    kept = stream * shape.num_layers if setup.recompute else of_layer * shape.num_layers
    turns = setup.micro_tokens * shape.head_dim * c  # cosines and sines, shared by all layers
    adapters_gathered = 0
    if setup.adapter_ranks > 1:
        in_block = shape.adapter_parameters(setup.targets, (0,), setup.lora_rank)
        adapters_gathered = 2 * FP32 * in_block
    at_loss = (
        end_bytes(setup) * (2 if is_cut else 0) if not shape.tied else 0,
        kept + turns + stream,
        loss_bytes(setup),
        0,
    )
    in_backward = (
        (2 * block_bytes(setup) if is_cut else 0) + adapters_gathered,
        kept + turns + (of_layer if setup.recompute else 0),
        0,
        # The gradients of gate, up and their product, of a layer's output, and a dense weight.
        3 * setup.micro_tokens * shape.ffn * c + 3 * stream + dense_bytes(setup),
    )
    root = end_bytes(setup) if shape.tied and is_cut else 0  # a tied embedding stays gathered for the whole pass
    when, moment = max(
        (("at the loss", at_loss), ("in the backward of the last layer", in_backward)), key=lambda each: sum(each[1])
    )
    moments = 2 * FP32 * share
    return Memory(
        base=0 if layout.base_on_host else base,
        adapters=FP32 * share,
        gradients=FP32 * share,
        optimizer=0 if layout.optimizer_on_host else moments,
        gathered=moment[0] + root,
        activations=int(moment[1]),
        loss=int(moment[2]),
        workspace=int(moment[3]),
        when=when,
        host=(base if layout.base_on_host else 0) + (moments if layout.optimizer_on_host else 0) + 3 * FP32 * share,
        disk=3 * FP32 * setup.trained_weights,
    )
