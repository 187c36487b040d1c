"""Runs every kernel in Triton's interpreter, and prints as JSON how far each is from float64 and what it loads and stores.

A program of its own, because Triton reads TRITON_INTERPRET where a kernel is decorated, its own ones when it is imported.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from dist_lora.base.kernels import compiled, operators, plain
from dist_lora.base.llama import Llama
from tests.unit.base.kernels.cases import CASES, Case
from tests.unit.base.test_linear import ALL, SMALL, TOKENS, layer

EPS = 1e-5
accessed = {"loaded": 0, "stored": 0}


def count_accesses() -> None:
    """Have the interpreter count the bytes of all elements that are loaded and stored, and not masked out."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        accessed["loaded"] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        accessed["stored"] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store


def random(*shape: int, seed: int) -> Tensor:
    """Standard normal, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_norm(case: Case) -> tuple[list[Tensor], Callable[..., Sequence[Tensor]], Callable[..., Sequence[Tensor]]]:
    """Inputs in float64, the kernel and its twin."""
    rows, width = case.sizes
    inputs = [random(rows, width, seed=0), random(rows, width, seed=1), 0.5 + random(width, seed=2).abs()]

    def kernel(x: Tensor, delta: Tensor, weight: Tensor) -> Sequence[Tensor]:
        total, h, inverse_rms = compiled.norm(x, delta if case.flag else None, weight, EPS)
        return (h, inverse_rms) if total is None else (total, h, inverse_rms)

    def twin(x: Tensor, delta: Tensor, weight: Tensor) -> Sequence[Tensor]:
        total = x + delta if case.flag else x
        return (total, *plain.norm(total, weight, EPS)) if case.flag else plain.norm(total, weight, EPS)

    return inputs, kernel, twin


def of_norm_backward(case: Case) -> tuple[list[Tensor], Callable[..., Sequence[Tensor]], Callable[..., Sequence[Tensor]]]:  # fmt: skip
    """Inputs in float64, the kernel and its twin."""
    rows, width = case.sizes
    inputs = [random(rows, width, seed=seed) for seed in range(3)] + [0.5 + random(width, seed=3).abs()]

    def kernel(d_h: Tensor, x: Tensor, d_stream: Tensor, weight: Tensor) -> Sequence[Tensor]:
        h = torch.empty_like(x) if case.flag else None
        inverse_rms = plain.norm(x, weight, EPS)[1]
        compiled.norm_backward_(d_h, x, weight, inverse_rms, d_stream if case.flag else None, h)
        return [d_h] if h is None else [d_h, h]

    def twin(d_h: Tensor, x: Tensor, d_stream: Tensor, weight: Tensor) -> Sequence[Tensor]:
        h, inverse_rms = plain.norm(x, weight, EPS)
        d_x = plain.norm_backward(d_h, x, weight, inverse_rms)
        return [d_x + d_stream, h] if case.flag else [d_x]

    return inputs, kernel, twin


def of_silu_times(case: Case) -> tuple[list[Tensor], Callable[..., Sequence[Tensor]], Callable[..., Sequence[Tensor]]]:
    """Inputs in float64, the kernel and its twin."""
    inputs = [3 * random(*case.sizes, seed=0), random(*case.sizes, seed=1)]
    return inputs, lambda *given: [compiled.silu_times(*given)], lambda *given: [plain.silu_times(*given)]


def of_silu_times_backward(case: Case) -> tuple[list[Tensor], Callable[..., Sequence[Tensor]], Callable[..., Sequence[Tensor]]]:  # fmt: skip
    """Inputs in float64, the kernel and its twin."""

    def kernel(d_h: Tensor, gate: Tensor, up: Tensor) -> Sequence[Tensor]:
        compiled.silu_times_backward_(d_h, gate, up, case.flag)
        return [gate, up, d_h] if case.flag else [gate, up]

    def twin(d_h: Tensor, gate: Tensor, up: Tensor) -> Sequence[Tensor]:
        h = plain.silu_times(gate, up)
        gradients = plain.silu_times_backward(d_h, gate, up)
        return [*gradients, h] if case.flag else gradients

    inputs = [random(*case.sizes, seed=0), 3 * random(*case.sizes, seed=1), random(*case.sizes, seed=2)]
    return inputs, kernel, twin


def of_rotate(case: Case) -> tuple[list[Tensor], Callable[..., Sequence[Tensor]], Callable[..., Sequence[Tensor]]]:
    """Inputs in float64, the kernel and its twin."""
    tokens, num_heads, num_key_heads, width = case.sizes
    angles = 100 * random(tokens, 1, width // 2, seed=2)
    inputs = [
        random(tokens, num_heads * width, seed=0), random(tokens, num_key_heads * width, seed=1), angles.cos(), angles.sin(),
    ]  # fmt: skip

    def kernel(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        compiled.rotate_(query, key, cos, sin, case.flag)
        return [query, key]

    def twin(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        sin = -sin if case.flag else sin
        heads = [plain.rotate(each.view(tokens, -1, width), cos, sin) for each in (query, key)]
        return [each.view(tokens, -1) for each in heads]

    return inputs, kernel, twin


def of_cross_entropy(case: Case) -> tuple[list[Tensor], Callable[..., Sequence[Tensor]], Callable[..., Sequence[Tensor]]]:  # fmt: skip
    """Inputs in float64, the kernel and its twin; the first rows are certain of their label, up to 1e-6 of their loss."""
    rows, vocab = case.sizes
    logits = 4 * random(rows, vocab, seed=0)
    labels = torch.randint(0, vocab, (rows, 1), generator=torch.Generator().manual_seed(1))
    labels[:3, 0] = torch.tensor([0, vocab - 1, vocab // 2])
    logits[0, 0], logits[1, vocab - 1] = 32.0, 24.0
    logits[2] -= 500.0

    def kernel(logits: Tensor) -> Sequence[Tensor]:
        losses = compiled.cross_entropy_(logits, labels, case.flag)
        return [losses, logits, logits.gather(-1, labels)] if case.flag else [losses]

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


def measure(case: Case) -> dict[str, Any]:
    """The distances of a case's results from float64, the kernel's and its twin's; and bytes loaded and stored."""
    inputs, kernel, twin = MAKERS[case.operator](case)
    dtype = getattr(torch, case.dtype)
    given = [each.to(dtype) for each in inputs]
    exact = twin(*(each.double() for each in given))  # of the same inputs, as they are rounded
    usual = twin(*(each.clone() for each in given))
    accessed.update(loaded=0, stored=0)
    found = kernel(*(each.clone() for each in given))
    return {
        "kernel": [distance(each, wanted) for each, wanted in zip(found, exact, strict=True)],
        "twin": [distance(each, wanted) for each, wanted in zip(usual, exact, strict=True)],
        **accessed,
    }


