"""``rms_norm`` as CUDA computes it: one kernel each way, with a statistic per row kept for the backward.

On any other device torch 2.13 takes it apart into five operators, seven of them in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# T rows, D width


@torch.library.custom_op("bench_traffic::rms_norm", mutates_args=())
def fused_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows ``(T, D)`` and each row's ``1 / rms`` ``(T, 1)`` in fp32 of ``x`` ``(T, D)``."""
    raise NotImplementedError("counted on the meta device only")


@fused_rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("bench_traffic::rms_norm_backward", mutates_args=())
def fused_rms_norm_backward(d_y: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient ``(T, D)`` of ``x``."""
    raise NotImplementedError("counted on the meta device only")


@fused_rms_norm_backward.register_fake
def _(d_y: Tensor, x: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    assert weight is None or not weight.requires_grad, "a trained norm: its weight's gradient isn't counted"
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight)


def _backward(ctx: Any, d_y: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    x, scale, weight = ctx.saved_tensors
    return fused_rms_norm_backward(d_y, x, scale, weight), None, None


fused_rms_norm.register_autograd(_backward, setup_context=_save)


@contextmanager
def fused_norms() -> Iterator[None]:
    """Within it, ``rms_norm`` of tensors on the meta device is the fused operator, also in a backward.

    As on CUDA, a norm whose weight has another dtype than ``x`` stays composed.
    """
    composed = torch.rms_norm

    def rms_norm(
        input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if not input.is_meta or (weight is not None and weight.dtype != input.dtype):
            return composed(input, list(normalized_shape), weight, eps)
        assert len(normalized_shape) == 1, "a norm over several dims isn't counted"
        normed: Tensor = fused_rms_norm(input, weight, torch.finfo(input.dtype).eps if eps is None else eps)[0]
        return normed

    # Not by a TorchFunctionMode: torch 2.13 suspends it for the whole of a call to Tensor.backward.
    with patch.object(torch, "rms_norm", rms_norm):
        yield
