"""What stands right before a group of linears: nothing, a norm, or SiLU times up; recomputed in their backward.

The linears' input ``h`` is a function of tensors that are saved anyway (the residual stream; gate and up): of these it is
computed again where a gradient of A needs it, and no copy of it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# T tokens, D width of the linears' input

# Types of devices on which torch has a kernel for a norm's backward.
FUSED_NORM_ON = {"cuda"}


class Before(Protocol):
    """A function of tensors, with its derivative, that autograd doesn't see. A value without state."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``h`` ``(T, D)`` of the inputs, and what else the backward needs."""
        ...

    def again(self, *saved: Tensor) -> Tensor:
        """``h`` once more, of the inputs and what else was saved."""
        ...

    def backward(self, d_h: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each input, of that of ``h``, whose memory may be overwritten."""
        ...


@dataclass(frozen=True)
class Nothing:
    """``h`` is the one input."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See ``Before``."""
        return inputs[0], ()

    def again(self, *saved: Tensor) -> Tensor:
        """See ``Before``."""
        return saved[0]

    def backward(self, d_h: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        """See ``Before``."""
        return (d_h,)


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm of ``x`` ``(T, D)`` with a frozen weight ``(D,)``, computed in fp32 at least.

    Saved beside the inputs: 1 / rms of each row, ``(T, 1)``. Source: arXiv 1910.07467.
    """

    eps: float

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See ``Before``. In 16 bits the normed row is rounded before the weight is applied, as Llama was trained."""
        x, weight = inputs
        of_both = weight if _is_wide(x) else None
        h, inverse_rms = torch.ops.aten._fused_rms_norm(x, weight.shape, of_both, self.eps)
        return (h if _is_wide(x) else h.mul_(weight)), (inverse_rms,)

    def again(self, *saved: Tensor) -> Tensor:
        """See ``Before``."""
        return self(*saved[:2])[0]

    def backward(self, d_h: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        """See ``Before``: of ``x`` ``d_h w r - x r^3 mean(d_h w x)``, where ``r`` is 1 / rms."""
        x, weight, inverse_rms = saved
        if x.device.type in FUSED_NORM_ON:
            d_normed, scale = (d_h, weight) if _is_wide(x) else (d_h.mul_(weight), None)
            backward = torch.ops.aten._fused_rms_norm_backward
            return backward(d_normed, x, weight.shape, inverse_rms, scale, [True, False])[0], None
        wide = x if _is_wide(x) else x.float()
        d_x = d_h.mul_(weight) if _is_wide(x) else d_h.float().mul_(weight)
        along = (d_x * wide).sum(-1, keepdim=True).mul_(inverse_rms.pow(3)).div_(-x.shape[-1])
        return d_x.mul_(inverse_rms).addcmul_(wide, along).to(x.dtype), None


@dataclass(frozen=True)
class SiluTimes:
    """``silu(gate) * up`` of gate and up, each ``(T, D)``. Source: SwiGLU, arXiv 2002.05202."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See ``Before``."""
        return self.again(*inputs), ()

    def again(self, *saved: Tensor) -> Tensor:
        """See ``Before``."""
        gate, up = saved
        return F.silu(gate).mul_(up)

    def backward(self, d_h: Tensor, *saved: Tensor) -> tuple[Tensor | None, ...]:
        """See ``Before``."""
        gate, up = saved
        d_up = F.silu(gate).mul_(d_h)
        d_silu = d_h.mul_(up)
        return torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_silu), d_up


def _is_wide(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, computed in fp32."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``(T, D)`` of ``x`` ``(T, D)``."""
        h: Tensor = _Norm.apply(Norm(self.eps), x, self.weight)  # type: ignore[no-untyped-call]
        return h


class _Norm(torch.autograd.Function):
    """A norm that no linear follows at once: of its backward it keeps x as it is, and a number a row."""

    @staticmethod
    def forward(ctx: Any, norm: Norm, x: Tensor, weight: Tensor) -> Tensor:
        h, more = norm(x, weight)
        ctx.norm = norm
        ctx.save_for_backward(x, weight, *more)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor | None, ...]:
        # What is overwritten of it is ours: in 16 bits a copy in fp32.
        return (None, *ctx.norm.backward(d_h.clone() if _is_wide(d_h) else d_h, *ctx.saved_tensors))
