"""Steps are the loader's, and hours are the plan's step times as many times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dist_lora.config.schema import Config
from dist_lora.herd.members import MEMBERS
from dist_lora.overview.duration import hours_of, steps_of
from dist_lora.plan import command as plan_command
from dist_lora.plan.command import MachineRequest
from dist_lora.plan.plan import make_plan
from dist_lora.train.command import loader_of, num_steps_of
from dist_lora.world.world import World
from tests.ranks.tiny import documents

SHAPE = MEMBERS["3.1-8b"].shape


def config_of(**sections) -> Config:
    tree = {
        "run": "a",
        "model": {"name": "3.1-8b"},
        "data": {"train": "a.jsonl"},
        "train": {"sequence_length": 100, "global_batch": 4, "micro_batch": 1, "epochs": 2.5, "packing": True},
        "machine": {"gpu": "h100-80gb", "gpus_per_node": 2},
    }
    return Config.model_validate({name: {**tree.get(name, {}), **sections.get(name, {})} if isinstance(tree[name], dict) else tree[name] for name in tree})  # fmt: skip


def counted(config: Config):
    tokens = documents(seed=0, lengths=[100] * 5 + [50] * 10)
    loader = loader_of(config, tokens, World.alone())
    return steps_of(config, loader, num_steps=num_steps_of(config, loader))


def test_steps_are_counted_by_hand():
    steps = counted(config_of())
    assert (steps.num_sequences, steps.num_steps_of_epoch, steps.num_steps) == (10, 3, 8)  # 3 + 3 + half of 3
    assert steps.share_filled == 1.0 and steps.tokens_of_sequence == 100
    alone = counted(config_of(train={"packing": False}))
    assert (alone.num_sequences, alone.num_steps_of_epoch, alone.num_steps) == (15, 4, 10)
    assert alone.share_filled is None and alone.tokens_of_sequence == pytest.approx(1000 / 15)


def test_hours_are_the_plans_step_time_where_sequences_are_full_and_less_where_they_are_not():
    config = config_of()
    steps = counted(config)
    planned = make_plan(config, MachineRequest.of(config, None, None, None, None, None, None).single(), shape=SHAPE)
    found = hours_of(config, SHAPE, steps)
    assert found.machines == "2 x h100-80gb" and found.step_s == planned.speed.step_s
    assert found.hours == tuple(8 * seconds / 3600 for seconds in planned.speed.step_s)
    half = hours_of(config, SHAPE, replace(steps, tokens_of_sequence=50.2))
    assert half.step_s[0] < found.step_s[0]
    shorter = config_of(train={"sequence_length": 50})
    again = make_plan(shorter, MachineRequest.of(shorter, None, None, None, None, None, None).single(), shape=SHAPE)
    assert half.step_s == again.speed.step_s


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        ({"gpu": None, "gpus_per_node": None}, "machine.gpu isn't set, and there is no GPU here"),
        ({"gpu": "rtx4090-24gb", "gpus_per_node": 1, "nodes": 1}, "the run doesn't fit on 1 x rtx4090-24gb"),
        ({"gpu": "h101"}, "machine.gpu: "),
    ],
)
def test_where_there_are_no_hours_a_sentence_says_why(machine, told, monkeypatch):
    monkeypatch.setattr(plan_command, "gpus_here", lambda: [])
    model = {"name": "3.1-8b"}
    config = config_of(machine=machine, model=model, lora={})
    shape = MEMBERS["3.1-70b"].shape if "rtx" in str(machine) else SHAPE
    found = hours_of(config, shape, counted(config))
    assert found.hours is None and found.step_s is None and told in found.unknown
