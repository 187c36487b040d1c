"""Documents that lie in one stream do not see each other, whatever computes them."""

from __future__ import annotations

import pytest
import torch

from dist_lora.base.attention import Documents, choose_backend

HEADS, KV_HEADS, WIDTH = 4, 2, 16
BOUNDS = (0, 5, 6, 7, 8, 20)


def heads(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BOUNDS[-1], HEADS, WIDTH, generator=generator)
    key, value = (torch.randn(BOUNDS[-1], KV_HEADS, WIDTH, generator=generator) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_document_among_others_attends_as_it_does_alone(backend) -> None:
    query, key, value = heads(0)
    together = Documents(BOUNDS, backend)(0, query, key, value)
    for a, b in zip(BOUNDS, BOUNDS[1:], strict=False):
        alone = Documents((0, b - a), backend)(0, query[a:b], key[a:b], value[a:b])
        torch.testing.assert_close(together[a:b], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_change_in_one_document_leaves_every_other_bit_where_it_was(backend) -> None:
    query, key, value = heads(0)
    before = Documents(BOUNDS, backend)(0, query, key, value)
    for tensor in (query, key, value):
        tensor[:5] += 1
    after = Documents(BOUNDS, backend)(0, query, key, value)
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[:5], after[:5])


def test_both_backends_agree_on_values_and_gradients() -> None:
    results = []
    for backend in ("sdpa", "eager"):
        inputs = [tensor.requires_grad_() for tensor in heads(0)]
        attended = Documents(BOUNDS, backend)(0, *inputs)
        attended.square().sum().backward()
        results.append([attended.detach(), *(tensor.grad for tensor in inputs)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_auto_takes_flash_on_a_gpu_in_16_bits_and_sdpa_elsewhere() -> None:
    assert choose_backend("auto", torch.device("cuda"), torch.bfloat16) == "varlen"
    assert choose_backend("auto", torch.device("cuda"), torch.float32) == "sdpa"
    assert choose_backend("auto", torch.device("cpu"), torch.float32) == "sdpa"
    assert choose_backend("eager", torch.device("cuda"), torch.bfloat16) == "eager"
