"""The tracker of memory: known allocations, real runs on one to four ranks, and the same runs simulated."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dist_lora.checkpoint.saver import Saver
from dist_lora.config.schema import Config
from dist_lora.herd.shape import read_shape
from dist_lora.simulation.collectives import Traffic, traffic
from dist_lora.simulation.simulate import STEP, Simulation, full_batches, simulate
from dist_lora.simulation.tracker import KINDS, Memory, Tracker, register_run
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World
from tests.ranks.tiny import config_of, trainee_of

BASES = ("none", "nf4", "int8")
WORLDS = {"1": (1, 1), "2": (2, 2), "2 x 2": (4, 2)}  # ranks, ranks of a node


def alive(tracker: Tracker) -> dict[str, int]:
    """The live bytes now, by kind."""
    return dict(zip(KINDS, tracker.memory().timeline[-1].by_kind, strict=True))


# Known allocations


def test_the_peak_of_a_sequence_made_by_hand_is_known_to_the_byte() -> None:
    before = torch.zeros(1000)  # 4,000 bytes
    tracker = Tracker()
    tracker.register("adapters", [before])
    with tracker:
        a = torch.zeros(500)  # 2,000 bytes
        b = a[:100]  # a view is none
        c = a + 1  # 2,000: the peak is here, 8,000
        del c
        d = b.double()  # 800
        del a
        assert alive(tracker)["adapters"] == 4000
        assert alive(tracker)["other"] == 2000 + 800, "b keeps a's storage"
        del b
        assert alive(tracker)["other"] == 800
    memory = tracker.memory()
    assert memory.peak.total_bytes == 8000
    assert memory.composition["adapters"] == 4000 and memory.composition["other"] == 4000
    assert memory.timeline[-1].total_bytes == 4000 + 800
    del d


def test_a_storage_that_is_emptied_and_regrown_counts_what_it_has() -> None:
    with (tracker := Tracker()):
        gathered = torch.zeros(1000)
        tracker.register("gathered base", [gathered])
        gathered.untyped_storage().resize_(0)
        assert sum(alive(tracker).values()) == 0
        other = torch.zeros(300)
        gathered.untyped_storage().resize_(4000)
        assert alive(tracker)["gathered base"] == 4000
        gathered.untyped_storage().resize_(0)
    assert tracker.memory().peak.total_bytes == 4000 + 1200
    del other


def test_the_timeline_keeps_the_peak_however_few_moments_it_has() -> None:
    with (tracker := Tracker()):
        for size in (10, 10, 10, 2000, 10, 10, 10, 10):
            torch.zeros(size)
    timeline = tracker.memory(num_moments=4).timeline
    assert len(timeline) <= 4
    assert max(moment.total_bytes for moment in timeline) == 8000


# Real runs


@dataclass
class Seen:
    """What one rank saw of a step, and what was alive before and after it."""

    memory: Memory
    before: dict[str, int]
    after: dict[str, int]
    traffic: tuple[Traffic, ...]
    num_slot_bytes: int
    num_trained: int


def tracked_step(world: World, config: Config) -> Seen:
    trainee = trainee_of(config, world)
    loader = full_batches(config, world)
    trainee.adapters.start_training(config.optim)
    steps = TrainStep(config, trainee, loader=loader, num_steps=STEP, saver=Saver(world), world=world)
    trainee.model.train()
    for step in range(1, STEP):
        steps.take(step)
    tracker = Tracker()
    register_run(tracker, trainee.model, trainee.engine, trainee.adapters)
    before = alive(tracker)
    with tracker:
        steps.take(STEP)
    tracker.register("gradients", trainee.adapters.gradients())
    slots = trainee.engine.slots(trainee.model)
    return Seen(
        tracker.memory(),
        before,
        alive(tracker),
        traffic(tracker.sent, world),
        sum(slot.destination.nbytes for slot in slots),
        sum(flat.numel() for flat in trainee.adapters.flat_parameters),
    )


def config_for(folder: Path, quant: str, **settings: dict[str, object]) -> Config:
    tree: dict[str, dict[str, object]] = {
        "model": {"quant": quant},
        "parallel": {"base_shard": "node", "adapters": "replicate"},
        "train": {"sequence_length": 64, "micro_batch": 2, "global_batch": 16},
    }
    for section, values in settings.items():
        tree[section] = {**tree.get(section, {}), **values}
    return config_of(folder, **tree)


def simulated(config: Config, world: str) -> Simulation:
    size, node_size = WORLDS[world]
    shape = read_shape(Path(config.model.name))
    return simulate(
        config, shape, num_nodes=size // node_size, gpus_per_node=node_size, device_bytes=2**30, device="cpu"
    )


@pytest.mark.parametrize("quant", BASES)
@pytest.mark.parametrize("world", ["1", "2"])
def test_what_stays_from_step_to_step_is_the_arithmetic_to_the_byte(ranks, tiny_llama, quant, world) -> None:
    folder = tiny_llama("llama31", num_layers=4)
    size, node_size = WORLDS[world]
    shape = read_shape(folder)
    linears = sum(out * in_ for out, in_ in shape.linear_shapes().values()) * shape.num_layers
    rows = sum(out for out, _ in shape.linear_shapes().values()) * shape.num_layers
    rest = shape.num_parameters() - linears
    stored = {"none": 4 * linears, "nf4": linears // 2 + 4 * linears // 64, "int8": linears + 4 * rows}[quant]
    trained = shape.adapter_parameters(shape.linear_shapes(), range(shape.num_layers), 4)
    config = config_for(folder, quant, train={"micro_batch": 1, "global_batch": 2 * size})
    for seen in ranks(size).run(tracked_step, config, node_size=node_size):
        assert seen.before["base shard"] == (stored + 4 * rest) / size
        assert seen.before["adapters"] == seen.before["gradients"] == 4 * trained
        assert seen.before["optimizer"] == 2 * 4 * trained + 4  # the count of steps
        for kind in ("base shard", "adapters", "gradients", "optimizer", "gathered adapters"):
            assert seen.after[kind] == seen.before[kind], kind
        left = sum(seen.after.values()) - sum(seen.before.values())
        assert left == seen.after["gathered base"], "only what FSDP2 keeps for the next step may stay"
        assert left <= 4 * shape.hidden * 2


ZERO3 = {"engine": "zero3", "base_shard": "world", "adapters": "shard"}
CASES = [
    ("none", "2", {}, False),
]
MORE_CASES = [
    ("nf4", "2 x 2", {"adapters": "shard"}, True),
    ("int8", "2 x 2", {"base_shard": "world"}, True),
    ("nf4", "2", {"offload": "all"}, False),
    ("nf4", "1", {"offload": "all"}, True),
    ("none", "1", {"engine": "fsdp2"}, True),
    ("int8", "2 x 2", {"base_shard": "gpu"}, False),
    *(("nf4", world, {}, False) for world in WORLDS),
    ("int8", "2", {}, False),
    ("nf4", "2", {"adapters": "shard"}, False),
    ("nf4", "2", ZERO3, True),
    *((quant, world, {}, False) for quant in ("none", "int8") for world in ("1", "2 x 2")),
    ("none", "1", {}, True),
    *((quant, "2", ZERO3, False) for quant in ("none", "int8")),
    ("nf4", "2 x 2", ZERO3, True),
]


@pytest.mark.parametrize(
    "quant, world, parallel, recompute",
    [*CASES, *(pytest.param(*case, marks=pytest.mark.turn(of=4)) for case in MORE_CASES)],
)
def test_the_simulation_is_the_real_run(ranks, tiny_llama, quant, world, parallel, recompute) -> None:
    config = config_for(
        tiny_llama("llama31", num_layers=4),
        quant,
        parallel=parallel,
        train={"activation_checkpointing": recompute},
    )
    size, node_size = WORLDS[world]
    on_fakes = simulated(config, world)
    seen = ranks(size).run(tracked_step, config, node_size=node_size)
    fullest = max(one.memory.peak.total_bytes for one in seen)
    assert on_fakes.peak_bytes == pytest.approx(fullest, rel=1e-3)  # some scalars are other ones
    for kind, num_bytes in seen[0].memory.composition.items():
        assert on_fakes.composition[kind] == pytest.approx(num_bytes, rel=1e-3), kind
    assert Counter(on_fakes.traffic) == Counter(seen[0].traffic)
