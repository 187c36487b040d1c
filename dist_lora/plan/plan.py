"""The plan of a run: GPU and host memory, communication and disk; whether it fits, and what would make it fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError
from dist_lora.herd.models import known_model
from dist_lora.herd.shape import Shape
from dist_lora.layout.choices import TIGHT
from dist_lora.layout.memory import Memory, memory_of, reserve_bytes, setup_of
from dist_lora.layout.setup import Setup, parts_of
from dist_lora.plan.hardware import Gpu
from dist_lora.plan.speed import Speed, speed_of
from dist_lora.plan.traffic import Collective, collectives_of, received_bytes
from dist_lora.text import GIB, count, time_range

PROCESS_BYTES = 1.3 * GIB  # per rank in host memory: Python, torch and the CUDA libraries
LOADING_BYTES = 150 * 2**20  # while loading: three slices of 16 MiB, and buffers for reading and quantizing
BYTES_PER_TOKEN = 4  # of English text, for a file that isn't tokenized
NUM_CHANGES = 3
LENGTH_STEP = 64  # a searched sequence_length is a multiple of it

# A setting whose largest value that fits is searched, see ``_largest``.
_SEARCHED = ("train.micro_batch", "train.sequence_length")
_LARGEST: Final = object()


@dataclass(frozen=True)
class Machines:
    """A number of nodes with a number of GPUs of one type each; ``host_bytes`` per node, if known.

    ``assumed`` says what was assumed, since it was not given; ``options`` are those of ``dist-lora plan`` that name them.
    """

    num_nodes: int
    gpus_per_node: int
    gpu: Gpu
    host_bytes: int | None = None
    assumed: str = ""
    options: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        nodes = f"{self.num_nodes} nodes x " if self.num_nodes > 1 else ""
        return f"{nodes}{self.gpus_per_node} x {self.gpu.name}"


@dataclass(frozen=True)
class Change:
    """Settings, or more nodes, with which the run would fit."""

    settings: tuple[str, ...]
    num_nodes: int
    device_bytes: int
    host_bytes: int  # per node
    step_s: tuple[float, float] | None

    def __str__(self) -> str:
        time = "" if self.step_s is None else f", {time_range(*self.step_s)} per step"
        return (
            f"{' '.join(self.settings)}: {self.device_bytes / GIB:.1f} GiB per GPU and {self.host_bytes / GIB:,.0f} GiB of "
            f"host memory per node{time}"
        )


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch and the largest sequence length that fit, each with the other as it is set.

    A micro-batch is at most a rank's share of a step, a sequence at most the model's context; None: not even the least fits.
    """

    micro_batch: int | None
    sequence_length: int | None