def losses_not_finite() -> list[list[bool]]:
    """Whether the loss of a row of zeros, and that of one with a NaN or an infinity in it, are finite."""
    losses = []
    for value in (float("nan"), float("inf"), float("-inf")):
        logits = torch.zeros(2, 5000)
        logits[1, 4800] = value
        losses.append(compiled.cross_entropy_(logits, torch.tensor([[0], [4800]]), True))
    return [each[:, 0].isfinite().tolist() for each in losses]


def distances_of_layer(*, recompute: bool) -> list[float]:
    """A layer's output and gradients, computed by the kernels, from those of plain torch."""
    block, forward = layer(ALL)
    block.recompute = recompute
    x = torch.randn(TOKENS, SMALL.hidden, generator=torch.Generator().manual_seed(1), requires_grad=True)
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]

    def results() -> list[Tensor]:
        y = forward(x)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    plainly = results()
    Llama.fuse_elementwise(block)
    with calls_of_kernels() as called:
        fused = results()
    assert {"add_norm", "norm_backward_", "silu_times", "silu_times_backward_", "rotate_"} <= called
    return [distance(found, wanted.double()) for found, wanted in zip(fused, plainly, strict=True)]


@contextmanager
def calls_of_kernels() -> Iterator[set[str]]:
    """Have the operators call the kernels, on the CPU; yields the names of those that were called."""
    called: set[str] = set()

    def noted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (called.add(name), kernel(*args))[1]

    kernels = {name: getattr(compiled, name, None) for name in MAKERS}
    kernels["norm"] = lambda x, weight, eps: compiled.norm(x, None, weight, eps)[1:]
    with ExitStack() as stack:
        for name, kernel in {**kernels, "add_norm": compiled.norm}.items():
            stack.enter_context(patch.object(operators, name, noted(name, kernel)))
        yield called


if __name__ == "__main__":
    count_accesses()
    print(
        json.dumps(
            {case.name: measure(case) for case in CASES}
            | {"not finite": losses_not_finite()}
            | {f"layer, recompute={flag}": distances_of_layer(recompute=flag) for flag in (False, True)}
        )
    )
