"""Faults that tests let into the ranks of a run: ``run(..., fault="name")`` calls the function of that name.

Each rank calls it before anything else, in a real run that a real launcher has started (see
``inject/sitecustomize.py``). Steps are counted from 1. What a test has to know of the fault is printed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from dist_lora.checkpoint import shards
from dist_lora.data import tokens
from dist_lora.data.loader import Loader
from dist_lora.train import build, loop, main

RANK = int(os.environ["RANK"])
LONG_S = 300.0  # longer than any test waits: who sleeps so long must be ended
BOOM = "the boom of a test"
now = {"step": 0}


def wrap(module: Any, name: str, around: Callable[..., Any]) -> None:
    """Put ``around(original, *arguments)`` in the place of a function."""
    original = getattr(module, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(original, *arguments, **named)

    setattr(module, name, wrapped)


def count_steps() -> None:
    """Keep ``now["step"]`` as the step that is computed."""

    def batch(original: Callable[..., Any], self: Loader, step: int) -> Any:
        now["step"] = step + 1
        return original(self, step)

    wrap(Loader, "batch", batch)


def in_the_model(change: Callable[[Any], None]) -> None:
    """Change the model that is trained once it is built and filled."""

    def built(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        trainee = original(*arguments, **named)
        change(trainee.model)
        return trainee

    wrap(main, "build", built)


def before(module: Any, name: str, action: Callable[[], None], *, at_call: int = 1) -> None:
    """Do something before the ``at_call``-th call of a function."""
    calls = 0

    def around(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            action()
        return original(*arguments, **named)

    wrap(module, name, around)


def at_step(step: int, action: Callable[[], None]) -> None:
    """Do something before the first forward of a step."""
    count_steps()
    done = []

    def forward(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if now["step"] == step and not done:
            done.append(step)
            action()
        return original(*arguments, **named)

    wrap(loop, "run_micro_batch", forward)


def boom() -> None:
    raise ValueError(BOOM)


# The numbers


def nan_in_the_loss_of_one_sample_of_rank_1() -> None:
    count_steps()

    def forward(original: Callable[..., Any], model: Any, batch: Any, **named: Any) -> Any:
        loss = original(model, batch, **named)
        if RANK == 1 and now["step"] == 5 and not now.get("done"):
            now["done"] = 1
            print("poisoned", *batch.sample_ids, flush=True)
            return loss * torch.nan
        return loss

    wrap(loop, "run_micro_batch", forward)


def infinity_in_one_element_of_a_gradient() -> None:
    count_steps()

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if RANK == 1 and now["step"] == 3:
            gradient = gradient.clone()
            gradient.view(-1)[5] = torch.inf
        return gradient

    in_the_model(lambda model: dict(model.named_parameters())[
        "model.layers.1.mlp.up_proj.adapter.lora_B"].register_hook(poison))  # fmt: skip


def input_of_layer_2_detached() -> None:
    def detach(module: Any, arguments: Any) -> Any:
        return (arguments[0].detach(), *arguments[1:])

    in_the_model(lambda model: model.blocks()[2].register_forward_pre_hook(detach))


# A rank that raises while the other is busy for long


def boom_of_rank_1_in_step_3() -> None:
    if RANK == 1:
        at_step(3, boom)


def _boom_while_the_other_is_busy(module: Any, name: str) -> None:
    before(module, name, boom if RANK == 1 else lambda: time.sleep(LONG_S))


def boom_of_rank_1_while_rank_0_tokenises() -> None:
    _boom_while_the_other_is_busy(tokens, "encode_sample")


def boom_of_rank_1_while_rank_0_loads() -> None:
    _boom_while_the_other_is_busy(build, "fill_slots")


def boom_of_rank_1_while_rank_0_evaluates() -> None:
    _boom_while_the_other_is_busy(loop, "loss_of")


def boom_of_rank_1_while_rank_0_saves() -> None:
    _boom_while_the_other_is_busy(shards, "_write_file")


# Signals


def kill_of_rank_1_in_step_3() -> None:
    if RANK == 1:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
