"""Ranks that hold the same adapters hold the same bytes, and a run notices where one has strayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lora.data.loader import Loader
from dist_lora.errors import TrainingError
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World
from tests import turns
from tests.ranks.runs import run_steps
from tests.ranks.tiny import config_of, documents, trainee_of

PLACES = [("replicate", 2, 2), ("replicate", 4, 2), ("shard", 4, 2)]


def agreement(world: World, folder: str, adapters: str, stray: int | None) -> bool:
    """Whether all copies agree when one rank has moved one weight by the least there is."""
    config = config_of(folder, parallel={"engine": "fsdp2", "adapters": adapters})
    trainee = trainee_of(config, world)
    if world.world_rank == stray:
        with torch.no_grad():
            first = trainee.adapters.flat_parameters[0].view(torch.int32)
            first[-1] ^= 1
    return trainee.adapters.copies_agree()


@pytest.mark.parametrize("adapters, size, node_size", turns.in_suite(PLACES[0], of=PLACES))
def test_all_ranks_learn_that_one_has_strayed(ranks, tiny_llama, adapters, size, node_size) -> None:
    folder = str(tiny_llama("llama31"))
    pool = ranks(size)
    assert pool.run(agreement, folder, adapters, None, node_size=node_size) == [True] * size
    assert pool.run(agreement, folder, adapters, size - 1, node_size=node_size) == [False] * size


def run_with_a_strayed_rank(world: World, folder: str, into: str) -> str:
    """What a run says of which the second rank's optimizer has gone astray in the first step."""
    config = config_of(folder, optim={"warmup_steps": 0})
    trainee = trainee_of(config, world)
    loader = Loader(documents(seed=0, lengths=[20, 30]), sequence_length=64, packing=False, global_batch=2,
                    micro_batch=1, seed=0, world_rank=world.world_rank, world_size=world.world_size)  # fmt: skip
    step_of = TrainStep.take

    def astray(self: TrainStep, *arguments: Any, **named: Any) -> object:
        line = step_of(self, *arguments, **named)
        if world.world_rank == 1:
            trainee.adapters.flat_parameters[0].data[7] += 1e-3  # type: ignore[attr-defined]
        return line

    TrainStep.take = astray  # type: ignore[method-assign, assignment]
    try:
        run_steps(world, config, trainee, loader, folder=Path(into), num_steps=3)
    except TrainingError as error:
        return str(error)
    finally:
        TrainStep.take = step_of  # type: ignore[method-assign]
    return ""


def test_a_run_stops_at_its_first_step_on_every_rank(ranks, tiny_llama, tmp_path) -> None:
    told = ranks(2).run(run_with_a_strayed_rank, str(tiny_llama("llama31")), str(tmp_path / "run"))
    assert told[0] == told[1]
    assert told[0].startswith("step 1: the adapters are not the same on all ranks that hold them")
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
