"""Garbage is collected between steps, leaves nothing behind, and the collector is given back as it was."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lora.data.loader import Loader
from dist_lora.train.garbage import EVERY, collected_between_steps
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World
from tests.ranks.runs import run_steps
from tests.ranks.tiny import config_of, documents, trainee_of


@pytest.fixture(autouse=True)
def collector() -> Any:
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_within_a_step_and_all_after_every_tenth() -> None:
    collections: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collections.append(f"{phase} {info['generation']}")

    with collected_between_steps() as collect_after:
        assert not gc.isenabled() and gc.get_freeze_count() > 10_000
        gc.callbacks.append(note)
        try:
            for step in range(1, 2 * EVERY):
                kept = [[] for _ in range(5_000)]  # enough for a collection of the youngest generation
                assert len(kept) == 5_000 and len(collections) == 2 * (step > EVERY), step
                collect_after(step)
        finally:
            gc.callbacks.remove(note)
    assert collections == ["start 2", "stop 2"]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_collector_is_given_back_as_it_was_after_an_error_too() -> None:
    gc.disable()
    with pytest.raises(KeyError), collected_between_steps():
        raise KeyError
    assert not gc.isenabled() and gc.get_freeze_count() == 0
    gc.enable()
    with pytest.raises(KeyError), collected_between_steps():
        raise KeyError
    assert gc.isenabled()


def test_thirty_steps_with_recomputation_leave_as_many_objects_as_ten(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_steps, take = 3 * EVERY, TrainStep.take
    num_objects: dict[int, int] = {}

    def counted(self: TrainStep, step: int, **arguments: Any) -> Any:
        assert not gc.isenabled()
        num_objects[step] = len(gc.get_objects())
        return take(self, step, **arguments)

    monkeypatch.setattr(TrainStep, "take", counted)
    config = config_of(
        tiny_llama(),
        train={"activation_checkpointing": "all", "steps": num_steps, "global_batch": 2, "sequence_length": 64},
        checkpoint={"every": num_steps, "save_at_start": False},
        log={"every": num_steps},
    )
    world = World.alone(torch.device("cpu"))
    loader = Loader(
        documents(seed=0, lengths=[9, 7]), sequence_length=64, packing=False, global_batch=2, micro_batch=1, seed=0,
        world_rank=0, world_size=1,
    )  # fmt: skip
    run_steps(world, config, trainee_of(config, world), loader, folder=tmp_path / "run", num_steps=num_steps)
    assert num_objects[EVERY] - num_objects[EVERY // 2] > 50  # the cycles of checkpointed layers
    grown = num_objects[2 * EVERY + 1] - num_objects[EVERY + 1]
    assert abs(grown) < 20, num_objects
    assert gc.isenabled()
