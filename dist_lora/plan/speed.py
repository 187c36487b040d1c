"""How long a step takes: a range, from the work of a step and the fractions of its peak rates that the hardware reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_lora.herd.shape import Shape
from dist_lora.layout.activations import LOGITS_IN_FP32, logit_rows, logits_bytes
from dist_lora.layout.setup import Setup, base_bytes_on_host, block_bytes
from dist_lora.layout.storage import FP32, quantized_share
from dist_lora.plan.hardware import REACHED_COMPUTE, REACHED_LINK, REACHED_MEMORY, Gpu
from dist_lora.plan.measured import Measured, Range
from dist_lora.plan.traffic import Collective, collectives_of, received_bytes

NEVER_AGAIN = "down_proj"  # of its frozen matmul no backward needs the result: a recomputation ends before it
LINKS, NETWORK, HOST_LINK = "the links within a node", "the network between nodes", "the link to host memory"


def flops_per_token(setup: Setup, *, context: int) -> float:
    """Floating-point operations per token: those of ``Shape.flops``, and what is recomputed.

    A token attends to half of ``context`` tokens on average. With activation checkpointing the layers that recompute compute
    their forward once more, but for one frozen matmul (``NEVER_AGAIN``).
    """
    shape = setup.shape
    unfrozen = shape.unfrozen_weights(setup.unfrozen)
    needed = shape.flops(
        tokens=1, rows=1, pairs=context / 2, trained_weights=setup.trained_weights, unfrozen_weights=unfrozen
    )
    attention = shape.num_heads * shape.head_dim * context
    again = len(setup.recomputed) * (weights_computed_again(shape) + attention)
    of_linears = setup.trained_weights - setup.trained_rows * shape.hidden - unfrozen
    of_adapters = of_linears * adapted_again(setup) / max(1, len(setup.layers))
    return needed + 2 * (again + of_adapters)


def weights_computed_again(shape: Shape) -> int:
    """Weights of a layer's frozen matmuls that a recomputation computes."""
    return shape.weights_of_linears() - math.prod(shape.linear_shapes()[NEVER_AGAIN])


def adapted_again(setup: Setup) -> int:
    """Layers with adapters that recompute."""
    return len(set(setup.layers) & set(setup.recomputed))


@dataclass(frozen=True)
class Speed:
    """Seconds per step at best and at worst, by resource; ``bound_by`` is the bottleneck at best.

    ``uncounted`` names the resources of unknown rate, whose time isn't in it.

    ``compute_s``: matmuls; ``dequantize_s``: GPU memory traffic of dequantizing; ``intra_node_s``: links within a node;
    ``inter_node_s``: the network; ``host_s``: fetching an offloaded base.
    """

    compute_s: tuple[float, float]
    dequantize_s: tuple[float, float]
    intra_node_s: tuple[float, float]
    inter_node_s: tuple[float, float]
    host_s: tuple[float, float]
    step_s: tuple[float, float]
    bound_by: str
    tokens_per_step: int
    uncounted: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """Of all ranks, at worst and at best."""
        return self.tokens_per_step / self.step_s[1], self.tokens_per_step / self.step_s[0]


def speed_of(setup: Setup, gpu: Gpu, *, context: int) -> Speed | None:
    """A step's time on ``gpu``: at best all communication overlaps with the matmuls, at worst none does.

    Engine none's copies from host memory always do.

    None where the rate of its matmuls isn't known.
    """
    if gpu.measured is not None:
        return measured_speed(setup, gpu, gpu.measured, context=context)
    if gpu.products_flops_per_s is None:
        return None
    tokens = setup.rank_sequences * setup.sequence_tokens
    flops = flops_per_token(setup, context=context) * tokens
    inside, between = received_bytes(setup)
    compute = _range(flops, gpu.products_flops_per_s, REACHED_COMPUTE)
    dequantized = _dequantize_traffic(setup)
    dequantize = _at_gb_s(dequantized, gpu.memory_gb_s, REACHED_MEMORY)
    links = _at_gb_s(inside, gpu.link_gb_s, REACHED_LINK)
    network = _at_gb_s(between, gpu.network_gb_s, REACHED_LINK)
    fetched = fetched_bytes(setup)
    host = _at_gb_s(fetched, gpu.host_gb_s, REACHED_LINK)
    needs = {
        "dequantizing": (dequantized, gpu.memory_gb_s),
        LINKS: (inside, gpu.link_gb_s),
        NETWORK: (between, gpu.network_gb_s),
        HOST_LINK: (fetched, gpu.host_gb_s),
    }
    bottlenecks = {
        compute[0] + dequantize[0]: "compute",
        links[0]: LINKS,
        network[0]: NETWORK,
        host[0]: HOST_LINK,
    }
    best = max(bottlenecks)
    work = compute[1] + dequantize[1]
    worst = links[1] + network[1] + (max(work, host[1]) if _fetches_ahead(setup) else work + host[1])
    return Speed(
        compute, dequantize, links, network, host, (best, worst), bottlenecks[best], setup.step_tokens,
        uncounted=tuple(name for name, (num_bytes, gb_s) in needs.items() if num_bytes and gb_s is None),
    )  # fmt: skip


