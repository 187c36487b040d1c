"""The configs that are shipped, each planned by arithmetic and simulated on its machines; those of the same bytes once.

Members of one size differ in their RoPE, their context and their tokens, which are values and no sizes: what a step holds
and sends is the same for 3 8B, 3.1 8B, their Instructs and Guard 3 8B.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dist_lora.herd.facts import Shape
from dist_lora.plan.arithmetic import Setup, memory_of
from dist_lora.plan.configs import Preset
from dist_lora.plan.simulate import Simulation, simulate
from dist_lora.plan.traffic import collectives_of

# Settings that are names, places and values: nothing that a step holds or sends depends on them.
NAMES = {"run": ..., "model": {"name"}, "data": ..., "optim": {"lr"}, "checkpoint": {"every"}}


def sizes_of(shape: Shape) -> Shape:
    """A shape without what is a value in it and no size."""
    return dataclasses.replace(shape, rope_theta=0.0, rope_scaling=None, context=0, norm_eps=0.0)


def what_decides_bytes(preset: Preset) -> str:
    """All that a simulation is given, but for names and values: equal for configs that hold and send the same."""
    settings = preset.config.model_dump(mode="json", exclude=NAMES)
    return json.dumps(
        [settings, dataclasses.asdict(sizes_of(preset.member.shape)), preset.machine.name], sort_keys=True
    )


def alike(presets: Iterable[Preset]) -> list[list[Preset]]:
    """The configs in groups of the same bytes, in their order."""
    groups: dict[str, list[Preset]] = {}
    for preset in presets:
        groups.setdefault(what_decides_bytes(preset), []).append(preset)
    return list(groups.values())


def simulated(preset: Preset) -> Simulation:
    """A step of a config, of full size, on its machines."""
    machine = preset.machine
    return simulate(
        preset.config,
        preset.member.shape,
        num_nodes=machine.num_nodes,
        gpus_per_node=machine.gpus_per_node,
        device_bytes=machine.gpu.memory_bytes,
    )


def planned_traffic(setup: Setup) -> dict[int, tuple[int, int]]:
    """What a plan says is sent: the number of collectives and their bytes, by the number of ranks that take part."""
    return _by_ranks((each.num_ranks, each.count, each.count * each.num_bytes) for each in collectives_of(setup))


def simulated_traffic(simulation: Simulation) -> dict[int, tuple[int, int]]:
    """What a simulated step sends, counted likewise. What a rank alone sends goes nowhere."""
    return _by_ranks((each.ranks, each.count, each.num_bytes) for each in simulation.traffic if each.ranks > 1)


def _by_ranks(sent: Iterable[tuple[int, int, int]]) -> dict[int, tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    for ranks, count, num_bytes in sent:
        counts, sizes = found.get(ranks, (0, 0))
        found[ranks] = (counts + count, sizes + num_bytes)
    return found


@dataclass(frozen=True)
class Compared:
    """A config's plan beside the simulation of its bytes."""

    preset: Preset
    planned_bytes: int
    simulated_bytes: int
    is_sent_as_planned: bool
    seconds: float

    @property
    def off(self) -> float:
        """How much more is planned than the simulated step holds, as a part of that."""
        return self.planned_bytes / self.simulated_bytes - 1


def compared(group: list[Preset]) -> Iterator[Compared]:
    """Every config of a group beside one simulation, that of the first."""
    found = simulated(group[0])
    for preset in group:
        setup = preset.plan.setup
        yield Compared(
            preset,
            memory_of(setup).device,
            found.peak_bytes,
            planned_traffic(setup) == simulated_traffic(found),
            found.seconds,
        )
