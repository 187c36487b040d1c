"""The same work in plain torch, on any device and in any dtype: what runs without kernels, and what they are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lora.layout.activations import LOGITS_IN_FP32

# T tokens, D width of a norm, F feed-forward width, H heads, E width of a head, K rows of logits, V vocabulary

# Types of devices on which torch has a kernel for a norm's backward.
FUSED_NORM_ON = {"cuda"}
_NORM_ROWS = 2048  # whose share in the gradient of a norm's weight is computed at once
# Logits whose softmax is computed at once: on the CPU they stay in its caches, on a GPU largely in the second level.
_LOGITS_ON_CPU, _LOGITS_ON_GPU = 2**20, LOGITS_IN_FP32


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``h``, the root-mean-square norm ``(T, D)`` of ``x`` ``(T, D)`` with a weight ``(D,)``, and 1 / rms ``(T, 1)``.

    Computed in fp32 at least. In 16 bits the normed row is rounded before the weight is applied, as Llama was trained.
    Source: arXiv 1910.07467.
    """
    of_both = weight if is_wide(x) else None
    h, inverse_rms = torch.ops.aten._fused_rms_norm(x, weight.shape, of_both, eps)
    return (h if is_wide(x) else h.mul_(weight)), inverse_rms


def norm_backward(d_h: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    """The gradient of ``x``: ``d_h w r - x r^3 mean(d_h w x)``, where ``r`` is 1 / rms. ``d_h`` may be overwritten."""
    if x.device.type in FUSED_NORM_ON:
        d_normed, scale = (d_h, weight) if is_wide(x) else (d_h.mul_(weight), None)
        backward = torch.ops.aten._fused_rms_norm_backward
        d_of_x: Tensor = backward(d_normed, x, weight.shape, inverse_rms, scale, [True, False])[0]
        return d_of_x
    wide = x if is_wide(x) else x.float()
    d_x = d_h.mul_(weight) if is_wide(x) else d_h.float().mul_(weight)
    along = (d_x * wide).sum(-1, keepdim=True).mul_(inverse_rms.pow(3)).div_(-x.shape[-1])
    return d_x.mul_(inverse_rms).addcmul_(wide, along).to(x.dtype)


def norm_weight_gradient(d_h: Tensor, x: Tensor, inverse_rms: Tensor) -> Tensor:
    """The gradient ``(D,)`` of a norm's weight in x's dtype: the sum over rows of ``d_h x r``, in fp32 at least."""
    total: Tensor | None = None
    for of_h, rows, scales in zip(*(torch.split(t, _NORM_ROWS) for t in (d_h, x, inverse_rms)), strict=True):
        normed = (rows if is_wide(x) else rows.float()) * scales
        part = (normed.to(x.dtype) * of_h.to(normed.dtype)).sum(0)  # rounded as it was before the weight was applied
        total = part if total is None else total.add_(part)
    return x.new_zeros(x.shape[1]) if total is None else total.to(x.dtype)


def is_wide(x: Tensor) -> bool:
    """Whether a tensor has at least 32 bits per number."""
    return x.dtype in (torch.float32, torch.float64)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of gate and up, each ``(T, F)``. Source: SwiGLU, arXiv 2002.05202."""
    return F.silu(gate).mul_(up)


def silu_times_backward(d_h: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; ``d_h`` is overwritten."""
    d_up = F.silu(gate).mul_(d_h)
    d_silu = d_h.mul_(up)
    return torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_silu), d_up


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads ``(T, H, E)`` rotated by their positions' angles, in Hugging Face's layout (halves, not pairs)."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def cross_entropies(logits: Tensor, labels: Tensor, *, in_fp32: Tensor | None, to_gradient: bool) -> Tensor:
    """Cross entropies ``(K, 1)`` in fp32 of logits ``(K, V)``, whose memory then holds no logits any more.

    With ``to_gradient`` it holds the gradient of their sum, ``softmax(logits)``, less one at each label. Five passes over some
    rows at a time, in fp32; what is rounded to 16 bits is only the logits and the result.

    Args:
        labels: ``(K, 1)``.
        in_fp32: ``(rows, V)``, memory for as many rows in fp32; None where the logits are in fp32 themselves.
    """
    of_label = logits.gather(-1, labels).float()
    largest, sums = torch.empty_like(of_label), torch.empty_like(of_label)
    if in_fp32 is not None:
        step = len(in_fp32)
    else:
        at_once = _LOGITS_ON_CPU if logits.device.type == "cpu" else _LOGITS_ON_GPU
        step = max(1, at_once // logits.shape[1])
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        rows = logits[part]
        values = rows if in_fp32 is None else in_fp32[: len(rows)]
        largest[part] = rows.amax(-1, keepdim=True)
        torch.sub(rows, largest[part], out=values)
        torch.sum(values.exp_(), -1, keepdim=True, out=sums[part])
        if to_gradient:
            torch.mul(values, sums[part].reciprocal(), out=rows)
    losses = largest + sums.log() - of_label
    if to_gradient:
        # From the loss, as exactly as it is: a label's probability near 1 in 16 bits would leave nothing of the difference.
        logits.scatter_(-1, labels, torch.expm1(-losses).to(logits.dtype))
    return losses