@dataclass(frozen=True)
class Plan:
    """The estimates for a run on some machines."""

    config: Config
    setup: Setup
    machines: Machines
    memory: Memory
    speed: Speed | None  # None where the GPU's isn't known
    steps: int | None
    changes: tuple[Change, ...] = ()

    @property
    def reserve_bytes(self) -> int:
        """Overhead of a real GPU: CUDA context, NCCL buffers, fragmentation; 0 on a CPU."""
        return reserve_bytes(self.memory.device) if self.machines.gpu.is_gpu else 0

    @property
    def device_bytes(self) -> int:
        """Memory that the run needs per GPU."""
        return self.memory.device + self.reserve_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory that the run needs per node; on CPUs the devices' memory is part of it."""
        of_device = 0 if self.machines.gpu.is_gpu else self.memory.device
        return int(self.machines.gpus_per_node * (PROCESS_BYTES + LOADING_BYTES + self.memory.host + of_device))

    @property
    def disk_bytes(self) -> int:
        """Disk space for all checkpoints that are kept, and one that is being written."""
        section = self.config.checkpoint
        return self.memory.disk * (section.keep + section.keep_best + 1)

    @property
    def fits(self) -> bool:
        """Whether GPUs and hosts have enough memory."""
        hosts = self.machines.host_bytes
        return self.device_bytes <= self.machines.gpu.memory_bytes and (hosts is None or self.host_bytes <= hosts)

    @property
    def is_tight(self) -> bool:
        """Whether it fits and takes most of a GPU's memory."""
        return self.fits and self.machines.gpu.is_gpu and self.device_bytes >= TIGHT * self.machines.gpu.memory_bytes

    @property
    def result(self) -> str:
        """``fits``, ``fits, but is tight: 93% of it`` or ``doesn't fit``."""
        if self.is_tight:
            return f"fits, but is tight: {self.device_bytes / self.machines.gpu.memory_bytes:.0%} of it"
        return "fits" if self.fits else "doesn't fit"

    @property
    def largest(self) -> Largest:
        """How far ``train.micro_batch`` and ``train.sequence_length`` can grow, searched."""
        tree = self.config.model_dump(mode="json")
        return Largest(*(_largest(tree, name, self.machines, self.setup.shape) for name in _SEARCHED))

    @property
    def notes(self) -> list[str]:
        """Warnings about idle ranks, and about a sequence length that no single sample may have."""
        notes, setup, batch = [], self.setup, self.config.train.global_batch
        ranks = setup.base_ranks
        parts = parts_of(setup)
        smallest = min(parts, key=lambda part: part.rows)
        if setup.layout.engine == "fsdp2" and ranks > smallest.rows:
            without = count(ranks - smallest.rows, "rank holds", "ranks hold")
            notes.append(f"{smallest.name} has {smallest.rows:,} rows for {ranks:,} ranks: {without} none of it")
        if setup.num_ranks > batch:
            idle = setup.num_ranks - batch
            verb = "is" if idle == 1 else "are"
            notes.append(f"a step has {count(batch, 'sequence')}: {idle:,} of {setup.num_ranks:,} ranks {verb} idle")
        elif setup.micro_sequences < self.config.train.micro_batch:
            notes.append(
                f"train.micro_batch is {self.config.train.micro_batch}, and a rank has {count(setup.rank_sequences, 'sequence')} of "
                f"train.global_batch: {batch}"
            )
        length, context = self.config.train.sequence_length, setup.shape.context
        if length > context and self.config.model.shape is None:
            notes.append(
                f"train.sequence_length is {length:,} and the model's context {context:,} tokens: a sample may not be longer"
            )
        return notes

    @property
    def hours(self) -> tuple[float, float] | None:
        """Duration of all steps, at best and at worst; None if their number or the GPU's speed is unknown."""
        if self.steps is None or self.speed is None:
            return None
        low, high = self.speed.step_s
        return self.steps * low / 3600, self.steps * high / 3600

    @property
    def cost(self) -> tuple[float, float] | None:
        """Cost of all steps, in the currency of ``machine.price_per_gpu_hour``; None without a price, a number of steps or a speed."""
        price, hours = self.config.machine.price_per_gpu_hour, self.hours
        if price is None or hours is None:
            return None
        return hours[0] * self.setup.num_ranks * price, hours[1] * self.setup.num_ranks * price

    @property
    def collectives(self) -> list[Collective]:
        """All collectives of one step."""
        return collectives_of(self.setup)

    def to_json(self) -> dict[str, Any]:
        """The whole plan, in bytes and seconds."""
        inside, between = received_bytes(self.setup)
        return {
            "run": self.config.run,
            "model": self.config.model.name,
            "machines": str(self.machines),
            "assumed": self.machines.assumed,
            "fits": self.fits,
            "tight": self.is_tight,
            "largest": asdict(self.largest),
            "gpu_bytes": {**asdict(self.memory), "reserve": self.reserve_bytes, "needed": self.device_bytes,
                          "there": self.machines.gpu.memory_bytes},
            "host_bytes_a_node": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "checkpoint_bytes": self.memory.disk,
            "trained_weights": self.setup.trained_weights,
            "frozen_weights": self.setup.shape.num_parameters(),
            "received_bytes_a_step": {"within a node": inside, "between nodes": between},
            "collectives_a_step": [asdict(collective) for collective in self.collectives],
            "step_s": None if self.speed is None else self.speed.step_s,
            "tokens_per_s": None if self.speed is None else self.speed.tokens_per_s,
            "wall": None if self.speed is None else self.speed.bound_by,
            "not_counted": [] if self.speed is None else self.speed.uncounted,
            "steps": self.steps,
            "hours": self.hours,
            "cost": self.cost,
            "notes": self.notes,
            "chosen": [" ".join(reason.split()) for reason in self.setup.choices.reasons],
            "changes": [asdict(change) for change in self.changes],
        }  # fmt: skip


def make_plan(config: Config, machines: Machines, *, shape: Shape | None = None) -> Plan:
    """The plan of a config on some machines; if it doesn't fit, with changes that do. Needs no torch and no weights.

    Args:
        shape: the model's; None resolves ``model.name``.

    Raises:
        ConfigError: settings contradict each other, the model or the machines; or the model's shape is unknown.
        WeightsError: the model's config.json is damaged.
    """
    plan = _plan(config, machines, shape or shape_of(config))
    return plan if plan.fits else replace(plan, changes=tuple(itertools.islice(_changes(plan), NUM_CHANGES)))