def fetched_bytes(setup: Setup) -> float:
    """Bytes of the base that a rank fetches from host memory per step: all of it for the forward, and for the backward.

    Engine none fetches layers only, down to the first with an adapter. The two that are on the device where the forward turns
    into the backward, and the backward into the next forward, it need not fetch again (see ``engines.host_layers``).
    """
    if not _fetches_ahead(setup):
        return 2.0 * setup.accumulation_steps * base_bytes_on_host(setup)
    num_layers, first = setup.shape.num_layers, setup.first_trained
    fetches = 2 * (num_layers - 2) if first == 0 else num_layers - (first == 1) + max(0, num_layers - 2 - first)
    of_layer = base_bytes_on_host(setup) / num_layers
    return setup.accumulation_steps * of_layer * (fetches if num_layers > 2 else 0)


def _fetches_ahead(setup: Setup) -> bool:
    """Whether layers come from host memory while others compute, also at worst: on a stream and in buffers of their own."""
    return setup.layout.engine == "none" and setup.layout.base_on_host


def _dequantize_traffic(setup: Setup) -> float:
    """Bytes of GPU memory traffic per step to dequantize linears: read as stored, written, read again.

    Once in the forward, once in the backward, and once in the recomputation.
    """
    if setup.quant == "none":
        return 0.0
    shape, c = setup.shape, setup.item_bytes
    weights = shape.weights_of_linears()
    stored = block_bytes(setup)
    times = setup.accumulation_steps * _dense_times(setup)
    return times * quantized_share(shape) * (stored + 2 * c * weights)


def _dense_times(setup: Setup) -> float:
    """How often a layer's linears are dequantized in a micro-batch, over all layers; see ``NEVER_AGAIN``."""
    again = weights_computed_again(setup.shape) / setup.shape.weights_of_linears()
    return 2 * setup.shape.num_layers + len(setup.recomputed) * again


# On a measured machine

# Operator calls of a layer's forward, FSDP2's hooks included; as many again in the backward.
CALLS_PER_LAYER = 90
# Fraction of a step that isn't modelled here: samples, Python between operators, metrics.
UNMODELLED = 0.10


@dataclass(frozen=True)
class _Seconds:
    """A time at best and at worst."""

    best: float = 0.0
    worst: float = 0.0

    def __add__(self, other: _Seconds) -> _Seconds:
        return _Seconds(self.best + other.best, self.worst + other.worst)

    def __mul__(self, times: float) -> _Seconds:
        return _Seconds(self.best * times, self.worst * times)

    @property
    def pair(self) -> tuple[float, float]:
        return self.best, self.worst


def _at(amount: float, per_s: Range) -> _Seconds:
    slow, fast = per_s
    return _Seconds(amount / fast, amount / slow)


