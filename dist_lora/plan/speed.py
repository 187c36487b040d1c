"""How long a step takes: a range, from what is to be computed and sent and what the hardware reaches of its figures."""

from __future__ import annotations

from dataclasses import dataclass

from dist_lora.layout.memory import Setup, base_bytes_per_rank, block_bytes, logit_rows
from dist_lora.layout.storage import FP32
from dist_lora.plan.hardware import REACHED_COMPUTE, REACHED_MEMORY, REACHED_WIRE, Gpu
from dist_lora.plan.measured import Measured, Range
from dist_lora.plan.traffic import Collective, collectives_of, received_bytes


def flops_a_token(setup: Setup, *, context: int) -> float:
    """Floating-point operations of one token, forward and backward.

    4 for each frozen weight of a product (2 forward, 2 for the gradient to its input, none for its own), 6 for each
    trained one, 6 for each pair of head entries and seen token (half of ``context`` tokens are seen on average), and once
    more the forward of the layers where they are recomputed: 2, 2 and 2. Source: PaLM, arXiv 2204.02311, appendix B, without
    the frozen weights' own gradients.
    """
    shape = setup.shape
    in_layers = shape.num_layers * shape.weights_of_linears()
    head = shape.vocab * shape.hidden
    seen = shape.num_layers * shape.num_heads * shape.head_dim * context / 2 * 2  # scores, and the values' sum
    forward = 2 * (in_layers + setup.trained_weights + seen)
    once = 2 * forward + 2 * setup.trained_weights + 2 * seen + 4 * head
    return once + (forward if setup.recompute else 0)


@dataclass(frozen=True)
class Speed:
    """Seconds of a step at best and at worst, by what limits it; ``wall`` is what does so at best.

    ``compute_s`` are the products, ``dense_s`` what making quantized weights dense takes of the GPU's memory,
    ``inside_s`` the links of a node, ``between_s`` the network, ``host_s`` what is brought in of an offloaded base.
    """

    compute_s: tuple[float, float]
    dense_s: tuple[float, float]
    inside_s: tuple[float, float]
    between_s: tuple[float, float]
    host_s: tuple[float, float]
    step_s: tuple[float, float]
    wall: str
    tokens_a_step: int

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """Of all ranks together, at worst and at best."""
        return self.tokens_a_step / self.step_s[1], self.tokens_a_step / self.step_s[0]


def speed_of(setup: Setup, gpu: Gpu, *, context: int) -> Speed:
    """A step's time on ``gpu``: at best all wires are hidden behind the products, at worst nothing is."""
    if gpu.measured is not None:
        return measured_speed(setup, gpu, gpu.measured, context=context)
    tokens = setup.micro_tokens * setup.accumulation_steps
    flops = flops_a_token(setup, context=context) * tokens
    inside, between = received_bytes(setup)
    compute = _range(flops, gpu.products_flops_per_s, REACHED_COMPUTE)
    dense = _range(_dense_traffic(setup), gpu.memory_gb_s * 1e9, REACHED_MEMORY)
    links = _range(inside, gpu.link_gb_s * 1e9, REACHED_WIRE)
    network = _range(between, gpu.network_gb_s * 1e9, REACHED_WIRE)
    brought = 2 * setup.accumulation_steps * base_bytes_per_rank(setup) if setup.layout.base_on_host else 0
    host = _range(brought, gpu.host_gb_s * 1e9, REACHED_WIRE)
    walls = {
        compute[0] + dense[0]: "compute",
        links[0]: "the links within a node",
        network[0]: "the network between nodes",
        host[0]: "the link to host memory",
    }
    best = max(walls)
    worst = compute[1] + dense[1] + links[1] + network[1] + host[1]
    return Speed(compute, dense, links, network, host, (best, worst), walls[best], tokens * setup.num_ranks)


def _dense_traffic(setup: Setup) -> float:
    """Bytes of GPU memory that a step moves for making quantized linears dense: read as stored, written, read again.

    Once in the forward, once in the recomputation, once in the backward.
    """
    if setup.quant == "none":
        return 0.0
    shape, c = setup.shape, setup.item_bytes
    weights = shape.weights_of_linears()
    stored = block_bytes(setup)
    return setup.accumulation_steps * (3 if setup.recompute else 2) * shape.num_layers * (stored + 2 * c * weights)


# Of a measured machine

# Calls of operators that a layer makes in a forward, and as many again backward for each; FSDP2's hooks are among them.
CALLS_A_LAYER = 90
# What a step takes beside what is counted here: samples, Python between operators, metrics; of all that is counted.
UNCOUNTED = 0.10


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
    """A step's time by what was measured: each kind of work at the rate of the nearest size that was measured.

    Processors that compute also move what is sent, so that nothing is hidden there; a GPU may hide its wires.
    """
    layers = setup.shape.num_layers
    passes = float(setup.accumulation_steps)
    times = 3 if setup.recompute else 2  # products of a frozen linear: forward, gradient to its input, and again
    compute = _frozen_products(setup, measured) * (times * layers * passes)
    compute += _adapter_products(setup, measured) * ((times + 1) * len(setup.layers) * passes)
    compute += _attention(setup, measured, context) * (layers * passes * (4 / 3 if setup.recompute else 1))
    compute += _elementwise(setup, measured) * ((times + 1) * layers * passes)
    compute += (_loss(setup, measured)) * passes
    compute += _optimizer(setup, measured)
    calls = CALLS_A_LAYER * (times + 1) * layers * passes * measured.call_s
    compute += _Seconds(calls / 2, calls)
    dense = _dense(setup, measured) * (times * layers * passes)
    inside, between = _wires(setup, measured)
    carried = 2 * setup.accumulation_steps * base_bytes_per_rank(setup) if setup.layout.base_on_host else 0
    host = _Seconds(*_range(carried, gpu.host_gb_s * 1e9, REACHED_WIRE))
    work = compute + dense
    wires = inside + between + host
    best = max(work.best, inside.best, between.best, host.best) if measured.is_gpu else (work + wires).best
    walls = {
        work.best: "compute",
        inside.best: "the links within a node",
        between.best: "the network between nodes",
        host.best: "the link to host memory",
    }
    worst = (work + wires).worst * (1 + UNCOUNTED)
    tokens = setup.micro_tokens * setup.accumulation_steps * setup.num_ranks
    return Speed(
        compute.pair, dense.pair, inside.pair, between.pair, host.pair, (best, worst), walls[max(walls)], tokens
    )