def shape_of(config: Config) -> Shape:
    """The shape of the config's model: given by hand, a folder's, or a herd member's.

    Raises:
        ConfigError: it is a hub id that isn't a member's, so its sizes are unknown; or sizes that no Llama can have.
    """
    return known_model(config.model).shape


def _plan(config: Config, machines: Machines, shape: Shape) -> Plan:
    setup = setup_of(
        config,
        shape,
        num_nodes=machines.num_nodes,
        gpus_per_node=machines.gpus_per_node,
        device_bytes=machines.gpu.memory_bytes,
        on_gpu=machines.gpu.is_gpu,
        has_bf16=machines.gpu.has_bf16,
    )
    speed = speed_of(setup, machines.gpu, context=config.train.sequence_length)
    return Plan(config, setup, machines, memory_of(setup), speed, _steps(config))


def _steps(config: Config) -> int | None:
    """Steps of the run: as set, or estimated from the size of local training files; None if unknown.

    An epoch of a mixture ends when its slowest set was seen, estimated as if the shares were of bytes.
    """
    train, shares = config.train, config.data.shares()
    if train.steps is not None:
        return train.steps
    try:
        sizes = {one.path: Path(one.path).stat().st_size for one in config.data.train_sets()}
    except (OSError, ValueError):
        return None
    num_bytes = max(sizes[path] / shares[path] for path in sizes) if shares else sum(sizes.values())
    tokens = num_bytes / BYTES_PER_TOKEN * (train.epochs or 1)
    return max(1, math.ceil(tokens / (train.global_batch * train.sequence_length)))


# Changes with which it fits


def _changes(plan: Plan) -> Iterator[Change]:
    """The cheapest changes that fit: single ones first, then pairs, then triples; none that contains an earlier one."""
    single = list(_candidates(plan))
    previous: list[set[str]] = []
    for size in (1, 2, 3):
        for chosen in itertools.combinations(single, size):
            merged = {name: value for candidate in chosen for name, value in candidate.items()}
            # Of a searched setting, and of nodes, a first one that fits is enough, whatever its value.
            names = {
                name if value is _LARGEST or name == "--nodes" else f"{name}={value}" for name, value in merged.items()
            }
            if len(merged) < size or any(smaller <= names for smaller in previous):
                continue
            change = _try(plan, merged)
            if change is not None:
                previous.append(names)
                yield change


def _candidates(plan: Plan) -> Iterator[dict[str, Any]]:
    """Settings to try, the cheapest first: those that cost a little time, then precision, then money."""
    config, train, layout = plan.config, plan.config.train, plan.setup.layout
    if train.micro_batch > 1:
        yield {"train.micro_batch": _LARGEST}
    fewest = "auto" if plan.machines.gpu.is_gpu else "all"
    if train.activation_checkpointing != fewest:
        yield {"train.activation_checkpointing": fewest}
    if layout.base_shard == "gpu" and plan.setup.num_ranks > 1:
        yield {"parallel.base_shard": "node"}
    if plan.machines.num_nodes > 1 and layout.base_shard != "world" and layout.engine != "none":
        yield {"parallel.base_shard": "world"}
    if layout.adapters == "replicate" and plan.machines.gpus_per_node > 1 and layout.engine != "none":
        yield {"parallel.adapters": "shard"}
    if config.model.quant != "nf4":
        if config.model.quant == "none":
            yield {"model.quant": "int8"}
        yield {"model.quant": "nf4"}
    if config.parallel.offload == "none" and layout.engine != "zero3":
        yield {"parallel.offload": "all"}
    if train.sequence_length > LENGTH_STEP:
        yield {"train.sequence_length": _LARGEST}
    for factor in (2, 4, 8):
        yield {"--nodes": plan.machines.num_nodes * factor, "parallel.base_shard": "world"}


