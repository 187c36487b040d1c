"""The rates by which counted work becomes time: fixed, so that a change of the count is a change of the code.

They are what an H100 SXM reaches in large kernels: 700 of 989 TFLOP/s in bf16 products, 2.8 of 3.35 TB/s of its memory,
flash attention with causal masks forward and backward (FlashAttention-2 to 3, head width 128), and all-gathers over NVLink.
"""

from __future__ import annotations

from bench.traffic.cuda import Kernel

PRODUCT_FLOPS_PER_S = 700e12
MEMORY_BYTES_PER_S = 2.8e12
ATTENTION_FLOPS_PER_S = {"forward": 330e12, "recomputation": 330e12, "backward": 270e12}
GATHER_BYTES_PER_S = 370e9


def seconds_of(kernel: Kernel, phase: str) -> float:
    """The time of a kernel: attention by its operations, anything else by what takes longer, operations or bytes."""
    if kernel.kind == "attention":
        return kernel.flops / ATTENTION_FLOPS_PER_S[phase]
    return max(kernel.flops / PRODUCT_FLOPS_PER_S, kernel.num_bytes / MEMORY_BYTES_PER_S)