def _frozen_products(setup: Setup, measured: Measured) -> _Seconds:
    """One product with each linear of a layer."""
    total = _Seconds()
    for out, width in setup.shape.linear_shapes().values():
        rate = measured.product_flops_per_s(setup.micro_tokens, width, out)
        total += _at(2 * setup.micro_tokens * width * out, rate)
    return total


def _adapter_products(setup: Setup, measured: Measured) -> _Seconds:
    """One product with each A and B of a layer."""
    total, tokens, rank = _Seconds(), setup.micro_tokens, setup.lora_rank
    for name in setup.targets:
        out, width = setup.shape.linear_shapes()[name]
        total += _at(2 * tokens * width * rank, measured.product_flops_per_s(tokens, width, rank))
        total += _at(2 * tokens * rank * out, measured.product_flops_per_s(tokens, rank, out))
    return total


def _attention(setup: Setup, measured: Measured, context: int) -> _Seconds:
    """A layer's, forward and backward, where documents are as long as they may be."""
    shape = setup.shape
    flops = 6 * shape.num_heads * shape.head_dim * context * setup.micro_tokens
    return _at(flops, measured.attention_flops_per_s(context, shape.num_heads, shape.head_dim))


def _elementwise(setup: Setup, measured: Measured) -> _Seconds:
    """A layer's forward: numbers that are read and written for each token, by the letters of ``arithmetic``.

    Both norms (6 D each) and both residual sums (3 D each), turning queries and keys (9 each of H E and G E), silu and the
    product with up (5 F), and for each adapter the sum of both gradients to its input (3 of its width, half of it counted
    here since a backward counts twice).
    """
    shape, c = setup.shape, setup.item_bytes
    numbers: float = 18 * shape.hidden + 9 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim + 5 * shape.ffn
    numbers += sum(1.5 * shape.linear_shapes()[name][1] for name in setup.targets)
    widest = setup.micro_tokens * shape.ffn * c
    return _at(setup.micro_tokens * numbers * c, measured.elementwise_bytes_per_s(widest))


def _loss(setup: Setup, measured: Measured) -> _Seconds:
    """The head's two products, in slices, and six passes over the logits in fp32."""
    shape = setup.shape
    rows = logit_rows(setup)
    flops = 2 * 2 * setup.micro_tokens * shape.hidden * shape.vocab
    products = _at(flops, measured.product_flops_per_s(rows, shape.hidden, shape.vocab))
    logits = FP32 * setup.micro_tokens * shape.vocab
    return products + _at(6 * logits, measured.elementwise_bytes_per_s(FP32 * rows * shape.vocab))


def _optimizer(setup: Setup, measured: Measured) -> _Seconds:
    """AdamW: weight, gradient and both moments read, all but the gradient written; the norm, and the gradients' sum over passes."""
    share = FP32 * setup.trained_weights / setup.adapter_ranks
    return _at((7 + 1 + 3 * setup.accumulation_steps) * share, measured.elementwise_bytes_per_s(share))


def _dense(setup: Setup, measured: Measured) -> _Seconds:
    """A layer's weights made dense once."""
    if setup.quant == "none":
        return _Seconds()
    return _at(setup.shape.weights_of_linears(), measured.dense_weights_per_s[setup.quant])


def _wires(setup: Setup, measured: Measured) -> tuple[_Seconds, _Seconds]:
    """What is sent within a node, and what crosses; a gathering is copied into its buffer and out of it besides."""
    inside = between = _Seconds()
    for each in collectives_of(setup):
        link = measured.links[_axis_of(each, setup)]["all-reduce" if each.kind == "all-reduce" else "all-gather"]
        spent = _at(each.received_bytes, link.bytes_per_s(each.num_bytes)) + _Seconds(
            each.count * link.latency_s / 2, each.count * link.latency_s
        )
        if each.kind != "all-reduce":
            spent += _at(2 * each.num_bytes * each.count, measured.elementwise_bytes_per_s(each.num_bytes))
        if each.crosses_nodes:
            between += spent
        else:
            inside += spent
    return inside, between


def _axis_of(each: Collective, setup: Setup) -> str:
    if not each.crosses_nodes:
        return "within a node"
    is_between = each.num_ranks == setup.num_ranks // setup.local_size
    return "between nodes" if is_between else "over all ranks"


def _range(amount: float, per_s: float, reached: tuple[float, float]) -> tuple[float, float]:
    low, high = reached
    return amount / (per_s * high), amount / (per_s * low)