def measured_speed(setup: Setup, gpu: Gpu, measured: Measured, *, context: int) -> Speed:
    """A step's time from measurements: each kind of work at the rate of the nearest measured size.

    CPU cores that compute also communicate, so nothing overlaps there; a GPU may overlap both.
    """
    layers, again = setup.shape.num_layers, len(setup.recomputed)
    micro_batches = setup.rank_sequences / setup.micro_sequences  # the last one may have fewer sequences
    # Matmuls of all frozen linears: forward, input gradient, recomputation; an adapter has its own gradient besides.
    times = 2 * layers + again
    compute = _frozen_matmuls(setup, measured) * (2 * layers * micro_batches)
    compute += _frozen_matmuls(setup, measured, but=NEVER_AGAIN) * (again * micro_batches)
    compute += _adapter_matmuls(setup, measured) * ((3 * len(setup.layers) + adapted_again(setup)) * micro_batches)
    compute += _weight_gradients(setup, measured) * micro_batches
    compute += _attention(setup, measured, context) * ((layers + again / 3) * micro_batches)
    compute += _elementwise(setup, measured) * ((times + layers) * micro_batches)
    compute += _loss(setup, measured) * micro_batches
    compute += _optimizer(setup, measured)
    calls = CALLS_PER_LAYER * (times + layers) * setup.accumulation_steps * measured.call_s
    compute += _Seconds(calls / 2, calls)
    dequantize = _dequantize(setup, measured) * (_dense_times(setup) * setup.accumulation_steps)
    inside, between = _communication(setup, measured)
    fetched = fetched_bytes(setup)
    host = _Seconds(*_at_gb_s(fetched, gpu.host_gb_s, REACHED_LINK))
    work = compute + dequantize
    communication = inside + between + host
    best = max(work.best, inside.best, between.best, host.best) if measured.is_gpu else (work + communication).best
    bottlenecks = {
        work.best: "compute",
        inside.best: LINKS,
        between.best: NETWORK,
        host.best: HOST_LINK,
    }
    worst = (work + communication).worst
    if measured.is_gpu and _fetches_ahead(setup):
        worst -= min(work.worst, host.worst)
    worst *= 1 + UNMODELLED
    return Speed(
        compute.pair,
        dequantize.pair,
        inside.pair,
        between.pair,
        host.pair,
        (best, worst),
        bottlenecks[max(bottlenecks)],
        setup.step_tokens,
    )


def _frozen_matmuls(setup: Setup, measured: Measured, *, but: str | None = None) -> _Seconds:
    """One matmul with each linear of a layer but this one."""
    total = _Seconds()
    for out, width in (shape for name, shape in setup.shape.linear_shapes().items() if name != but):
        rate = measured.product_flops_per_s(setup.micro_tokens, width, out)
        total += _at(2 * setup.micro_tokens * width * out, rate)
    return total


def _adapter_matmuls(setup: Setup, measured: Measured) -> _Seconds:
    """One matmul with each A and B of a layer."""
    total, tokens, rank = _Seconds(), setup.micro_tokens, setup.lora_rank
    for name in setup.targets:
        out, width = setup.shape.linear_shapes()[name]
        total += _at(2 * tokens * width * rank, measured.product_flops_per_s(tokens, width, rank))
        total += _at(2 * tokens * rank * out, measured.product_flops_per_s(tokens, rank, out))
    return total


def _weight_gradients(setup: Setup, measured: Measured) -> _Seconds:
    """The products that give the gradients of all unfrozen linears."""
    total, shapes = _Seconds(), setup.shape.linear_shapes()
    for out, width in (shapes[kind] for name in setup.unfrozen if (kind := name.rpartition(".")[2]) in shapes):
        rate = measured.product_flops_per_s(setup.micro_tokens, width, out)
        total += _at(2 * setup.micro_tokens * width * out, rate)
    return total


def _attention(setup: Setup, measured: Measured, context: int) -> _Seconds:
    """A layer's attention, forward and backward, with documents of maximum length."""
    shape = setup.shape
    flops = 6 * shape.num_heads * shape.head_dim * context * setup.micro_tokens
    return _at(flops, measured.attention_flops_per_s(context, shape.num_heads, shape.head_dim))


