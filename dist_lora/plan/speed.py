"""How long a step takes: a range, from what is to be computed and sent and what the hardware reaches of its figures."""

from __future__ import annotations

from dataclasses import dataclass

from dist_lora.plan.arithmetic import Setup, base_bytes_of_a_rank, block_bytes
from dist_lora.plan.hardware import REACHED_COMPUTE, REACHED_MEMORY, REACHED_WIRE, Gpu
from dist_lora.plan.traffic import received_bytes


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
    tokens = setup.micro_tokens * setup.passes
    flops = flops_a_token(setup, context=context) * tokens
    inside, between = received_bytes(setup)
    compute = _range(flops, gpu.tflops * 1e12, REACHED_COMPUTE)
    dense = _range(_dense_traffic(setup), gpu.memory_gb_s * 1e9, REACHED_MEMORY)
    links = _range(inside, gpu.link_gb_s * 1e9, REACHED_WIRE)
    network = _range(between, gpu.network_gb_s * 1e9, REACHED_WIRE)
    brought = 2 * setup.passes * base_bytes_of_a_rank(setup) if setup.layout.base_on_host else 0
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
    return setup.passes * (3 if setup.recompute else 2) * shape.num_layers * (stored + 2 * c * weights)


def _range(amount: float, per_s: float, reached: tuple[float, float]) -> tuple[float, float]:
    low, high = reached
    return amount / (per_s * high), amount / (per_s * low)
