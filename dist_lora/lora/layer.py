"""What is trained: a LoRA adapter of one linear, ``y = x W^T + (alpha / rank) (x A^T) B^T``, which base/linear.py computes;

and the rows of some tokens, in place of those of embedding or head, with which base/llama.py computes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# D_in and D_out of the frozen linear, R LoRA rank, N tokens whose rows are trained, D model width


class LoraAdapter(nn.Module):
    """The adapter of one frozen linear: A ``(R, D_in)`` and B ``(D_out, R)``, in fp32.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32))
        self.scale = alpha / rank
        self.dropout = dropout

    @property
    def active_dropout(self) -> float:
        """The probability by which a number of the input is dropped; 0 outside of training."""
        return self.dropout if self.training else 0.0

    def forward(self, step: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """``step(*inputs)``: the linears that share their input are computed at once, within each adapter's forward.

        An engine that shards A and B gathers them by hooks on this module: around its forward, and, by the inputs and
        outputs that it sees here, around its backward.
        """
        return step(*inputs)


class TokenRows(nn.Module):
    """Rows ``(N, D)`` in fp32 of the tokens ``ids`` ``(N,)``, ascending, in place of the embedding's or the head's own.

    Source: PEFT's trainable tokens (``peft.tuners.trainable_tokens``), which hold the new values too, no differences.
    """

    ids: Tensor

    def __init__(self, ids: Sequence[int], *, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(len(ids), width, dtype=torch.float32))
        # On the CPU: values on the meta device would be lost.
        self.register_buffer("ids", torch.tensor(ids, device="cpu"), persistent=False)

    def forward(self, step: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``step(*inputs)``; see ``LoraAdapter.forward``."""
        return step(*inputs)


def initial_a(name: str, *, rank: int, in_features: int, seed: int) -> Tensor:
    """A's first values, ``(R, D_in)`` fp32 on the CPU: uniform in ±1/sqrt(D_in), as PEFT initializes it.

    They depend on the seed and the linear's full name alone, so that every rank, engine and world size
    starts from the same bits. (B starts at zero.)
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
