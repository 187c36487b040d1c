"""Linears that share an input, their adapters, and what stands before them, beside the plain formulas under autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lora.base.attention import Documents
from dist_lora.base.before import Before, Norm, Nothing, RMSNorm, SiluTimes
from dist_lora.base.linear import FrozenLinear, linears_of
from dist_lora.base.llama import Block, Llama
from dist_lora.base.quant.formats import Format, Int8, Nf4, Plain
from dist_lora.base.rope import inverse_frequencies, rotation
from dist_lora.herd.members import MEMBERS
from dist_lora.lora.layer import LoraAdapter

# T tokens, D width of the shared input
T, D = 7, 64
WIDTHS = (48, 16, 16)
RANKS = (4, 0, 3)  # 0: no adapter


def linears(
    dtype: torch.dtype, *, fmt: Format | None = None, ranks: tuple[int, ...] = RANKS, dropout: float = 0.0
) -> list[FrozenLinear]:
    """Linears of ``WIDTHS`` outputs, of ranks and scales of their own, A and B away from zero and in fp32."""
    generator, made = torch.Generator().manual_seed(0), []
    for place, (out, rank) in enumerate(zip(WIDTHS, ranks, strict=True)):
        linear = FrozenLinear(D, out, fmt or Plain(dtype))
        for name, values in linear.fmt.quantize_rows(torch.randn(out, D, generator=generator) / 8).items():
            getattr(linear, name).data.copy_(values)
        if rank:
            adapter = LoraAdapter(D, out, rank=rank, alpha=rank * (1.5 + place), dropout=dropout)
            for trained in (adapter.lora_A, adapter.lora_B):
                trained.data.normal_(0, 0.2, generator=generator)
            linear.adapter = adapter
        made.append(linear)
    return made


def inputs_of(before: Before, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random inputs; those of a norm are a stream and a frozen weight."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(T, D, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    if isinstance(before, Norm):
        return first, torch.linspace(0.5, 2, D).to(dtype)
    return (first, second) if isinstance(before, SiluTimes) else (first,)


def plain_before(before: Before, inputs: tuple[Tensor, ...]) -> Tensor:
    """The input of the linears, by autograd's own functions."""
    if isinstance(before, Norm):
        x, weight = inputs
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + before.eps).rsqrt()).to(x.dtype) * weight
    return F.silu(inputs[0]) * inputs[1] if isinstance(before, SiluTimes) else inputs[0]


def plain_linear(linear: FrozenLinear, h: Tensor) -> Tensor:
    """What the linear and its adapter give, by autograd's own functions."""
    y = h @ linear.fmt.dequantize(linear.parts(), h.dtype).t()
    adapter: Any = linear.adapter
    if adapter is None:
        return y
    return y + adapter.scale * (h @ adapter.lora_A.to(h.dtype).t()) @ adapter.lora_B.to(h.dtype).t()


