"""Runs every kernel in Triton's interpreter, and prints as JSON how far each is from float64 and what it loads and stores.

A program of its own, because Triton reads TRITON_INTERPRET where a kernel is decorated, its own ones when it is imported.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from dist_lora.base.kernels import compiled, operators
from dist_lora.base.llama import Llama
from tests.unit.base.kernels.cases import CASES, MAKERS, Case, distance
from tests.unit.base.test_linear import ALL, SMALL, TOKENS, layer

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
