"""Whole runs on the ranks of a pool: the work of ``dist-lora train``, without the seconds that its start costs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader, StepBatch
from dist_lora.data.token_set import TokenSet
from dist_lora.errors import StoppedOnRequest
from dist_lora.plan.hardware import peak_flops_per_s
from dist_lora.run_folder import folder as folder_module
from dist_lora.train import command
from dist_lora.train.build import Trainee
from dist_lora.train.loop import Run
from dist_lora.train.meter import Meter
from dist_lora.train.signals import STOP_SIGNALS, StopRequest
from dist_lora.world.world import World

EXACT = ("step", "epoch", "loss", "grad_norm", "lr", "target_tokens", "tokens")


def chats_settings(base: Path, folder: Path, *, num_steps: int, dropout: float = 0.0) -> dict[str, Any]:
    """Settings of a run over 14 chats in steps of 4: the last step of each epoch has 2."""
    data = folder / "train.jsonl"
    if not data.exists():
        chats = [[("user", f"say {i}"), ("assistant", f"{i} " * (i * 7 % 9 + 1))] for i in range(14)]
        lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in chats]
        data.write_text("\n".join(lines))
    return {
        "run": "it",
        "model": {"name": str(base), "dtype": "fp32"},
        "lora": {"rank": 4, "dropout": dropout},
        "data": {"train": str(data), "cache_dir": str(folder / "cache")},
        "train": {"steps": num_steps, "global_batch": 4, "micro_batch": 1, "packing": False, "sequence_length": 64},
        "optim": {"lr": 5e-3, "warmup_steps": 2, "weight_decay": 0.01},
        "log": {"trackers": [], "every": 100},
    }


def train_until_asked(config: Config, world: World) -> None:
    """The work of ``dist-lora train``, listening to signals as it does."""
    with StopRequest() as stop:
        command.train(config, world, stop, peak_of=peak_flops_per_s)


def train_command(world: World, settings: Mapping[str, Any], ask_at: int | None = None) -> str:
    """``dist-lora train``; returns what it said where it stopped on request, else nothing.

    ``ask_at``: while the last rank prepares this step it gets SIGUSR1.
    """

    def asking(config: Config, tokens: TokenSet, world: World) -> Loader:
        loader = loader_of(config, tokens, world)
        batch_of = loader.batch

        def batch(step: int) -> StepBatch:
            if step + 1 == ask_at and world.world_rank == world.world_size - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return batch_of(step)

        loader.batch = batch  # type: ignore[method-assign]
        return loader

    loader_of = command.loader_of
    try:
        with mock.patch.object(command, "loader_of", asking):
            train_until_asked(Config.model_validate(settings), world)
    except StoppedOnRequest as stopped:
        return str(stopped)
    finally:
        for number in STOP_SIGNALS:  # a process that was asked ends deaf; this one lives on
            signal.signal(number, signal.SIG_DFL)
        while folder_module._locks:  # and gives its lock back
            folder_module._locks.pop().close()
    return ""


def run_steps(
    world: World, config: Config, trainee: Trainee, loader: Loader, *, folder: Path, num_steps: int
) -> list[dict[str, Any]]:
    """The lines of metrics of a run from fresh adapters over documents made by hand."""
    trainee.adapters.initialize(config.train.seed)
    run = Run(config, trainee, loader=loader, held_out=None, num_steps=num_steps, folder=folder, world=world)
    if world.is_first:
        folder.mkdir(parents=True)
    world.agree("the folder", None)
    meter = (
        Meter(folder, trackers=[], settings={}, every=num_steps, first_step=1, num_steps=num_steps)
        if world.is_first
        else None
    )
    try:
        with StopRequest() as stop, stop.deferred():
            run.train(meter, stop)
    finally:
        if meter is not None:
            meter.close()
    return metrics(folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def exact(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What of the lines of metrics does not depend on the clock or on the machine."""
    return [tuple(line[key] for key in EXACT) for line in lines]
