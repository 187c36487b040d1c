"""The moments of a step at which memory can peak, and what is all-gathered, saved and worked in at each. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from dist_lora.layout.activations import Activations, begin_of_graph, largest_cast, logits_bytes
from dist_lora.layout.setup import (
    INPUT_GROUPS,
    Setup,
    block_bytes,
    block_bytes_of,
    embedding_bytes,
    ranks_in,
    unfrozen_in,
    unfrozen_weights_in,
)
from dist_lora.layout.storage import FP32
from dist_lora.layout.zero3 import Gradients, Module, Pass, step_of


@dataclass(frozen=True)
class Moment:
    """What a rank holds at one moment of a step, besides the base, the adapters and their optimizer state."""

    name: str
    gathered: int
    activations: int
    loss: int
    workspace: int

    @property
    def num_bytes(self) -> int:
        return self.gathered + self.activations + self.loss + self.workspace


def moments_of(setup: Setup) -> list[Moment]:
    """The moments of a step at which memory can peak."""
    of = Activations(setup)
    return _moments_by_zero3(setup, of) if setup.layout.engine == "zero3" else _moments(setup, of)


def _moments(setup: Setup, of: Activations) -> list[Moment]:
    """Those of one process and of FSDP2, which gathers as much at each layer but for unfrozen weights."""
    gathered, last, stream = _gathered(setup), setup.shape.num_layers - 1, of.stream

    def in_backward(name: str, layer: int) -> list[Moment]:
        gathered_bytes = _gathered_in_backward(setup, layer)
        return [Moment(name, gathered_bytes, kept, 0, work) for kept, work in _in_backward(setup, layer, of)]

    at_end, at_loss = of.kept + of.of_last_norm, of.kept + of.of_last_norm + stream
    moments = [
        Moment("at the embedding", gathered.at_embedding, 0, 0, of.at_embedding),
        Moment("in the first layer", gathered.in_first_layer, 0, 0, stream),
        Moment("at the end of the forward", gathered.at_end_of_forward, at_end, 0, 2 * stream),
        Moment("at the loss", gathered.at_loss, at_loss, logits_bytes(setup), of.at_loss),
        Moment("in the backward of the last norm", gathered.in_backward_of_norm, at_end, 0, of.in_backward_of_norm),
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
            Moment("while a layer is gathered", gathered.in_later_layer, of.kept_before(later[-1]), 0, stream)
        )
    return moments


def _moments_by_zero3(setup: Setup, of: Activations) -> list[Moment]:
    """Those of ZeRO-3: before and in every module, since what is gathered differs from one to the next."""
    step = step_of(
        setup.shape, setup.quant, setup.item_bytes, setup.unfrozen, setup.lora_ranks,
        trained_rows=setup.trained_rows, first_trained=setup.first_trained, num_ranks=setup.num_ranks,
        is_on_host=setup.layout.base_on_host,
    )  # fmt: skip
    stream, num_layers, logits = of.stream, setup.shape.num_layers, logits_bytes(setup)
    moments: list[Moment] = []

    def at(
        way: Pass, module: Module, name: str, *, before: int, within: Iterable[tuple[int, int]], loss: int = 0
    ) -> None:
        """Activations while a module's parameters are gathered; activations and workspace while it computes."""
        held = step.gathered[way, module]
        moments.append(Moment(f"before {name}", held.fetching, before, 0, 0))
        moments.extend(Moment(f"in {name}", held.computing, kept, loss, work) for kept, work in within)

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


def _in_backward(setup: Setup, layer: int, of: Activations) -> Iterator[tuple[int, int]]:
    """Activations and workspace in a layer's backward, without engine or by FSDP2.

    Gradients of unfrozen weights that are sharded stay, whole, in the compute dtype until all are there, beside the fp32 copies of
    those of the layer above that are on their way, which a reduction of that layer's adapters ends. Then the layer's own are copied,
    while they take no more than the gathered weights did; in the first trained layer also the buffer of the next one is free.
    """
    if setup.adapter_ranks == 1:
        yield of.at_backward_of(layer), of.in_backward_of_down(layer) + _replicated_gradients(setup, layer)
        return
    above = 0 if layer + 1 in setup.layers else unfrozen_weights_in(setup, layer + 1)
    yield from _by_group(setup, layer, of, waiting=FP32 * above, item_bytes=setup.item_bytes)
    if layer > setup.first_trained:
        yield of.kept_before(layer), 2 * of.stream + FP32 * unfrozen_weights_in(setup, layer)


def _in_backward_by_zero3(setup: Setup, layer: int, of: Activations, gradients: Gradients) -> list[tuple[int, int]]:
    """Activations and workspace in a layer's backward: gradients of weights stay, whole, until all of the layer's are there."""
    waiting = gradients.waiting + largest_cast(setup, layer)
    at_reduction = of.kept_before(layer), 2 * of.stream + gradients.reducing
    return [*_by_group(setup, layer, of, waiting=waiting, item_bytes=FP32), at_reduction]


def _by_group(setup: Setup, layer: int, of: Activations, *, waiting: int, item_bytes: int) -> Iterator[tuple[int, int]]:
    """Activations and workspace in the backward of a layer's down_proj, of gate and up, and of attention.

    Args:
        waiting: bytes of gradients of layers above, which come up last first.
        item_bytes: of the layer's own gradients of weights, each of which stays.
    """
    held, gradients = of.at_backward_of(layer), waiting
    of_down, of_mlp, *of_attention = reversed(_weights_trained_by_group(setup, layer))
    has_wide = layer > setup.first_trained or setup.trained_rows or begin_of_graph(setup, layer) < 3
    for weights, activations, workspace in (
        (of_down, held, of.in_backward_of_down(layer)),
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

    return [sum(weights(kind) for kind in group) for group in INPUT_GROUPS]


def _replicated_gradients(setup: Setup, layer: int) -> int:
    """Whole gradients of a layer's unfrozen weights at once, in its backward, before they are added to those of the step.

    Those of the linears of one input, in fp32, and one in the compute dtype before it is cast.
    """
    c, shapes, kinds = setup.item_bytes, setup.shape.linear_shapes(), unfrozen_in(setup, layer)
    groups = [[math.prod(shapes[kind]) for kind in group if kind in kinds] for group in INPUT_GROUPS]
    return max(FP32 * sum(sizes) + (c if c != FP32 else 0) * max(sizes, default=0) for sizes in groups)


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
    order = [
        "input_layernorm",
        *INPUT_GROUPS[0],
        *INPUT_GROUPS[1],
        "post_attention_layernorm",
        *INPUT_GROUPS[2],
        *INPUT_GROUPS[3],
    ]
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
