"""Rotary position embedding: frequencies exact for Llama 3, 3.1 and 3.2, and their application."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_lora.base.kernels import operators, plain
from dist_lora.errors import WeightsError
from dist_lora.herd.shape import Shape

# T tokens, H query heads, G key heads, E width of a head


def inverse_frequencies(shape: Shape) -> Tensor:
    """The angle by which each pair of a head's entries rotates per position: ``(E / 2,)`` fp32.

    Always made on the CPU, so that every device and every rank has the same bits. Llama 3.1 and 3.2 stretch
    the long wavelengths by ``factor``, keep the short ones, and blend between.

    Source: ``apply_scaling`` of Meta's reference code (llama-models, llama3/model.py), in its order of operations.
    """
    with torch.device("cpu"):
        exponents = torch.arange(0, shape.head_dim, 2)[: shape.head_dim // 2].float() / shape.head_dim
        frequencies = 1.0 / (shape.rope_theta**exponents)
        scaling = shape.rope_scaling
        if scaling is None:
            return frequencies
        wavelengths = 2 * math.pi / frequencies
        shortest_scaled = scaling.original_context / scaling.high_freq_factor
        longest_blended = scaling.original_context / scaling.low_freq_factor
        smooth = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
        scaled = torch.where(wavelengths > longest_blended, frequencies / scaling.factor, blended)
        return torch.where(wavelengths < shortest_scaled, frequencies, scaled)


def check_frequencies(frequencies: Tensor, shape: Shape) -> None:
    """Raise ``WeightsError`` where a model's frequencies aren't this shape's, bit for bit.

    No checkpoint has them: a model that was built on the meta device and initialized wrongly would train with
    garbage in them, without any error.
    """
    expected = inverse_frequencies(shape)
    on_cpu = frequencies.detach().cpu()
    if on_cpu.dtype != torch.float32 or on_cpu.shape != expected.shape or not torch.equal(on_cpu, expected):
        raise WeightsError(
            f"the rotary embedding's frequencies are not those of this model: found {_head(on_cpu)}, "
            f"expected {_head(expected)} (theta {shape.rope_theta:g}, scaling {shape.rope_scaling}). "
            "They were overwritten while the model was built; nothing was trained."
        )


def _head(frequencies: Tensor) -> str:
    first = ", ".join(f"{value:.6g}" for value in frequencies.flatten()[:3].tolist())
    return f"{frequencies.dtype} [{first}, ...]"


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each ``(T, 1, E / 2)``, of positions ``(T,)``; angles in fp32, results in ``dtype``."""
    angles = torch.outer(positions.float(), frequencies).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads ``(T, H, E)`` rotated as ``kernels.plain.rotate`` does."""
    if heads.device.type == "cpu" and heads.dtype == torch.float32:
        rotated: Tensor = _Rotated.apply(heads, cos, sin)  # type: ignore[no-untyped-call]
        return rotated
    return plain.rotate(heads, cos, sin)


class _Rotated(torch.autograd.Function):
    """``rotate`` in four passes without temporaries; its backward rotates by the opposite angles, in four more."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rotated: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(d_rotated, cos, sin, -1), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    rotated = heads.new_empty(heads.shape)
    (first, second), (out_first, out_second) = heads.chunk(2, dim=-1), rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return rotated


def rotate_in_place(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Query ``(T, H * E)`` and key ``(T, G * E)`` rotated as ``kernels.plain.rotate`` does, in their own memory.

    So do their gradients: nobody else may need these, nor may query and key have the same.
    """
    rotated: tuple[Tensor, Tensor] = _RotatedInPlace.apply(query, key, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _RotatedInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        operators.rotate_(query, key, cos, sin, False)
        ctx.mark_dirty(query, key)
        ctx.save_for_backward(cos, sin)
        return query, key

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor | None, ...]:
        d_query, d_key = d_query.contiguous(), d_key.contiguous()
        operators.rotate_(d_query, d_key, *ctx.saved_tensors, True)
        return d_query, d_key, None, None
