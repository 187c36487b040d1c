"""Communication of a step: every collective that the engines start, by kind, participating ranks and bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dist_lora.layout.setup import Setup, parts_of, unfrozen_groups
from dist_lora.layout.storage import FP32, BasePart

NUM_SCALARS = 4  # loss, stop, failed save, seconds: all-reduced once per step in fp32


@dataclass(frozen=True)
class Collective:
    """``count`` collectives per step over ``num_ranks`` ranks, of ``num_bytes`` each (of the whole tensor)."""

    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    what: str
    num_ranks: int
    crosses_nodes: bool
    num_bytes: int
    count: int

    @property
    def received_bytes(self) -> float:
        """Bytes that a rank receives in all of them, as in a ring."""
        part = (self.num_ranks - 1) / self.num_ranks * self.num_bytes * self.count
        return 2 * part if self.kind == "all-reduce" else part


def collectives_of(setup: Setup) -> list[Collective]:
    """All collectives of one step of engine fsdp2 (one rank starts none; zero3 sends as many bytes in other pieces)."""
    if setup.num_ranks == 1:
        return []
    return [*_of_base(setup), *_of_adapters(setup)]


def _of_base(setup: Setup) -> Iterator[Collective]:
    ranks = setup.base_ranks
    crosses = ranks > setup.local_size
    parts = parts_of(setup)

    def padded(chosen: list[BasePart]) -> int:
        return ranks * sum(part.shard_bytes(ranks) for part in chosen)

    if ranks == 1:
        return
    ends = [part for part in parts if part.name in ("embed_tokens", "lm_head") and not setup.shape.tied]
    root = [part for part in parts if part.block is None and part not in ends]
    # The backward ends at the first layer that it has to go through; FSDP2 prefetches one layer more than it needs.
    first = setup.first_trained - (setup.layout.engine == "fsdp2")
    blocks, all_gathers = Counter[int](), Counter[int]()
    for part in parts:
        if part.block is not None:
            blocks[part.block] += padded([part])
    for layer, block in blocks.items():  # by size: layers differ where a publisher left linears unquantized
        all_gathers[block] += 1 + (layer >= first)
    for block, count in all_gathers.items():
        yield Collective(
            "all-gather", "layers, forward and backward", ranks, crosses, block, count * setup.accumulation_steps
        )
    for end in ends:
        yield Collective("all-gather", end.name, ranks, crosses, padded([end]), setup.accumulation_steps)
    if root:
        what = "last norm" + " and embedding" * setup.shape.tied
        yield Collective("all-gather", what, ranks, crosses, padded(root), setup.accumulation_steps)
    if setup.shape.tied and setup.layout.engine == "zero3":  # which frees it in between
        embedding = [part for part in parts if part.name == "embed_tokens"]
        yield Collective("all-gather", "embedding as head", ranks, crosses, padded(embedding), setup.accumulation_steps)


def _of_adapters(setup: Setup) -> Iterator[Collective]:
    world, ranks = setup.num_ranks, setup.adapter_ranks
    nodes = world // setup.local_size
    if setup.layout.adapters == "replicate":
        yield Collective("all-reduce", "adapters' gradients", world, nodes > 1, FP32 * setup.trained_weights, 1)
    else:
        in_layer = FP32 * _padded_adapters(setup)
        count = len(setup.layers) * setup.accumulation_steps
        if ranks > 1:
            yield Collective("all-gather", "adapters, forward and backward", ranks, False, in_layer, 2 * count)
            yield Collective("reduce-scatter", "adapters' gradients", ranks, False, in_layer, count)
            yield from _of_rows(setup)
            yield Collective("all-reduce", "the gradient's norm", ranks, False, 8, 1)
        if nodes > 1 and setup.layout.engine != "zero3":
            share = in_layer // ranks
            yield Collective("all-reduce", "adapters' gradients between nodes", nodes, True, share, len(setup.layers))
            if setup.trained_rows:
                yield Collective(
                    "all-reduce", "rows' gradients between nodes", nodes, True, _rows_bytes(setup) // ranks, 1
                )
        yield from _of_unfrozen(setup, nodes)
    yield Collective("all-reduce", "loss and requests", world, nodes > 1, FP32 * NUM_SCALARS, 1)


def _of_rows(setup: Setup) -> Iterator[Collective]:
    """Sharded rows of tokens: by FSDP2 gathered at the embedding and kept to the head, and gathered again for the backward.

    ZeRO-3 gathers a matrix's rows at the embedding, in its backward, and at the head, where they are kept for the backward.
    """
    if not setup.trained_rows:
        return
    ranks, num_bytes, count = setup.adapter_ranks, _rows_bytes(setup), setup.accumulation_steps
    gathered, times = num_bytes, 2
    if setup.layout.engine == "zero3":
        gathered, times = (num_bytes if setup.shape.tied else num_bytes // 2), 3
    yield Collective("all-gather", "rows of tokens, forward and backward", ranks, False, gathered, times * count)
    yield Collective("reduce-scatter", "rows' gradients", ranks, False, num_bytes, count)


def _rows_bytes(setup: Setup) -> int:
    """Bytes of the trained rows, those of each matrix padded to a multiple of the ranks."""
    matrices, ranks = 1 if setup.shape.tied else 2, setup.adapter_ranks
    return FP32 * matrices * ranks * math.ceil(setup.trained_rows / matrices / ranks) * setup.shape.hidden


def _of_unfrozen(setup: Setup, nodes: int) -> Iterator[Collective]:
    """Of unfrozen weights that are sharded: a group in each layer, and the last norm."""
    ranks, is_zero3 = setup.adapter_ranks, setup.layout.engine == "zero3"
    item_bytes = FP32 if is_zero3 else setup.item_bytes
    linears = setup.shape.linear_shapes()
    groups = Counter[tuple[int, int]]()
    for names in unfrozen_groups(setup):
        sizes = [linears.get(name, (setup.shape.hidden, 1)) for name in names]
        # ZeRO-3 keeps what the backward begins with.
        times = 1 if is_zero3 and names == ("norm",) else 2
        groups[sum(ranks * math.ceil(rows / ranks) * width for rows, width in sizes), times] += 1
    for (weights, times), num in groups.items():
        count = num * setup.accumulation_steps
        if ranks > 1:
            what = "unfrozen weights, forward and backward"
            yield Collective("all-gather", what, ranks, is_zero3 and nodes > 1, item_bytes * weights, times * count)
            yield Collective("reduce-scatter", "their gradients", ranks, is_zero3 and nodes > 1, FP32 * weights, count)
        if nodes > 1 and not is_zero3:
            yield Collective("all-reduce", "their gradients between nodes", nodes, True, FP32 * weights // ranks, num)


def _padded_adapters(setup: Setup) -> int:
    """Weights of a layer's adapters, with the rows of each A (R, in) and B (out, R) padded to a multiple of the ranks."""
    r, ranks = setup.lora_rank, setup.adapter_ranks
    shapes = [setup.shape.linear_shapes()[name] for name in setup.targets]
    return sum(ranks * (math.ceil(r / ranks) * width + math.ceil(out / ranks) * r) for out, width in shapes)


def received_bytes(setup: Setup) -> tuple[float, float]:
    """Bytes that a rank receives per step from its own node, and from other nodes, averaged over a node's ranks."""
    inside = between = 0.0
    for sent in collectives_of(setup):
        if not sent.crosses_nodes:
            inside += sent.received_bytes
        elif sent.num_ranks == setup.num_ranks // setup.local_size:
            between += sent.received_bytes
        else:
            # A ring enters each node once: one of its ranks receives from outside, another one in each of several rings.
            part = 1 / setup.local_size
            between += sent.received_bytes * part
            inside += sent.received_bytes * (1 - part)
    return inside, between
