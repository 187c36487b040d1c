"""A frozen linear gives its input's gradient, and keeps for it nothing but what it stores anyway."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dist_lora.base.linear import FrozenLinear
from dist_lora.base.quant.formats import Format, Int8, Nf4, Plain
from dist_lora.lora.layer import LoraAdapter

FORMATS = [Plain(torch.float32), Nf4(), Int8()]


def filled(fmt: Format, *, seed: int = 0) -> tuple[FrozenLinear, torch.Tensor]:
    """A linear of (96, 64) and the weight in floats that it stands for."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(seed))
    linear = FrozenLinear(64, 96, fmt)
    parts = fmt.quantize_rows(weight)
    for name, values in parts.items():
        getattr(linear, name).data.copy_(values)
    return linear, fmt.dequantize(parts, torch.float32)


def with_adapter(linear: FrozenLinear) -> LoraAdapter:
    adapter = LoraAdapter(64, 96, rank=4, alpha=8, dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    adapter.lora_A.data.normal_(generator=generator)
    adapter.lora_B.data.normal_(generator=generator)
    linear.adapter = adapter
    return adapter


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the order of adding: a sum may begin with the frozen part or end with it, as a kernel has it."""
    # Up to 200 products are added up, through sums as large as the largest result. Of the roundings, now up and now
    # down, as many are left as a walk of 200 steps goes far.
    atol = math.sqrt(200) * 2**-24 * float(wanted.detach().abs().max())
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_values_and_gradients_are_those_of_the_dequantized_weight(fmt, is_recomputed) -> None:
    linear, weight = filled(fmt)
    adapter = with_adapter(linear)
    x = torch.randn(7, 64, requires_grad=True)
    y = checkpoint(linear, x, use_reentrant=False) if is_recomputed else linear(x)
    x2, a, b = (t.detach().clone().requires_grad_() for t in (x, adapter.lora_A, adapter.lora_B))
    y2 = F.linear(x2, weight) + 2.0 * (x2 @ a.t()) @ b.t()
    assert_near(y, y2)
    out = torch.randn(7, 96)
    (y * out).sum().backward()
    (y2 * out).sum().backward()
    for found, wanted in ((x, x2), (adapter.lora_A, a), (adapter.lora_B, b)):
        assert_near(found.grad, wanted.grad)


@pytest.mark.parametrize("fmt", [Nf4(), Int8()], ids=lambda f: f.name)
def test_the_gradient_is_the_slope(fmt) -> None:
    linear, weight = filled(fmt)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 64, generator=generator).requires_grad_()
    linear(x).square().sum().backward()
    direction = torch.randn(3, 64, generator=generator)
    step = 1e-3
    ends = [float((F.linear(x.detach().double() + s * direction, weight.double()) ** 2).sum()) for s in (-step, step)]
    assert float((x.grad * direction).sum()) == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_nothing_is_kept_for_the_backward_but_the_parts(fmt) -> None:
    linear, _ = filled(fmt)
    kept: list[int] = []
    x = torch.randn(7, 64, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        linear(x)
    assert set(kept) <= {p.data_ptr() for p in linear.parameters()}
    assert x.data_ptr() not in kept


@pytest.mark.parametrize("fmt", [Nf4(), Int8()], ids=lambda f: f.name)
def test_without_a_gradient_to_the_input_the_backward_makes_no_weight(fmt, monkeypatch) -> None:
    linear, _ = filled(fmt)
    with_adapter(linear)
    y = linear(torch.randn(7, 64))  # an input that nobody trains, as in the first layer
    made = []
    dequantize = type(fmt).dequantize
    monkeypatch.setattr(type(fmt), "dequantize", lambda *a: made.append(1) or dequantize(*a))
    y.sum().backward()
    assert not made
