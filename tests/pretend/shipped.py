"""The configs that are shipped, each planned by arithmetic and simulated on its machines; those of the same bytes once.

Members of one size differ in their RoPE, their context and their tokens, which are values and no sizes: what a step holds
and sends is the same for 3 8B, 3.1 8B, their Instructs and Guard 3 8B.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dist_lora.herd.shape import Shape
from dist_lora.layout.memory import memory_of
from dist_lora.layout.setup import Setup
from dist_lora.plan.presets import Preset
from dist_lora.plan.traffic import collectives_of
from dist_lora.simulation.simulate import Simulation, simulate

# Settings that are names, places and values: nothing that a step holds or sends depends on them.
NAMES = {"run": ..., "model": {"name"}, "data": ..., "optim": {"lr"}, "checkpoint": {"every"}}


def sizes_of(shape: Shape) -> Shape:
    """A shape without what is a value in it and no size."""
    return dataclasses.replace(shape, rope_theta=0.0, rope_scaling=None, context=0, norm_eps=0.0)


def alike(presets: Iterable[Preset]) -> list[list[Preset]]:
    """The configs in groups, in their order: all that a simulation is given is equal in a group, but for names and values."""
    groups: dict[str, list[Preset]] = {}
    for preset in presets:
        settings = preset.config.model_dump(mode="json", exclude=NAMES)
        given = [settings, dataclasses.asdict(sizes_of(preset.member.shape)), preset.machine.name]
        groups.setdefault(json.dumps(given, sort_keys=True, default=sorted), []).append(preset)
    return list(groups.values())


@dataclass(frozen=True)
class Compared:
    """A plan beside the simulated step."""

    planned_bytes: int
    simulated_bytes: int
    is_sent_as_planned: bool

    @property
    def off(self) -> float:
        """How much more is planned than is held, as a part of that."""
        return self.planned_bytes / self.simulated_bytes - 1


def compared(group: list[Preset]) -> Iterator[tuple[Preset, Compared]]:
    """Every config of a group beside one simulation, of full size: that of the first."""
    first = group[0]
    simulated = simulate(
        first.config,
        first.member.shape,
        num_nodes=first.machine.num_nodes,
        gpus_per_node=first.machine.gpus_per_node,
        device_bytes=first.machine.gpu.memory_bytes,
    )
    for preset in group:
        yield preset, beside(preset.plan.setup, simulated)


def beside(setup: Setup, simulated: Simulation) -> Compared:
    """A setup's plan beside the simulation of the same run."""
    is_same = planned_traffic(setup) == simulated_traffic(simulated)
    return Compared(memory_of(setup).device, simulated.peak_bytes, is_same)


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
