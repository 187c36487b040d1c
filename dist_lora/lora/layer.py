"""The LoRA step: ``y = x W^T + (alpha / rank) (x A^T) B^T``."""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# T tokens, D_in and D_out of the frozen linear, R LoRA rank


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

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``(T, D_out)``: the frozen linear's ``y`` plus the adapter's output for ``x`` ``(T, D_in)``."""
        if self.dropout and self.training:
            # F.dropout calls it on a GPU only: elsewhere its mask would have x's dtype instead of a byte per number.
            x = torch.native_dropout(x, self.dropout, True)[0]
        low = F.linear(x, self.lora_A.to(x.dtype))
        return torch.addmm(y, low, self.lora_B.to(x.dtype).t(), alpha=self.scale)


def initial_a(name: str, *, rank: int, in_features: int, seed: int) -> Tensor:
    """A's first values, ``(R, D_in)`` fp32 on the CPU: uniform in ±1/sqrt(D_in), as PEFT initializes it.

    They depend on the seed and the linear's full name alone, so that every rank, engine and world size
    starts from the same bits. (B starts at zero.)
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(in_features)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
