"""dist_lora's step, as ``dist-lora train`` takes it: the same config, world, loader and ``TrainStep``."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from bench.peers.turns import Turns, read_job
from dist_lora.config.load import load_config
from dist_lora.data.loader import Loader
from dist_lora.engines.precision import set_products
from dist_lora.train.build import Trainee, build, open_base
from dist_lora.train.command import loader_of, tokens_of
from dist_lora.train.loop import Run
from dist_lora.world.launcher import launched_rank
from dist_lora.world.world import World, join


def documents_of(trainee: Trainee, loader: Loader) -> list[float]:
    """The mean loss of each document of the first batch."""
    (batch,) = loader.batch(0).micro_batches
    losses = []
    for first, last in zip(batch.bounds, batch.bounds[1:], strict=False):
        is_own = (batch.target_index >= first) & (batch.target_index < last)
        own = replace(batch, target_index=batch.target_index[is_own], labels=batch.labels[is_own])
        with torch.no_grad():
            losses.append(trainee.run(own).item() / len(own.labels))
    return losses


def main() -> None:
    """One rank."""
    turns, job = Turns(), read_job()
    config = load_config(Path(job.config))
    set_products(is_deterministic=False)
    launched = launched_rank(os.environ)
    world = (
        World.alone()
        if launched is None or launched.world_size == 1
        else join(launched, os.environ, collective_timeout_s=600, join_timeout_s=600)
    )
    base = open_base(config, world)
    tokens, _ = tokens_of(config, base, world)
    loader = loader_of(config, tokens, world)
    trainee = build(config, base, world)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, trainee, loader=loader, held_out=None, num_steps=1000, folder=Path(folder), world=world)
        trainee.model.train()
        turns.ready()
        step = 0
        for request in turns:
            if request == "documents":
                turns.end(losses=documents_of(trainee, loader))
                continue
            step += 1
            line, _ = run.step.take(step)
            turns.end(loss=line["loss"], tokens=line["tokens"])
    world.leave()


if __name__ == "__main__":
    main()
