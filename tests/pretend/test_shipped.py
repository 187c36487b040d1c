"""The configs that are shipped are planned as their simulated steps are, within 3%, and send what is planned.

``python -m bench.plan --configs`` does it for all of them.
"""

from __future__ import annotations

import dataclasses

import pytest

from dist_lora.herd.members import MEMBERS
from dist_lora.layout.memory import memory_of
from dist_lora.plan.presets import MACHINES, SENSIBLE, presets, size_of
from dist_lora.plan.traffic import collectives_of
from dist_lora.simulation.simulate import simulate
from tests.pretend.shipped import alike, compared, sizes_of

PRESETS = presets()
GROUPS = alike(PRESETS.values())
# Of each size a plain and a quantized one, on every machine: 4 minutes of one core together.
WHOLE = (
    "3.2-1b_lora_2x24gb",
    "3.2-1b_qlora_1x24gb",
    "3.2-3b_lora_2x24gb",
    "3.2-3b_qlora_1x24gb",
    "3.1-8b_lora_8x80gb",
    "3.1-8b_qlora_2x24gb",
    "3.1-70b_lora_8x80gb",
    "3.1-70b_qlora_1x80gb",
    "3.1-405b_lora_8x141gb",
    "3.1-405b_qlora_4x8x80gb",
)


def test_configs_of_the_same_bytes_have_one_setup() -> None:
    assert sum(map(len, GROUPS)) == len(PRESETS)
    for first, *rest in GROUPS:
        setup = first.plan.setup
        for other in (preset.plan.setup for preset in rest):
            assert dataclasses.replace(other, shape=sizes_of(other.shape)) == dataclasses.replace(
                setup, shape=sizes_of(setup.shape)
            )
            assert memory_of(other) == memory_of(setup) and collectives_of(other) == collectives_of(setup)


def test_what_is_left_out_of_a_shape_decides_no_byte_of_a_step() -> None:
    config = PRESETS["3-8b_lora_2x24gb"].config
    found = []
    for name in ("3-8b", "guard-3-8b"):
        shape = dataclasses.replace(MEMBERS[name].shape, num_layers=2)
        found.append(simulate(config, shape, num_nodes=1, gpus_per_node=2, device_bytes=2**34))
    assert MEMBERS["3-8b"].shape != MEMBERS["guard-3-8b"].shape
    assert found[0].composition == found[1].composition and found[0].traffic == found[1].traffic


def test_those_that_are_simulated_whole_stand_for_every_member_method_and_machine() -> None:
    groups = [group for group in GROUPS if any(preset.name in WHOLE for preset in group)]
    assert len(groups) == len(WHOLE)
    shown = [preset for group in groups for preset in group]
    assert {preset.member.name for preset in shown} == set(MEMBERS)
    assert {preset.machine.name for preset in shown} == set(MACHINES)
    assert {(size_of(preset.member), preset.method) for preset in shown} == {
        (size, method) for size in SENSIBLE for method in SENSIBLE[size]
    }


@pytest.mark.turn(of=6)
@pytest.mark.parametrize("name", WHOLE)
def test_a_config_and_those_like_it_are_planned_as_the_simulated_step(name: str) -> None:
    (group,) = (group for group in GROUPS if any(preset.name == name for preset in group))
    for preset, found in compared(group):
        assert abs(found.off) < 0.03, (preset.name, found)
        assert found.is_sent_as_planned, preset.name
