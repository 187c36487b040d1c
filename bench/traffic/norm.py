"""``rms_norm`` as CUDA computes it: one kernel each way, with a statistic per row kept for the backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dist_lora.base.kernels.plain import FUSED_NORM_ON

# T rows, D width


@contextmanager
def fused_norms() -> Iterator[None]:
    """Within it the fused norm is an operator of the meta device too, with torch's own gradient, for whoever calls it.

    CUDA has kernels for it; on any other device torch 2.13 takes it apart into five operators, and into eleven in the backward.
    """
    library = torch.library.Library("aten", "IMPL", "Meta")
    try:
        for name, shape_only in (("_fused_rms_norm", _forward), ("_fused_rms_norm_backward", _backward)):
            # Library.impl refuses what can be taken apart; this is what it calls.
            library.m.impl(name, "Meta", shape_only, False)
        FUSED_NORM_ON.add("meta")
        yield
    finally:
        FUSED_NORM_ON.discard("meta")
        library._destroy()


def _forward(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """The normed rows ``(T, D)``, and 1 / rms of each ``(T, 1)`` in fp32."""
    assert len(shape) == 1, "a norm over several dims isn't counted"
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _backward(
    d_y: Tensor, x: Tensor, shape: Sequence[int], inverse_rms: Tensor, weight: Tensor | None, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient ``(T, D)`` of ``x``; CUDA has further kernels for that of the weight, which is frozen here."""
    assert not (mask[1] and weight is not None), "a trained norm: its weight's gradient isn't counted"
    return torch.empty_like(x), None
