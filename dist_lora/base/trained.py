"""A weight of the base that is trained: in fp32, in place of the frozen one of a linear or a norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class TrainedWeight(nn.Module):
    """The weight of a linear ``(D_out, D_in)`` or of a norm ``(D,)``, trained in fp32 and computed in the base's dtype."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tuple(shape), dtype=torch.float32))

    def forward(self, step: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """``step(*inputs)``, which computes with the weight: see ``LoraAdapter.forward``."""
        return step(*inputs)
