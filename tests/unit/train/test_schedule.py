"""The learning rate by hand, AdamW as torch's own, and the norm of a long gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dist_lora.config.schema import OptimSection
from dist_lora.engines.adamw import AdamW, Span, norm_of
from dist_lora.engines.adapters import ReplicatedAdapters
from dist_lora.lora.attach import halves_of
from dist_lora.lora.layer import LoraAdapter
from dist_lora.train.schedule import lr_at
from dist_lora.world.world import World

# Of 8 steps, 3 of them warm-up, at 0.006: after them 5 steps fall from the full rate, the last one at 4/5 of the way.
RATES = {
    "constant": [0.002, 0.004, 0.006, 0.006, 0.006, 0.006, 0.006, 0.006],
    "linear": [0.002, 0.004, 0.006, 0.006, 0.0048, 0.0036, 0.0024, 0.0012],
    "cosine": [0.002, 0.004, 0.006, 0.006, 0.005427050983, 0.003927050983, 0.002072949017, 0.000572949017],
}


@pytest.mark.parametrize("schedule", RATES)
def test_the_learning_rate_of_every_step_is_that_by_hand(schedule) -> None:
    section = OptimSection(lr=0.006, schedule=schedule, warmup_steps=3)
    found = [lr_at(step, section=section, num_steps=8) for step in range(1, 9)]
    assert found == pytest.approx(RATES[schedule], rel=1e-9)


@pytest.mark.parametrize("schedule", RATES)
def test_without_a_warm_up_the_first_step_has_the_full_rate_and_the_last_still_learns(schedule) -> None:
    section = OptimSection(lr=0.006, schedule=schedule, warmup_steps=0)
    assert lr_at(1, section=section, num_steps=4) == 0.006
    assert lr_at(1, section=section, num_steps=1) == 0.006
    assert lr_at(4, section=section, num_steps=4) > 0


def test_a_run_that_ends_within_its_warm_up_never_reaches_the_full_rate() -> None:
    section = OptimSection(lr=0.006, schedule="cosine", warmup_steps=10)
    assert [lr_at(step, section=section, num_steps=2) for step in (1, 2)] == pytest.approx([0.0006, 0.0012])


def test_a_rank_that_has_nothing_of_what_is_trained_updates_nothing() -> None:
    empty = nn.Parameter(torch.empty(0))
    for parameters, parts in (([], []), ([empty], [()])):
        optimizer = AdamW(parameters, OptimSection(), parts=parts)
        optimizer.step([torch.empty(0) for _ in parameters], 1e-3)
        assert not any(values.numel() for values in optimizer.state())


@pytest.mark.parametrize("on_host", [False, True])
def test_parts_with_a_rate_of_their_own_are_updated_as_torchs_groups_and_padding_is_left(on_host) -> None:
    section = OptimSection(weight_decay=0.1, lr_ratio=4.0)
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(12, generator=generator), torch.randn(3, 12, generator=generator)
    first, second = nn.Parameter(start[:5].clone()), nn.Parameter(start[5:10].clone())
    theirs = torch.optim.AdamW([{"params": [first]}, {"params": [second]}], weight_decay=0.1, foreach=False)
    flat = nn.Parameter(start.clone())
    optimizer = AdamW([flat], section, on_host=on_host, parts=[(Span(0, 5), Span(5, 10, rate=4.0))])
    for step, gradient in enumerate(gradients, start=1):
        first.grad, second.grad = gradient[:5].clone(), gradient[5:10].clone()
        for group, rate in zip(theirs.param_groups, (1.0, 4.0), strict=True):
            group["lr"] = 0.01 * step * rate
        theirs.step()
        optimizer.step([gradient.clone()], 0.01 * step)
        torch.testing.assert_close(flat.detach()[:10], torch.cat([first, second]).detach(), atol=1e-6, rtol=1e-5)
    assert torch.equal(flat.detach()[10:], start[10:])
    assert [tuple(moment.shape) for moment in (*optimizer.exp_avg, *optimizer.exp_avg_sq)] == [(12,), (12,)]


def test_updates_after_a_resume_are_those_of_torchs_optimizer_that_went_on() -> None:
    section = OptimSection(weight_decay=0.1, beta1=0.8, beta2=0.99, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator)
    gradients = torch.randn(6, 50, generator=generator)
    plain = nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([plain], betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, foreach=False)
    ours = nn.Parameter(start.clone())
    optimizer = AdamW([ours], section)
    for step, gradient in enumerate(gradients, start=1):
        if step == 4:  # a new process: the moments come from a checkpoint
            former, ours = optimizer, nn.Parameter(ours.detach().clone())
            optimizer = AdamW([ours], section)
            optimizer.exp_avg[0].copy_(former.exp_avg[0])
            optimizer.exp_avg_sq[0].copy_(former.exp_avg_sq[0])
            optimizer.resume_at(3)
        plain.grad = gradient.clone()
        theirs.param_groups[0]["lr"] = 0.01 * step
        theirs.step()
        optimizer.step([gradient.clone()], 0.01 * step)
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_elements", [1, 4095, 4096, 4097, 10_000_000])
def test_the_norm_of_a_gradient_of_any_length_is_that_in_double_precision(num_elements) -> None:
    gradient = torch.randn(num_elements, generator=torch.Generator().manual_seed(0))
    wanted = float(gradient.double().square().sum().sqrt())
    # 4096 squares are added up in fp32, at worst one by one: of the roundings, now up and now down, as many are left as
    # a walk of so many steps goes far.
    assert float(norm_of(gradient)) == pytest.approx(wanted, rel=math.sqrt(4096) * 2**-24)


def adapters_with_gradient(gradient: torch.Tensor, *, max_norm: float | None) -> ReplicatedAdapters:
    """One trained tensor pair of as many weights as the gradient has, all zero, with this gradient."""
    module = LoraAdapter(len(gradient) - 1, 1, rank=1, alpha=1, dropout=0.0)
    tensors = halves_of("layer", module)
    adapters = ReplicatedAdapters(tensors, World.alone(torch.device("cpu")))
    adapters.start_training(OptimSection(max_grad_norm=max_norm, beta1=0.0, beta2=0.0, eps=1.0))
    adapters.begin_step()
    adapters.gradient.copy_(gradient)
    return adapters


def test_a_gradient_is_scaled_to_the_norm_it_is_given_and_a_shorter_one_is_left() -> None:
    for max_norm, scale in ((2.5, 0.5), (10.0, 1.0), (None, 1.0)):
        adapters = adapters_with_gradient(torch.tensor([3.0, 4.0]), max_norm=max_norm)
        assert float(adapters.step(1.0)) == pytest.approx(5.0)
        # Without momentum AdamW's update is g / (|g| + eps), of the clipped g.
        clipped = scale * torch.tensor([3.0, 4.0])
        torch.testing.assert_close(adapters.parameter.detach(), -clipped / (clipped + 1.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_updates_nothing(value) -> None:
    adapters = adapters_with_gradient(torch.tensor([1.0, value]), max_norm=1.0)
    assert not math.isfinite(adapters.step(1.0))
    assert not any(values.any() for values in (adapters.parameter, *adapters.optimizer_state()))
