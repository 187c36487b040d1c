"""Calls of the kernels with their twins: rows that are no multiple of a block, and each width that models have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dist_lora.base.kernels import plain

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A call of an operator.

    Args:
        sizes: rows and width of a norm or of gate and up; tokens, query heads, key heads and head width of a rotation; rows and
            vocabulary of logits.
        flag: what the operator may do besides: add first (``norm``), add the stream's gradient and give h
            (``norm_backward_``), give h (``silu_times_backward_``), turn back (``rotate_``), leave the gradient
            (``cross_entropy_``).
    """

    operator: str
    sizes: tuple[int, ...]
    dtype: str
    flag: bool = True

    @property
    def name(self) -> str:
        """By which its results are found."""
        return f"{self.operator}-{'x'.join(map(str, self.sizes))}-{self.dtype}-{self.flag}"


DTYPES = ("float32", "bfloat16", "float16")
NORMS = (("norm", 11), ("norm_backward_", 9))
CASES = (
    *(Case(name, (rows, width), "float32", flag) for name, rows in NORMS for width in (576, 2048) for flag in (True, False)),
    *(Case(name, (3, width), "float32") for name, _ in NORMS for width in (4096, 16384)),
    *(Case(name, (8, 576), dtype) for name, _ in NORMS for dtype in DTYPES[1:]),
    *(Case("silu_times", (7, 1536), dtype) for dtype in DTYPES),
    *(Case("silu_times", (2, 2048), "float32") for _ in range(1)),
    *(Case("silu_times_backward_", (7, 1536), dtype, flag) for dtype in DTYPES for flag in (True, False)),
    *(Case("rotate_", (5, 9, 3, 64), dtype, flag) for dtype in DTYPES for flag in (True, False)),
    *(Case("rotate_", (3, 32, 8, 128), "float32", flag) for flag in (True, False)),
    Case("rotate_", (2, 3, 1, 96), "float32"),
    *(Case("cross_entropy_", (4, 5000), dtype, flag) for dtype in DTYPES for flag in (True, False)),
    Case("cross_entropy_", (3, 128256), "float32"),
)  # fmt: skip

# What a case calls: its inputs in float64, the kernel and its plain twin, which may both overwrite what they are given.

Function = Callable[..., Sequence[Tensor]]
Made = tuple[list[Tensor], Function, Function]


def _compiled() -> ModuleType:
    from dist_lora.base.kernels import compiled  # imports Triton: in this process interpreted, or not

    return compiled


