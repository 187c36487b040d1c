"""A run's setup as the arithmetic of memory, traffic and speed takes it, and what its weights take on a rank. No torch."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dist_lora.config.schema import Quant, TrainSection
from dist_lora.herd.shape import Shape
from dist_lora.herd.unfrozen import layer_of
from dist_lora.layout.choices import ITEM_BYTES, Choices, Layout
from dist_lora.layout.storage import BasePart, base_parts

# The linears of a layer that share their input.
INPUT_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def cut_of_step(train: TrainSection, num_ranks: int) -> tuple[int, int, int]:
    """Sequences of a step that the fullest rank has, how many of them a micro-batch has, and the number of micro-batches."""
    of_rank = math.ceil(train.global_batch / num_ranks)
    of_micro = min(train.micro_batch, of_rank)
    return of_rank, of_micro, math.ceil(of_rank / of_micro)


@dataclass(frozen=True)
class Setup:
    """What memory, communication and time of a run depend on.

    Args:
        choices: every ``auto`` of the config, resolved.
        micro_sequences: sequences of a micro-batch, of ``sequence_tokens`` tokens each; no more than a rank has of a step.
        rank_sequences: sequences of a step that the fullest rank has; ``global_batch`` is all ranks'.
        accumulation_steps: micro-batches per rank in one step.
        lora_rank: of the adapters, the largest where they differ: what depends on each layer's adapters is an upper bound then.
        lora_ranks: of each adapted linear, by its full name.
        trained_weights: all A and B, the rows of tokens, and unfrozen weights.
        trained_rows: of embedding and head, whose gradient goes through every layer; 0 where none is trained.
        unfrozen: names of the linears and norms whose weights are trained.
        joins_documents: attention is computed per document of a micro-batch, and the outputs are concatenated.
        num_ranks: ranks of the world; ``local_size``: ranks per node.
        on_gpu: whether they compute on GPUs.
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
    micro_sequences: int
    sequence_tokens: int
    rank_sequences: int
    global_batch: int
    accumulation_steps: int
    joins_documents: bool
    has_dropout: bool
    trained_rows: int
    num_ranks: int
    local_size: int
    on_gpu: bool

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_sequences * self.sequence_tokens

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, of all ranks."""
        return self.global_batch * self.sequence_tokens

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
