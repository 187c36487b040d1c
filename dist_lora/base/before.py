"""What stands right before a group of linears: nothing, a norm, or SiLU times up; recomputed in their backward.

The linears' input ``h`` is a function of tensors that are saved anyway (the residual stream; gate and up): of these it is
computed again where a gradient of A needs it, and no copy of it is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_lora.base.kernels import operators, plain
from dist_lora.base.trained import TrainedWeight

# T tokens, D width of the linears' input

UseH = Callable[[Tensor], None]


class Made(NamedTuple):
    """What a ``Before`` makes of its inputs: ``h`` ``(T, D)``, the residual stream if it has one, what its backward needs."""

    h: Tensor
    stream: Tensor | None
    saved: tuple[Tensor, ...]


class Before(Protocol):
    """A function of tensors, with its derivative, that autograd doesn't see. A value without state."""

    def __call__(self, *inputs: Tensor) -> Made:
        """See ``Made``."""
        ...

    def backward(
        self, d_h: Tensor, d_stream: Tensor | None, *saved: Tensor, use_h: UseH | None
    ) -> tuple[Tensor | None, ...]:
        """The gradient of each input, of those of ``h`` and of the stream. ``d_h`` may be overwritten.

        Args:
            use_h: called with ``h`` once more, which is gone when this returns.
        """
        ...


@dataclass(frozen=True)
class Nothing:
    """``h`` is the one input."""

    def __call__(self, *inputs: Tensor) -> Made:
        """See ``Before``."""
        return Made(inputs[0], None, inputs)

    def backward(
        self, d_h: Tensor, d_stream: Tensor | None, *saved: Tensor, use_h: UseH | None
    ) -> tuple[Tensor | None, ...]:
        """See ``Before``."""
        if use_h is not None:
            use_h(saved[0])
        return (d_h,)


@dataclass(frozen=True)
class Norm:
    """Root-mean-square norm with a weight ``(D,)`` of the residual stream, which passes through.

    Of the stream ``x`` ``(T, D)`` and the weight. Saved are the stream and 1 / rms of each row, ``(T, 1)``: see ``plain.norm``.

    Args:
        adds: between these there is a third input, which is added to the stream first.
        is_fused: by ``kernels.operators``.
        is_trained: the weight has a gradient.
    """

    eps: float
    adds: bool = False
    is_fused: bool = False
    is_trained: bool = False

    def __call__(self, *inputs: Tensor) -> Made:
        """See ``Before``."""
        stream, *delta, weight = inputs
        if self.adds and self.is_fused:
            stream, h, inverse_rms = operators.add_norm(stream, *delta, weight, self.eps)
        else:
            stream = stream + delta[0] if self.adds else stream
            h, inverse_rms = (operators.norm if self.is_fused else plain.norm)(stream, weight, self.eps)
        return Made(h, stream, (stream, weight, inverse_rms))

    def backward(
        self, d_h: Tensor, d_stream: Tensor | None, *saved: Tensor, use_h: UseH | None
    ) -> tuple[Tensor | None, ...]:
        """See ``Before``. The stream and what was added to it have the same gradient, one tensor."""
        x, weight, inverse_rms = saved
        assert d_stream is not None
        d_weight = self.of_weight(d_h, x, inverse_rms)
        if self.is_fused:
            h = None if use_h is None else torch.empty_like(x)
            operators.norm_backward_(d_h, x, weight, inverse_rms, d_stream.contiguous(), h)
            if use_h is not None and h is not None:
                use_h(h)
            return (d_h,) * (1 + self.adds) + (d_weight,)
        if use_h is not None:
            use_h(plain.norm(x, weight, self.eps)[0])
        d_x = plain.norm_backward(d_h, x, weight, inverse_rms).add_(d_stream)
        return (d_x,) * (1 + self.adds) + (d_weight,)

    def of_weight(self, d_h: Tensor, x: Tensor, inverse_rms: Tensor) -> Tensor | None:
        """The gradient of the weight ``(D,)``, where it is trained. Before ``d_h`` is overwritten."""
        return plain.norm_weight_gradient(d_h, x, inverse_rms) if self.is_trained else None


@dataclass(frozen=True)
class SiluTimes:
    """``silu(gate) * up`` of gate and up, each ``(T, D)``.

    Args:
        is_fused: by ``kernels.operators``, whose backward overwrites gate and up: nobody else may need them.
    """

    is_fused: bool = False

    def __call__(self, *inputs: Tensor) -> Made:
        """See ``Before``."""
        return Made((operators.silu_times if self.is_fused else plain.silu_times)(*inputs), None, inputs)

    def backward(
        self, d_h: Tensor, d_stream: Tensor | None, *saved: Tensor, use_h: UseH | None
    ) -> tuple[Tensor | None, ...]:
        """See ``Before``."""
        gate, up = (tensor.detach() for tensor in saved)  # which become gradients, without a graph
        if self.is_fused:
            operators.silu_times_backward_(d_h, gate, up, use_h is not None)
            if use_h is not None:
                use_h(d_h)
            return gate, up
        if use_h is not None:
            use_h(plain.silu_times(gate, up))
        return plain.silu_times_backward(d_h, gate, up)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, computed in fp32."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)
        self.eps = eps
        self.is_fused = False
        self.trained: TrainedWeight | None = None

    def unfreeze(self) -> TrainedWeight:
        """Have the weight trained: in place of the frozen one, and without values."""
        self.trained = TrainedWeight(self.weight.shape)
        self.register_parameter("weight", None)
        return self.trained

    def scale(self, dtype: torch.dtype) -> Tensor:
        """The weight ``(D,)``: as it is stored, or the trained one in ``dtype``."""
        return self.weight if self.trained is None else self.trained.weight.to(dtype)

    def before(self, *, adds: bool = False) -> Norm:
        """This norm as it is computed with the linears that follow."""
        return Norm(self.eps, adds, self.is_fused, self.trained is not None)

    def forward(self, x: Tensor) -> Tensor:
        """``(T, D)`` of ``x`` ``(T, D)``."""
        return self._normed(x)[0] if self.trained is None else self.trained(self._normed, x)[0]

    def _normed(self, x: Tensor) -> tuple[Tensor]:
        h: Tensor = _Norm.apply(self.before(), x, self.scale(x.dtype))  # type: ignore[no-untyped-call]
        return (h,)


class _Norm(torch.autograd.Function):
    """A norm that no linear follows at once: of its backward it keeps x as it is, and a number a row."""

    @staticmethod
    def forward(ctx: Any, norm: Norm, x: Tensor, weight: Tensor) -> Tensor:
        made = norm(x, weight)
        ctx.norm = norm
        ctx.save_for_backward(*made.saved)
        return made.h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        d_weight = ctx.norm.of_weight(d_h, x, inverse_rms)
        if ctx.norm.is_fused:
            d_x = d_h.clone(memory_format=torch.contiguous_format)  # may be another's, too
            operators.norm_backward_(d_x, x, weight, inverse_rms, None, None)
            return None, d_x, d_weight
        # What is overwritten of it is ours: in 16 bits a copy in fp32.
        d_x = plain.norm_backward(d_h.clone() if plain.is_wide(d_h) else d_h, x, weight, inverse_rms)
        return None, d_x, d_weight