def random(*shape: int, seed: int) -> Tensor:
    """Standard normal, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_norm(case: Case) -> Made:
    """Inputs in float64, the kernel and its twin."""
    rows, width = case.sizes
    inputs = [random(rows, width, seed=0), random(rows, width, seed=1), 0.5 + random(width, seed=2).abs()]

    def kernel(x: Tensor, delta: Tensor, weight: Tensor) -> Sequence[Tensor]:
        total, h, inverse_rms = _compiled().norm(x, delta if case.flag else None, weight, EPS)
        return (h, inverse_rms) if total is None else (total, h, inverse_rms)

    def twin(x: Tensor, delta: Tensor, weight: Tensor) -> Sequence[Tensor]:
        total = x + delta if case.flag else x
        return (total, *plain.norm(total, weight, EPS)) if case.flag else plain.norm(total, weight, EPS)

    return inputs, kernel, twin


def of_norm_backward(case: Case) -> Made:
    """Inputs in float64, the kernel and its twin."""
    rows, width = case.sizes
    inputs = [random(rows, width, seed=seed) for seed in range(3)] + [0.5 + random(width, seed=3).abs()]

    def kernel(d_h: Tensor, x: Tensor, d_stream: Tensor, weight: Tensor) -> Sequence[Tensor]:
        h = torch.empty_like(x) if case.flag else None
        inverse_rms = plain.norm(x, weight, EPS)[1]
        _compiled().norm_backward_(d_h, x, weight, inverse_rms, d_stream if case.flag else None, h)
        return [d_h] if h is None else [d_h, h]

    def twin(d_h: Tensor, x: Tensor, d_stream: Tensor, weight: Tensor) -> Sequence[Tensor]:
        h, inverse_rms = plain.norm(x, weight, EPS)
        d_x = plain.norm_backward(d_h, x, weight, inverse_rms)
        return [d_x + d_stream, h] if case.flag else [d_x]

    return inputs, kernel, twin


def of_silu_times(case: Case) -> Made:
    """Inputs in float64, the kernel and its twin."""
    inputs = [3 * random(*case.sizes, seed=0), random(*case.sizes, seed=1)]
    return inputs, lambda *given: [_compiled().silu_times(*given)], lambda *given: [plain.silu_times(*given)]


def of_silu_times_backward(case: Case) -> Made:
    """Inputs in float64, the kernel and its twin."""

    def kernel(d_h: Tensor, gate: Tensor, up: Tensor) -> Sequence[Tensor]:
        _compiled().silu_times_backward_(d_h, gate, up, case.flag)
        return [gate, up, d_h] if case.flag else [gate, up]

    def twin(d_h: Tensor, gate: Tensor, up: Tensor) -> Sequence[Tensor]:
        h = plain.silu_times(gate, up)
        gradients = plain.silu_times_backward(d_h, gate, up)
        return [*gradients, h] if case.flag else gradients

    inputs = [random(*case.sizes, seed=0), 3 * random(*case.sizes, seed=1), random(*case.sizes, seed=2)]
    return inputs, kernel, twin


def of_rotate(case: Case) -> Made:
    """Inputs in float64, the kernel and its twin."""
    tokens, num_heads, num_key_heads, width = case.sizes
    angles = 100 * random(tokens, 1, width // 2, seed=2)
    inputs = [
        random(tokens, num_heads * width, seed=0), random(tokens, num_key_heads * width, seed=1), angles.cos(), angles.sin(),
    ]  # fmt: skip

    def kernel(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        _compiled().rotate_(query, key, cos, sin, case.flag)
        return [query, key]

    def twin(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        sin = -sin if case.flag else sin
        heads = [plain.rotate(each.view(tokens, -1, width), cos, sin) for each in (query, key)]
        return [each.view(tokens, -1) for each in heads]

    return inputs, kernel, twin


def of_cross_entropy(case: Case) -> Made:
    """Inputs in float64, the kernel and its twin; the first rows are certain of their label, up to 1e-6 of their loss."""
    rows, vocab = case.sizes
    logits = 4 * random(rows, vocab, seed=0)
    labels = torch.randint(0, vocab, (rows, 1), generator=torch.Generator().manual_seed(1))
    labels[:3, 0] = torch.tensor([0, vocab - 1, vocab // 2])
    logits[0, 0], logits[1, vocab - 1] = 32.0, 24.0
    logits[2] -= 500.0

    def kernel(logits: Tensor) -> Sequence[Tensor]:
        of_device = labels.to(logits.device)
        losses = _compiled().cross_entropy_(logits, of_device, case.flag)
        return [losses, logits, logits.gather(-1, of_device)] if case.flag else [losses]

    def twin(logits: Tensor) -> Sequence[Tensor]:
        in_fp32 = None if plain.is_wide(logits) else torch.empty(logits.shape, dtype=torch.float32)
        if logits.dtype == torch.float64:
            losses = logits.logsumexp(-1, keepdim=True) - logits.gather(-1, labels)
            logits = logits.softmax(-1).scatter_(-1, labels, torch.expm1(-losses))
        else:
            losses = plain.cross_entropies(logits, labels, in_fp32=in_fp32, to_gradient=case.flag)
        return [losses, logits, logits.gather(-1, labels)] if case.flag else [losses]

    return [logits], kernel, twin


MAKERS = {
    "norm": of_norm, "norm_backward_": of_norm_backward, "silu_times": of_silu_times,
    "silu_times_backward_": of_silu_times_backward, "rotate_": of_rotate, "cross_entropy_": of_cross_entropy,
}  # fmt: skip


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative L2."""
    return float((found.double() - wanted).norm() / wanted.norm())
