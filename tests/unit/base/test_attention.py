"""Documents that lie in one stream do not see each other, whatever computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lora.base import tiled
from dist_lora.base.attention import Documents
from dist_lora.layout.choices import AttentionName

HEADS, KV_HEADS, WIDTH = 4, 2, 16
BOUNDS = (0, 5, 6, 7, 8, 20)


def heads(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BOUNDS[-1], HEADS, WIDTH, generator=generator)
    key, value = (torch.randn(BOUNDS[-1], KV_HEADS, WIDTH, generator=generator) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize("backend", ["sdpa", "sdpa-repeated", "tiled", "eager"])
def test_a_document_among_others_attends_as_it_does_alone(backend) -> None:
    query, key, value = heads(0)
    together = Documents(BOUNDS, backend)(0, query, key, value)
    for a, b in zip(BOUNDS, BOUNDS[1:], strict=False):
        alone = Documents((0, b - a), backend)(0, query[a:b], key[a:b], value[a:b])
        # A score adds up 16 products, whose magnitudes come to 25, in an order that the number of tokens may change:
        # it is off by up to 16 roundings of that, divided by 4, and the mean of values by as much of them.
        torch.testing.assert_close(together[a:b], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "sdpa-repeated", "tiled", "eager"])
def test_a_change_in_one_document_leaves_every_other_bit_where_it_was(backend) -> None:
    query, key, value = heads(0)
    before = Documents(BOUNDS, backend)(0, query, key, value)
    for tensor in (query, key, value):
        tensor[:5] += 1
    after = Documents(BOUNDS, backend)(0, query, key, value)
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[:5], after[:5])


def values_and_gradients(backend: AttentionName, dtype: torch.dtype) -> list[torch.Tensor]:
    """Attended values, and the gradients of query, key and value of the sum of their squares, in float64."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in heads(0)]
    attended = Documents(BOUNDS, backend)(0, *inputs)
    attended.square().sum().backward()
    return [tensor.double() for tensor in (attended.detach(), *(tensor.grad for tensor in inputs))]


def test_all_backends_agree_on_values_and_gradients(monkeypatch) -> None:
    monkeypatch.setattr(tiled, "_QUERIES", 8)  # the longest document has a whole tile and a half
    exact_values, *exact_gradients = values_and_gradients("sdpa", torch.float64)
    for backend in ("sdpa", "sdpa-repeated", "tiled", "eager"):
        values, *gradients = values_and_gradients(backend, torch.float32)
        torch.testing.assert_close(values, exact_values, atol=1e-5, rtol=0)
        for found, exact in zip(gradients, exact_gradients, strict=True):
            # A score's gradient is a difference of two sums of 16 products, whose magnitudes come to 60: up to 16
            # roundings of each are left, though they cancel, and go on to the gradients of query and key.
            torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)


class Elements(TorchDispatchMode):
    """Adds up the elements of all that operations give."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchDispatchMode``."""
        given = func(*args, **kwargs or {})
        self.total += sum(leaf.numel() for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))
        return given


def elements_of(lengths: list[int], backend: AttentionName) -> int:
    """Elements that the attention of some documents and its backward give."""
    bounds = tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())
    inputs = [torch.randn(bounds[-1], count, WIDTH, requires_grad=True) for count in (HEADS, KV_HEADS, KV_HEADS)]
    with Elements() as elements:
        Documents(bounds, backend)(0, *inputs).sum().backward()
    return elements.total


@pytest.mark.parametrize("backend", ["sdpa", "sdpa-repeated"])
def test_work_is_linear_in_the_tokens_however_many_documents_they_are(backend) -> None:
    # Parts are split off and joined again, each element once; a slice's backward would give all tokens for each document.
    assert elements_of([3, 5] * 32, backend) < 2 * elements_of([256], backend)


class Bounds(TorchDispatchMode):
    """Collects the tensors of as many numbers as ``BOUNDS`` has, that operations are given; an object that is known is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchDispatchMode``."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in given:
            if tensor.shape == (len(BOUNDS),) and not any(tensor is known for known in self.tensors):
                self.tensors.append(tensor)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("backend", ["varlen", "eager"])
@pytest.mark.parametrize("is_given", [True, False])
def test_bounds_are_one_tensor_on_the_device_for_all_layers_and_recomputations(backend, is_given) -> None:
    inputs = [tensor.to("meta", torch.bfloat16) for tensor in heads(0)]
    attend = Documents(BOUNDS, backend, torch.tensor(BOUNDS, dtype=torch.int32, device="meta") if is_given else None)
    with Bounds() as seen:
        for layer in (0, 1, 0):
            attend(layer, *inputs)
    (starts,) = seen.tensors
    assert starts is attend.starts and starts.dtype == torch.int32 and starts.device.type == "meta"