def _try(plan: Plan, settings: Mapping[str, Any]) -> Change | None:
    """The change, if the run fits with it; of two searched settings the first is made as small as it can be."""
    nodes = settings.get("--nodes", plan.machines.num_nodes)
    machines, shape = replace(plan.machines, num_nodes=nodes), plan.setup.shape
    tree = plan.config.model_dump(mode="json")
    searched = [name for name in _SEARCHED if settings.get(name) is _LARGEST]
    values = {name: value for name, value in settings.items() if name not in searched}
    values |= dict.fromkeys(searched[:-1], 1)
    for name, value in values.items():
        if name != "--nodes":
            _set(tree, name, value)
    for name in searched[-1:]:
        values[name] = _largest(tree, name, machines, shape)
        if values[name] is None:
            return None
        _set(tree, name, values[name])
    changed = fitting_plan(tree, machines, shape)
    if changed is None:
        return None
    written = tuple(
        f"{name} {values[name]}" if name == "--nodes" else f"{name}={_plain(values[name])}" for name in settings
    )
    step_s = None if changed.speed is None else changed.speed.step_s
    return Change(written, nodes, changed.device_bytes, changed.host_bytes, step_s)


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    section, _, key = name.partition(".")
    tree[section][key] = value


def _largest(tree: Mapping[str, Any], name: str, machines: Machines, shape: Shape) -> int | None:
    """The largest value of a setting of ``_SEARCHED`` with which a config fits, by bisection; None if the least doesn't.

    Memory grows with either; a value that is set and fits is not undercut for not being a multiple of ``LENGTH_STEP``.
    """
    train = tree["train"]
    section, _, key = name.partition(".")
    if key == "micro_batch":
        step, limit = 1, math.ceil(train["global_batch"] / (machines.num_nodes * machines.gpus_per_node))
    else:
        step, limit = min(LENGTH_STEP, shape.context), shape.context

    def fits(value: int) -> bool:
        changed = {**tree, section: {**train, key: value}}
        return fitting_plan(changed, machines, shape) is not None

    low, high = 0, max(1, limit // step)  # in steps: ``low`` fits, or is 0; above ``high`` nothing is tried
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    current = train[key]
    if current > low * step and fits(current):
        return min(int(current), int(limit))
    return low * step or None


def fitting_plan(tree: Mapping[str, Any], machines: Machines, shape: Shape) -> Plan | None:
    """The plan of a config, given as a tree, if it fits; None also if its settings contradict each other. It has no changes."""
    try:
        plan = _plan(Config.model_validate(tree), machines, shape)
    except (ConfigError, ValueError):
        return None
    return plan if plan.fits else None


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# All ways to run on some machines


def sweep(config: Config, candidates: list[Machines], *, shape: Shape | None = None) -> list[Plan]:
    """The Pareto front of memory and speed among all plans that fit, the smallest memory first.

    Varies quantization, ``base_shard``, ``micro_batch`` and recomputation, separately on each of ``candidates``. Where the
    GPU's speed isn't known, all that fit.
    """
    shape = shape or shape_of(config)
    front: list[Plan] = []
    for machines in candidates:
        fitting = [
            plan for tree in _variants(config, machines) if (plan := fitting_plan(tree, machines, shape)) is not None
        ]
        fitting.sort(key=lambda plan: (plan.device_bytes, plan.speed.step_s if plan.speed else ()))
        fastest = math.inf
        for plan in fitting:
            if plan.speed is None:
                front.append(plan)
            elif plan.speed.step_s[0] < fastest:
                fastest = plan.speed.step_s[0]
                front.append(plan)
    return sorted(front, key=lambda plan: plan.device_bytes)


def _variants(config: Config, machines: Machines) -> Iterator[dict[str, Any]]:
    of_rank = math.ceil(config.train.global_batch / (machines.num_nodes * machines.gpus_per_node))
    micros = {min(m, of_rank) for m in (1, 2, 4, 8, config.train.micro_batch)}
    is_alone = machines.num_nodes * machines.gpus_per_node == 1
    shards = ("node",) if is_alone else ("gpu", "node", "world") if machines.num_nodes > 1 else ("gpu", "node")
    for quant, shard, micro, recompute in itertools.product(
        ("none", "int8", "nf4"), shards, sorted(micros), ("auto", "all", "none")
    ):
        tree = config.model_dump(mode="json")
        tree["model"]["quant"], tree["parallel"]["base_shard"] = quant, shard
        tree["train"]["micro_batch"], tree["train"]["activation_checkpointing"] = micro, recompute
        yield tree


def settings_of(plan: Plan) -> tuple[str, ...]:
    """What ``sweep`` varies, as settings to give to a command."""
    config = plan.config
    return (
        f"model.quant={config.model.quant}",
        f"parallel.base_shard={config.parallel.base_shard}",
        f"train.micro_batch={config.train.micro_batch}",
        f"train.activation_checkpointing={_plain(config.train.activation_checkpointing)}",
    )