def _elementwise(setup: Setup, measured: Measured) -> _Seconds:
    """A layer's forward: numbers read and written per token, in the letters of ``layout.activations``.

    Fused, the backward takes less than twice as many: the first norm (2 D), the second with the sum before it (4 D), the last
    sum (3 D), RoPE in place (2 each of H E and G E), silu times up (3 F). Otherwise both norms (6 D each) and both residual
    sums (3 D each), RoPE of queries and keys (9 each of H E and G E), silu and the product with up (5 F), and per adapter the
    sum of both gradients of its input (3 times its width, of which half is counted here, since the backward counts twice).
    """
    shape, c = setup.shape, setup.item_bytes
    widest = setup.micro_tokens * shape.ffn * c
    if setup.choices.fused_kernels:
        fused = 9 * shape.hidden + 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim + 3 * shape.ffn
        return _at(setup.micro_tokens * fused * c, measured.elementwise_bytes_per_s(widest))
    numbers: float = 18 * shape.hidden + 9 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim + 5 * shape.ffn
    numbers += sum(1.5 * shape.linear_shapes()[name][1] for name in setup.targets)
    return _at(setup.micro_tokens * numbers * c, measured.elementwise_bytes_per_s(widest))


def _loss(setup: Setup, measured: Measured) -> _Seconds:
    """The head's two matmuls, in slices, and two passes over the logits, or five, of which some rows at a time are in fp32.

    Fused: read, and read and written. Otherwise largest (read), difference and ``exp`` (read and written), sum (read), product
    with its reciprocal (read and written).
    """
    shape, c = setup.shape, setup.item_bytes
    flops = 2 * 2 * setup.micro_tokens * shape.hidden * shape.vocab
    products = _at(flops, measured.product_flops_per_s(logit_rows(setup), shape.hidden, shape.vocab))
    bytes_per_logit, at_once = c + (c + FP32) + 2 * FP32 + FP32 + (FP32 + c), FP32 * LOGITS_IN_FP32
    if setup.choices.fused_kernels:
        bytes_per_logit, at_once = 3 * c, logits_bytes(setup)
    rate = measured.elementwise_bytes_per_s(at_once)
    return products + _at(bytes_per_logit * setup.micro_tokens * shape.vocab, rate)


def _optimizer(setup: Setup, measured: Measured) -> _Seconds:
    """AdamW: weight, gradient and both moments read, all but the gradient written; the norm; gradient accumulation."""
    shard = FP32 * setup.trained_weights / setup.adapter_ranks
    return _at((7 + 1 + 3 * setup.accumulation_steps) * shard, measured.elementwise_bytes_per_s(shard))


def _dequantize(setup: Setup, measured: Measured) -> _Seconds:
    """Dequantizing a layer's weights once."""
    if setup.quant == "none":
        return _Seconds()
    return _at(
        quantized_share(setup.shape) * setup.shape.weights_of_linears(), measured.dense_weights_per_s[setup.quant]
    )


def _communication(setup: Setup, measured: Measured) -> tuple[_Seconds, _Seconds]:
    """Collectives within a node, and between nodes; an all-gather is also copied into its buffer and out of it."""
    inside = between = _Seconds()
    for sent in collectives_of(setup):
        link = measured.links[_axis_of(sent, setup)]["all-reduce" if sent.kind == "all-reduce" else "all-gather"]
        spent = _at(sent.received_bytes, link.bytes_per_s(sent.num_bytes)) + _Seconds(
            sent.count * link.latency_s / 2, sent.count * link.latency_s
        )
        if sent.kind != "all-reduce":
            spent += _at(2 * sent.num_bytes * sent.count, measured.elementwise_bytes_per_s(sent.num_bytes))
        if sent.crosses_nodes:
            between += spent
        else:
            inside += spent
    return inside, between


def _axis_of(sent: Collective, setup: Setup) -> str:
    if not sent.crosses_nodes:
        return "within a node"
    is_between = sent.num_ranks == setup.num_ranks // setup.local_size
    return "between nodes" if is_between else "over all ranks"


def _at_gb_s(num_bytes: float, gb_s: float | None, reached: tuple[float, float]) -> tuple[float, float]:
    """As ``_range``; nothing where the rate isn't known."""
    return (0.0, 0.0) if gb_s is None else _range(num_bytes, gb_s * 1e9, reached)


def _range(amount: float, per_s: float, reached: tuple[float, float]) -> tuple[float, float]:
    low, high = reached
    return amount / (per_s * high), amount / (per_s * low)
