"""Our Triton kernels on a GPU: beside float64 and plain torch, and a run's losses with and without them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_lora.base.kernels import operators, support
from dist_lora.base.linear import FrozenLinear
from dist_lora.base.llama import Block
from dist_lora.base.quant.formats import Plain
from dist_lora.base.rope import inverse_frequencies, rotation
from dist_lora.lora.layer import LoraAdapter
from dist_lora.train import build
from dist_lora.world.world import World
from tests.ranks.test_frozen_base import losses_and_norms_of, step_of
from tests.ranks.tiny import config_of, trainee_of
from tests.unit.base.kernels.cases import CASES, MAKERS, Case, distance
from tests.unit.base.test_linear import SMALL

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
# Of 128,256 logits and of widths that models have, as many rows as there are in a micro-batch.
LARGE = (
    Case("norm", (4099, 4096), "bfloat16"),
    Case("norm", (515, 16384), "bfloat16", flag=False),
    Case("norm_backward_", (4099, 4096), "bfloat16"),
    Case("norm_backward_", (515, 16384), "bfloat16"),
    Case("silu_times", (1027, 14336), "bfloat16"),
    Case("silu_times_backward_", (1027, 14336), "bfloat16"),
    Case("rotate_", (4099, 32, 8, 128), "bfloat16"),
    Case("cross_entropy_", (257, 128256), "bfloat16"),
)


def test_this_gpu_runs_the_kernels() -> None:
    """All that follows would otherwise compare plain torch with itself."""
    assert support.why_not(DEVICE, torch.bfloat16) is None and support.why_not(DEVICE, torch.float32) is None


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
def test_a_kernel_is_as_near_to_float64_as_its_plain_twin(case: Case) -> None:
    inputs, kernel, twin = MAKERS[case.operator](case)
    given = [each.to(getattr(torch, case.dtype)) for each in inputs]
    exact = twin(*(each.double() for each in given))  # on the CPU, of the same inputs, as they are rounded
    usual = twin(*(each.clone() for each in given))
    found = kernel(*(each.to(DEVICE) for each in given))
    for of_kernel, of_twin, wanted in zip(found, usual, exact, strict=True):
        # In 32 bits the GPU's exp and log, by its special function units, are off by up to 2 and 4 units in the last place.
        slack = 2**-20 if case.dtype == "float32" or of_kernel.dtype == torch.float32 else 0.0
        assert distance(of_kernel.cpu(), wanted) <= 1.25 * distance(of_twin, wanted) + slack


def test_rows_beyond_two_billion_numbers_are_found() -> None:
    """Offsets are computed in 64 bits: the last row of more than 2**31 numbers is that of a small tensor."""
    rows, width = 2**31 // 16384 + 3, 16384
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.randn(width, device=DEVICE)
    weight = torch.rand(width, device=DEVICE).bfloat16()
    h, inverse_rms = operators.norm(x, weight, 1e-5)
    wanted, wanted_rms = operators.norm(x[-1:].clone(), weight, 1e-5)
    assert torch.equal(h[-1:], wanted) and torch.equal(inverse_rms[-1:], wanted_rms)
    last = operators.silu_times(x, x)[-1]
    assert torch.equal(last, operators.silu_times(x[-1].clone()[None], x[-1].clone()[None])[0])


def test_no_row_and_no_token_start_no_kernel() -> None:
    x, weight = torch.empty(0, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    h, _ = operators.norm(x, weight, 1e-5)
    assert h.shape == (0, 64) and operators.silu_times(x, x).shape == (0, 64)
    operators.rotate_(x, x.clone(), *(torch.empty(0, 1, 32, device=DEVICE) for _ in range(2)), False)
    assert len(operators.cross_entropy_(x, torch.empty(0, 1, dtype=torch.int64, device=DEVICE), True)) == 0
    torch.cuda.synchronize()


def losses_and_norms(world: World, folder: Any, *, kernels: str, dtype: str, recompute: bool) -> tuple[list[float], list[float]]:  # fmt: skip
    """Of three steps, and whether the kernels ran is as set."""
    config = config_of(
        folder, model={"dtype": dtype}, train={"fused_kernels": kernels, "activation_checkpointing": recompute}
    )
    trainee = trainee_of(config, world)
    assert all(block.mlp.is_fused == (kernels == "auto") for block in trainee.model.blocks())
    found = losses_and_norms_of(trainee, world)
    trainee.check_base()
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_has_the_losses_of_one_without_the_kernels(world: World, tiny_llama: Any, recompute: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = tiny_llama("llama31")
    found, wanted = (
        losses_and_norms(world, folder, kernels=kernels, dtype="fp32", recompute=recompute)
        for kernels in ("auto", "none")
    )
    assert len(found[0]) == len(wanted[0]) > 0
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1] == pytest.approx(wanted[1], rel=1e-4)


def test_in_16_bits_a_run_has_the_losses_of_one_without_the_kernels_to_their_rounding(
    world: World, tiny_llama: Any
) -> None:
    folder = tiny_llama("llama31")
    found, wanted = (
        losses_and_norms(world, folder, kernels=kernels, dtype="bf16", recompute=False) for kernels in ("auto", "none")
    )
    assert found[0] == pytest.approx(wanted[0], rel=5e-3)


def layer_results(*, is_fused: bool) -> tuple[list[Tensor], set[str]]:
    """A layer's output and gradients in bf16, and the names of the kernels that ran."""
    from dist_lora.base.attention import Documents

    tokens = 200
    block = Block(SMALL, 0, fmt=Plain(torch.bfloat16), dtype=torch.bfloat16)
    for module in block.modules():
        if isinstance(module, FrozenLinear):
            module.adapter = LoraAdapter(module.in_features, module.out_features, rank=4, alpha=8, dropout=0.0)
        if hasattr(module, "is_fused"):
            module.is_fused = is_fused
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    block.cuda()
    x = torch.randn(tokens, SMALL.hidden, generator=generator).bfloat16().cuda().requires_grad_()
    rotary = rotation(torch.arange(tokens, device=DEVICE), inverse_frequencies(SMALL).cuda(), torch.bfloat16)
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        y = block(x, rotary, Documents((0, 80, tokens), "varlen"))
        gradients = torch.autograd.grad(y.float().square().sum(), leaves)
        torch.cuda.synchronize()
    return [y, *gradients], {event.key for event in profile.key_averages()}


def test_a_layer_runs_in_the_kernels_and_is_as_near_as_without_them() -> None:
    fused, names = layer_results(is_fused=True)
    plain, names_of_plain = layer_results(is_fused=False)
    ours = {"_norm", "_norm_backward", "_silu_times", "_silu_times_backward", "_rotate"}
    assert ours <= names and not ours & names_of_plain
    for found, usual in zip(fused, plain, strict=True):
        assert distance(found, usual.double()) < 2e-2  # both round to 8 bits, many times


def test_a_gpu_that_cannot_run_them_says_so_once_and_runs_without(
    world: World, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "why_not", lambda device, dtype: "Triton isn't installed")
    with caplog.at_level(logging.WARNING):
        trainee = trainee_of(config_of(tiny_llama("llama31"), model={"dtype": "bf16"}), world)
    said = [record.message for record in caplog.records if "kernels" in record.message]
    assert said == ["kernels   plain instead of fused: Triton isn't installed. The run is the same, and slower"]
    assert not any(getattr(module, "is_fused", False) for module in trainee.model.modules())
    assert step_of(trainee, world, micro_batches=1)() > 0
