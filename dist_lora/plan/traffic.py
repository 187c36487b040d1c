"""What a step sends: every collective by kind, by the ranks that take part, and by bytes, as the engines start them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dist_lora.layout.memory import Setup
from dist_lora.layout.storage import FP32, BasePart, base_parts

NUM_SCALARS = 4  # loss, stop, failed save, seconds: summed once a step in fp32


@dataclass(frozen=True)
class Collective:
    """``count`` collectives of a step over ``num_ranks`` ranks, each of ``num_bytes`` (of the whole tensor)."""

    kind: Literal["all-gather", "reduce-scatter", "all-reduce"]
    what: str
    num_ranks: int
    crosses_nodes: bool
    num_bytes: int
    count: int

    @property
    def received_bytes(self) -> float:
        """What a rank receives of all of them, by a ring."""
        part = (self.num_ranks - 1) / self.num_ranks * self.num_bytes * self.count
        return 2 * part if self.kind == "all-reduce" else part


def collectives_of(setup: Setup) -> list[Collective]:
    """All collectives of one step of engine fsdp2 (none has none; zero3's are as many bytes in other pieces)."""
    if setup.layout.engine == "none" or setup.num_ranks == 1:
        return []
    return [*_of_base(setup), *_of_adapters(setup)]


def _of_base(setup: Setup) -> Iterator[Collective]:
    ranks = setup.base_ranks
    crosses = ranks > setup.local_size
    parts = base_parts(setup.shape, quant=setup.quant, item_bytes=setup.item_bytes)

    def padded(chosen: list[BasePart]) -> int:
        return ranks * sum(part.shard_bytes(ranks) for part in chosen)

    if ranks == 1:
        return
    block = padded([part for part in parts if part.block == 0])
    ends = [part for part in parts if part.name in ("embed_tokens", "lm_head") and not setup.shape.tied]
    root = [part for part in parts if part.block is None and part not in ends]
    # Before the first adapted layer there is nothing to go back through; FSDP2 fetches one layer more than it needs.
    num_layers, first = setup.shape.num_layers, min(setup.layers)
    gatherings = num_layers + min(num_layers, num_layers - first + 1)
    yield Collective(
        "all-gather", "layers, forward and backward", ranks, crosses, block, gatherings * setup.accumulation_steps
    )
    for end in ends:
        yield Collective("all-gather", end.name, ranks, crosses, padded([end]), setup.accumulation_steps)
    yield Collective(
        "all-gather",
        "last norm" + " and embedding" * setup.shape.tied,
        ranks,
        crosses,
        padded(root),
        setup.accumulation_steps,
    )
    if setup.shape.tied and setup.layout.engine == "zero3":  # which lets go of it in between
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
            yield Collective("all-reduce", "the gradient's norm", ranks, False, 8, 1)
        if nodes > 1 and setup.layout.engine != "zero3":
            share = in_layer // ranks
            yield Collective("all-reduce", "adapters' gradients between nodes", nodes, True, share, len(setup.layers))
    yield Collective("all-reduce", "loss and requests", world, nodes > 1, FP32 * NUM_SCALARS, 1)


def _padded_adapters(setup: Setup) -> int:
    """Weights of a layer's adapters, each A (R, in) and B (out, R) filled up to as many rows as divide by the ranks."""
    r, ranks = setup.lora_rank, setup.adapter_ranks
    shapes = [setup.shape.linear_shapes()[name] for name in setup.targets]
    return sum(ranks * (math.ceil(r / ranks) * width + math.ceil(out / ranks) * r) for out, width in shapes)


def received_bytes(setup: Setup) -> tuple[float, float]:
    """Bytes that a rank receives in a step from its own node, and from other nodes, on average over a node's ranks."""
    inside = between = 0.0
    for each in collectives_of(setup):
        if not each.crosses_nodes:
            inside += each.received_bytes
        elif each.num_ranks == setup.num_ranks // setup.local_size:
            between += each.received_bytes
        else:
            # A ring enters each node once: one of its ranks receives from outside, by turns where there are several rings.
            part = 1 / setup.local_size
            between += each.received_bytes * part
            inside += each.received_bytes * (1 - part)
    return inside, between
