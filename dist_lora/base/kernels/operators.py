"""The operators: on CUDA a Triton kernel each, on the CPU plain torch, and shapes alone where tensors have no values.

What an operator overwrites ends with an underscore in its name. Gradients are those of the base's activations: norms are frozen.
Whether a model calls these or ``plain`` is decided when it is built, see ``support``.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dist_lora.base.kernels import plain

# T tokens, D width of a norm, F feed-forward width, H query heads, G key heads, E width of a head, K rows of logits, V vocabulary


def _compiled() -> ModuleType:
    from dist_lora.base.kernels import compiled  # imports Triton, which a machine without a GPU may not have

    return compiled


@torch.library.custom_op("dist_lora::norm", mutates_args=(), device_types="cpu")
def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``h`` ``(T, D)`` and 1 / rms ``(T, 1)``: see ``plain.norm``."""
    return plain.norm(x, weight, eps)


@norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((len(x), 1), dtype=torch.float32)


@norm.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _, h, inverse_rms = _compiled().norm(x, None, weight, eps)
    return h, inverse_rms


@torch.library.custom_op("dist_lora::add_norm", mutates_args=(), device_types="cpu")
def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``x + delta`` ``(T, D)``, and ``norm`` of it."""
    total = x + delta
    return total, *plain.norm(total, weight, eps)


@add_norm.register_fake
def _(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), x.new_empty((len(x), 1), dtype=torch.float32)


@add_norm.register_kernel("cuda")
def _(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total, h, inverse_rms = _compiled().norm(x, delta, weight, eps)
    return total, h, inverse_rms


@torch.library.custom_op("dist_lora::norm_backward_", mutates_args=("d_h", "h"), device_types="cpu")
def norm_backward_(
    d_h: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, d_stream: Tensor | None, h: Tensor | None
) -> None:
    """Overwrites ``d_h`` by the gradient of ``x``, plus ``d_stream``, that of ``x`` itself; ``h`` by h once more."""
    if h is not None:
        h.copy_((x * inverse_rms).to(x.dtype).mul_(weight))
    d_x = plain.norm_backward(d_h.clone(), x, weight, inverse_rms)
    d_h.copy_(d_x if d_stream is None else d_x.add_(d_stream))


@norm_backward_.register_fake
def _(d_h: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, d_stream: Tensor | None, h: Tensor | None) -> None:
    return None


@norm_backward_.register_kernel("cuda")
def _(d_h: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, d_stream: Tensor | None, h: Tensor | None) -> None:
    _compiled().norm_backward_(d_h, x, weight, inverse_rms, d_stream, h)


@torch.library.custom_op("dist_lora::silu_times", mutates_args=(), device_types="cpu")
def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of gate and up, each ``(T, F)``."""
    return plain.silu_times(gate, up)


@silu_times.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@silu_times.register_kernel("cuda")
def _(gate: Tensor, up: Tensor) -> Tensor:
    h: Tensor = _compiled().silu_times(gate, up)
    return h


@torch.library.custom_op("dist_lora::silu_times_backward_", mutates_args=("d_h", "gate", "up"), device_types="cpu")
def silu_times_backward_(d_h: Tensor, gate: Tensor, up: Tensor, needs_h: bool) -> None:
    """Overwrites gate and up by their gradients, and with ``needs_h`` the gradient ``d_h`` by h; all are ``(T, F)``."""
    h = plain.silu_times(gate, up)
    d_gate, d_up = plain.silu_times_backward(d_h.clone(), gate, up)
    gate.copy_(d_gate)
    up.copy_(d_up)
    if needs_h:
        d_h.copy_(h)


@silu_times_backward_.register_fake
def _(d_h: Tensor, gate: Tensor, up: Tensor, needs_h: bool) -> None:
    return None


@silu_times_backward_.register_kernel("cuda")
def _(d_h: Tensor, gate: Tensor, up: Tensor, needs_h: bool) -> None:
    _compiled().silu_times_backward_(d_h, gate, up, needs_h)


@torch.library.custom_op("dist_lora::rotate_", mutates_args=("query", "key"), device_types="cpu")
def rotate_(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> None:
    """Rotates query ``(T, H * E)`` and key ``(T, G * E)`` by their positions' angles; ``is_back`` by their negatives.

    Args:
        cos: and ``sin``: ``(T, 1, E / 2)``.
    """
    for heads in (query, key):
        turned = plain.rotate(heads.view(len(heads), -1, 2 * cos.shape[-1]), cos, -sin if is_back else sin)
        heads.copy_(turned.view(heads.shape))


@rotate_.register_fake
def _(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> None:
    return None


@rotate_.register_kernel("cuda")
def _(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> None:
    _compiled().rotate_(query, key, cos, sin, is_back)


@torch.library.custom_op("dist_lora::cross_entropy_", mutates_args=("logits",), device_types="cpu")
def cross_entropy_(logits: Tensor, labels: Tensor, to_gradient: bool) -> Tensor:
    """Cross entropies ``(K, 1)`` in fp32 of logits ``(K, V)`` over labels ``(K, 1)``.

    With ``to_gradient`` the logits are overwritten by the gradient of their sum. Without, they may be.
    """
    in_fp32 = None if plain.is_wide(logits) else logits.new_empty(logits.shape, dtype=torch.float32)
    return plain.cross_entropies(logits, labels, in_fp32=in_fp32, to_gradient=to_gradient)


@cross_entropy_.register_fake
def _(logits: Tensor, labels: Tensor, to_gradient: bool) -> Tensor:
    return logits.new_empty((len(logits), 1), dtype=torch.float32)


@cross_entropy_.register_kernel("cuda")
def _(logits: Tensor, labels: Tensor, to_gradient: bool) -> Tensor:
    losses: Tensor = _compiled().cross_entropy_(logits, labels, to_gradient)
    return losses