def results(form: str, before: Before, group: list[FrozenLinear], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and gradients of all that has one, of our form or the plain one."""
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    leaves += [p for linear in group for p in linear.parameters() if p.requires_grad]
    if form == "ours":
        outputs = linears_of(before, inputs, group)[: len(group)]
    else:
        h = plain_before(before, inputs)
        outputs = tuple(plain_linear(linear, h) for linear in group)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    total = sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(total, leaves)]


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative L2."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


BEFORE = [Nothing(), Norm(1e-5), SiluTimes()]
by_name = {"ids": lambda value: type(value).__name__}


@pytest.mark.parametrize("before", BEFORE, **by_name)
@pytest.mark.parametrize("fmt", [Plain(torch.float32), Nf4(), Int8()], ids=lambda fmt: fmt.name)
def test_outputs_and_gradients_are_those_of_the_plain_form(before, fmt) -> None:
    group, inputs = linears(torch.float32, fmt=fmt), inputs_of(before, torch.float32)
    for found, wanted in zip(
        results("ours", before, group, inputs), results("plain", before, group, inputs), strict=True
    ):
        assert distance(found, wanted) < 1e-6


@pytest.mark.parametrize("ranks", [RANKS, (0, 0, 0)], ids=str)
@pytest.mark.parametrize("before", BEFORE, **by_name)
def test_the_gradient_is_the_slope_in_float64_adapters_included(before, ranks) -> None:
    group = [linear.double() for linear in linears(torch.float64, ranks=ranks)]
    inputs = inputs_of(before, torch.float64)
    trained = [p for linear in group for p in linear.parameters() if p.requires_grad]
    # gradcheck changes the values of its inputs in place, and so those of A and B.
    assert torch.autograd.gradcheck(lambda *_: linears_of(before, inputs, group), (*inputs, *trained), fast_mode=True)


def test_a_norm_that_no_linear_follows_has_the_slope_of_its_formula() -> None:
    norm = RMSNorm(D, 1e-5, torch.float64)
    norm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    (x, *_) = inputs_of(Norm(1e-5), torch.float64)
    assert torch.autograd.gradcheck(norm, (x,))
    torch.testing.assert_close(norm(x), plain_before(Norm(1e-5), (x, norm.weight)))


@pytest.mark.parametrize("before", BEFORE, **by_name)
def test_in_16_bits_nothing_is_farther_from_float64_than_the_plain_form(before) -> None:
    group, inputs = linears(torch.bfloat16), inputs_of(before, torch.bfloat16)
    exact_group = [linear.double() for linear in linears(torch.bfloat16)]
    exact_inputs = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
    ours, plain = (results(form, before, group, inputs) for form in ("ours", "plain"))
    exact = results("plain", before, exact_group, exact_inputs)
    for found, usual, wanted in zip(ours, plain, exact, strict=True):
        # Sums of a few numbers, rounded in another order: by chance one is a little nearer, or the other.
        assert distance(found, wanted) < 1.25 * distance(usual, wanted)
        assert found.dtype == usual.dtype


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("before", BEFORE, **by_name)
def test_with_dropout_each_adapter_draws_a_mask_that_its_backward_uses_again(before, needs_gradient) -> None:
    group, inputs = linears(torch.float64, dropout=0.4), inputs_of(before, torch.float64)
    if not needs_gradient:
        inputs = tuple(tensor.detach() for tensor in inputs)
    torch.manual_seed(3)
    ours = results("ours", before, group, inputs)
    torch.manual_seed(3)
    h = plain_before(before, inputs)
    outputs = []
    for linear in group:
        adapter: Any = linear.adapter
        y = h @ linear.get_parameter("weight").t()
        if adapter is not None:
            # In the order of the linears, by the generator of the device: a resumed run draws the same.
            dropped = torch.native_dropout(h, 0.4, True)[0]
            y = y + adapter.scale * (dropped @ adapter.lora_A.double().t()) @ adapter.lora_B.double().t()
        outputs.append(y)
    generator = torch.Generator().manual_seed(2)
    total = sum((y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() for y in outputs)
    leaves = [t for t in (*inputs, *(p for linear in group for p in linear.parameters())) if t.requires_grad]
    for found, wanted in zip(ours, [*outputs, *torch.autograd.grad(total, leaves)], strict=True):
        assert distance(found, wanted) < 1e-6  # gradients of A and B are in fp32


def test_out_of_training_nothing_is_dropped_and_no_graph_is_made_without_gradients() -> None:
    group, inputs = linears(torch.float32, dropout=0.4), inputs_of(Norm(1e-5), torch.float32)
    for linear in group:
        linear.eval()
    with torch.no_grad():
        found = linears_of(Norm(1e-5), inputs, group)[: len(group)]
    wanted = [plain_linear(linear, plain_before(Norm(1e-5), inputs)) for linear in group]
    assert not any(y.requires_grad for y in found)
    assert max(distance(y, plain) for y, plain in zip(found, wanted, strict=True)) < 1e-6


# Weights that are trained


def unfrozen(dtype: torch.dtype) -> list[FrozenLinear]:
    """``linears`` whose second one is trained instead of frozen, in fp32."""
    group = linears(dtype)
    weight = group[1].get_parameter("weight").detach().float()
    group[1].unfreeze().weight.data.copy_(weight + 1e-4)  # which bf16 can't hold
    return group


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("before", BEFORE, **by_name)
def test_a_trained_weight_has_the_gradient_of_the_plain_form(before, needs_gradient) -> None:
    group, inputs = unfrozen(torch.float32), inputs_of(before, torch.float32)
    if not needs_gradient:
        inputs = tuple(tensor.detach() for tensor in inputs)
    weight = group[1].get_parameter("trained.weight")
    y = linears_of(before, inputs, group)[1]
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((y * factors).sum(), [weight])
    h = plain_before(before, inputs)
    (wanted,) = torch.autograd.grad(((h @ weight.t()) * factors).sum(), [weight])
    assert distance(found, wanted) < 1e-6


@pytest.mark.parametrize("adds", [False, True])
def test_a_trained_norm_has_the_gradient_of_the_plain_form(adds) -> None:
    for is_fused in (False, True):
        norm = RMSNorm(D, 1e-5, torch.float32)
        norm.is_fused = is_fused
        weight = norm.unfreeze().weight
        weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
        x, delta = inputs_of(SiluTimes(), torch.float32)
        group = unfrozen(torch.float32)
        leaves = [x, weight, *(p for linear in group for p in linear.parameters() if p.requires_grad)]
        outputs = linears_of(norm.before(adds=adds), (x, delta) if adds else (x,), group, norm=norm)
        found = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)
        stream = x + delta if adds else x
        h = F.rms_norm(stream, (D,), weight, 1e-5)
        plain = [stream, *(plain_linear(linear, h) for linear in group)]
        plain[2] = h @ group[1].get_parameter("trained.weight").t()
        for ours, wanted in zip(found, torch.autograd.grad(sum(y.square().sum() for y in plain), leaves), strict=True):
            assert distance(ours, wanted) < 1e-5


def test_a_trained_norm_that_no_linear_follows_has_the_gradient_of_the_plain_form() -> None:
    norm = RMSNorm(D, 1e-5, torch.float64)
    norm.unfreeze().weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    norm.double()
    (x, *_) = inputs_of(Norm(1e-5), torch.float64)
    assert torch.autograd.gradcheck(lambda *_: norm(x), (x, norm.get_parameter("trained.weight")))


def test_a_trained_weight_is_computed_in_the_bases_dtype() -> None:
    group, (x,) = unfrozen(torch.bfloat16), inputs_of(Nothing(), torch.bfloat16)
    weight = group[1].get_parameter("trained.weight")
    y = linears_of(Nothing(), (x,), group)[1]
    (gradient,) = torch.autograd.grad(y.float().sum(), [weight])
    assert torch.equal(y, x @ weight.detach().bfloat16().t())
    assert gradient.dtype == torch.float32 and torch.equal(gradient, gradient.bfloat16().float())


# A layer

SMALL = dataclasses.replace(
    MEMBERS["3.1-8b"].shape, hidden=256, ffn=512, num_heads=4, num_kv_heads=2, head_dim=64, num_layers=1
)
TOKENS = 20


class FrozenProducts(TorchDispatchMode):
    """Notes the weights (their storages) of the products with frozen ones; those with A or B are no such products."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        linears = {name: module for name, module in block.named_modules() if isinstance(module, FrozenLinear)}
        self._names = {
            linear.get_parameter("weight").data_ptr(): name.rpartition(".")[2] for name, linear in linears.items()
        }
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See ``TorchDispatchMode``."""
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            weight = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)][-1]
            if (name := self._names.get(weight.data_ptr())) is not None:
                self.names.append(name)
        return func(*args, **kwargs or {})


def layer(targets: tuple[str, ...], *, dtype: torch.dtype = torch.float32) -> tuple[Block, Callable[[Tensor], Tensor]]:
    """A layer with adapters of rank 4, and its forward."""
    block = Block(SMALL, 0, fmt=Plain(dtype), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, module in block.named_modules():
        if isinstance(module, FrozenLinear) and name.rpartition(".")[2] in targets:
            module.adapter = LoraAdapter(module.in_features, module.out_features, rank=4, alpha=8, dropout=0.0)
    for parameter in block.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    rotary = rotation(torch.arange(TOKENS), inverse_frequencies(SMALL), dtype)
    return block, lambda x: block(x, rotary, Documents((0, TOKENS)))


ALL = tuple(SMALL.linear_shapes())


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("down_proj",), ()], ids=str)
def test_a_recomputed_layer_computes_six_of_seven_frozen_products_again_and_has_the_same_gradients(targets) -> None:
    block, forward = layer(targets)
    x = torch.randn(TOKENS, SMALL.hidden, requires_grad=True)
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
    wanted = torch.autograd.grad(forward(x).square().sum(), leaves)
    block.recompute = True
    with FrozenProducts(block) as once:
        loss = forward(x).square().sum()
    with FrozenProducts(block) as again:
        found = torch.autograd.grad(loss, leaves)
    assert sorted(once.names) == sorted(ALL)
    # Each for the gradient of its input, and all but one computed again.
    assert sorted(again.names) == sorted([*ALL, *(set(ALL) - {"down_proj"})])
    for ours, plain in zip(found, wanted, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("down_proj",)], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_by_the_operators_has_the_numbers_of_the_plain_one(targets, recompute) -> None:
    block, forward = layer(targets)
    block.recompute = recompute
    for needs_gradient in (True, False):
        x = torch.randn(TOKENS, SMALL.hidden, requires_grad=needs_gradient)
        leaves = [t for t in (x, *block.parameters()) if t.requires_grad]
        results = []
        for is_fused in (False, True):
            for module in block.modules():
                if hasattr(module, "is_fused"):
                    module.is_fused = is_fused
            y = forward(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for plain, fused in zip(*results, strict=True):
            assert distance(fused, plain) < 1e-6


def test_what_an_operator_has_overwritten_is_refused_to_a_second_backward() -> None:
    block, forward = layer(ALL)
    Llama.fuse_elementwise(block)
    loss = forward(torch.randn(TOKENS, SMALL.hidden, requires_grad=True)).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
