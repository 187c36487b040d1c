"""A job as a user asks for it, and what the plan of its run needs of the machines."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_lora.config.load import load_config
from dist_lora.config.schema import Config, MachineSection
from dist_lora.errors import ConfigError, PlanError
from dist_lora.plan.command import DEFAULT_GPUS_PER_NODE, refuse_what_does_not_fit
from dist_lora.plan.hardware import DEFAULT_GPU, Gpu, find_gpu
from dist_lora.plan.plan import Machines, Plan, make_plan
from dist_lora.text import GIB

Launcher = Literal["srun", "torchrun"]

LOADING_S = 1800.0  # of a job's time limit: for reading the base, on a file system that others use too
SAVE_BYTES_PER_S = 0.5e9  # what a shared file system takes at least
LEAST_NOTICE_S = 120  # Slurm sends a signal up to a minute early or late
MOST_NOTICE_S = 3600
LEAST_IN_SHORT_S = 30  # even of a job of a minute
UNPLANNED_NOTICE_S = 600  # where no plan says how long a step and a save take
HOST_MARGIN = 1.2  # of what the plan needs: the page cache and what else runs on a node
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Request:
    """What is asked for, as typed; ``extra`` are further lines of #SBATCH, without that word.

    What is None of the machines is taken from the configs' section ``machine``.
    """

    configs: tuple[Path, ...]
    overrides: tuple[str, ...]
    python: str
    num_nodes: int | None = None
    gpus_per_node: int | None = None
    gpu: Gpu | None = None
    launcher: Launcher = "srun"
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    mail: str | None = None
    container: str | None = None
    environment: tuple[str, ...] = ()  # NAME=VALUE
    setup: tuple[str, ...] = ()  # lines of bash
    extra: tuple[str, ...] = ()
    cpus_per_gpu: int = 8
    max_stalled: int = 3

    def check(self) -> None:
        """Raise ``ConfigError`` with all that can't be right."""
        faults = [
            f"{name}: found {value}, expected 1 or more"
            for name, value in (
                ("--nodes", self.num_nodes),
                ("--gpus-per-node", self.gpus_per_node),
                ("--cpus-per-gpu", self.cpus_per_gpu),
                ("--max-stalled", self.max_stalled),
            )
            if value is not None and value < 1
        ]
        if not self.configs:
            faults.append("no config is given: expected one, or several for an array of jobs")
        if self.time is not None and not _TIME.fullmatch(self.time):
            faults.append(
                f"--time: found {self.time!r}, expected minutes, hours:minutes:seconds or days-hours, as 36:00:00"
            )
        for pair in self.environment:
            name, equals, _ = pair.partition("=")
            if not equals or not _NAME.fullmatch(name):
                faults.append(f"--env: found {pair!r}, expected NAME=VALUE")
        texts = {"--partition": [self.partition], "--account": [self.account], "--mail": [self.mail]}
        for option, values in {**texts, "--sbatch": self.extra}.items():
            faults += [f"{option}: found {text!r}, expected one line" for text in values if text and "\n" in text]
        if faults:
            raise ConfigError("\n".join(faults))


@dataclass(frozen=True)
class Needs:
    """What a job needs of Slurm by its runs' plans; None where nobody knows.

    ``notice_s``: how long before its end a run must know of it.
    """

    machines: Machines
    host_gib: int | None
    minutes: int | None
    notice_s: int
    lines: tuple[str, ...]  # what the plans say, for the script's head


def runs_of(request: Request) -> list[Config]:
    """The configs, with the overrides in each.

    Raises:
        ConfigError: one is wrong, or two of an array write the same run.
    """
    request.check()
    loaded = [load_config(path, overrides=request.overrides) for path in request.configs]
    taken: dict[Path, Path] = {}
    for path, config in zip(request.configs, loaded, strict=True):
        folder = config.runs_dir / config.run
        if folder in taken:
            raise ConfigError(f"run: {taken[folder]} and {path} both write {folder}; give each its own name")
        taken[folder] = path
    return loaded


def needs_of(request: Request, runs: list[Config]) -> Needs:
    """What the runs need at most.

    Raises:
        PlanError: one does not fit the machines.
        ConfigError: its settings contradict the machines.
    """
    machines = _machines(request, [config.machine for config in runs])
    plans: dict[str, Plan] = {}
    lines = []
    for config in runs:
        try:
            plan = make_plan(config, machines)
        except ConfigError as error:
            if config.model.shape is not None or "its sizes lie on the hub" not in str(error):
                raise
            lines.append(f"{config.run}: not planned, since the sizes of {config.model.name} lie on the hub")
            continue
        _refuse(plan)
        plans[config.run] = plan
        lines.append(_line(plan))
    if len(plans) < len(runs):
        return Needs(machines, None, None, _within(request.time, UNPLANNED_NOTICE_S), tuple(lines))
    return Needs(
        machines,
        math.ceil(max(plan.host_bytes for plan in plans.values()) * HOST_MARGIN / GIB),
        _minutes(plans),
        _within(request.time, max(map(_notice_s, plans.values()))),
        tuple(lines),
    )


def _machines(request: Request, sections: Sequence[MachineSection]) -> Machines:
    """The machines of a job: as typed, else as its configs name them.

    Raises:
        ConfigError: nobody says how many nodes, the configs name different machines, or a GPU that is not known.
    """
    named = {
        "--nodes": ("machine.nodes", request.num_nodes, {each.nodes for each in sections}),
        "--gpus-per-node": ("machine.gpus_per_node", request.gpus_per_node, {each.gpus_per_node for each in sections}),
        "--gpu": ("machine.gpu", request.gpu, {each.gpu for each in sections}),
    }
    for option, (setting, typed, told) in named.items():
        if typed is None and len(told) > 1:
            values = ", ".join(sorted(map(str, told)))
            raise ConfigError(f"{setting}: the configs of one job name {values}; say one for all of them with {option}")
    num_nodes = request.num_nodes or sections[0].nodes
    if num_nodes is None:
        raise ConfigError(
            "--nodes: not given, and machine.nodes of the config is not set; expected how many nodes to ask for"
        )
    return Machines(
        num_nodes,
        request.gpus_per_node or sections[0].gpus_per_node or DEFAULT_GPUS_PER_NODE,
        request.gpu or find_gpu(sections[0].gpu or DEFAULT_GPU),
    )


def _within(time: str | None, notice_s: int) -> int:
    """A quarter of a time limit at most: Slurm would ask a short job to stop before it has begun."""
    if time is None:
        return notice_s
    days, has_days, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not has_days and len(parts) < 3:  # minutes, or minutes:seconds
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    limit_s = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return min(notice_s, max(LEAST_IN_SHORT_S, limit_s // 4))


def _refuse(plan: Plan) -> None:
    try:
        refuse_what_does_not_fit(plan)
    except PlanError as error:
        changes = "; or ".join(map(str, plan.changes))
        raise PlanError(f"{plan.config.run}: {error}" + (f". It would fit with {changes}" if changes else "")) from None


def _line(plan: Plan) -> str:
    low, high = plan.speed.step_s
    steps = "steps as many as the data has" if plan.steps is None else f"{plan.steps:,} steps"
    return (
        f"{plan.config.run}: {plan.config.model.name}, {plan.device_bytes / GIB:.1f} of "
        f"{plan.machines.gpu.memory_bytes / GIB:.1f} GiB of a GPU, a step {low:.3g} to {high:.3g} s, {steps}"
    )


def _minutes(plans: Mapping[str, Plan]) -> int | None:
    """Of a run that is as slow as the plan holds possible, to the next quarter of an hour."""
    seconds = [plan.steps * plan.speed.step_s[1] for plan in plans.values() if plan.steps is not None]
    if len(seconds) < len(plans):
        return None
    return 15 * math.ceil((max(seconds) + LOADING_S) / 900)


def _notice_s(plan: Plan) -> int:
    """A step and a save, twice over; to the next ten seconds."""
    needed_s = 2 * (plan.speed.step_s[1] + plan.memory.disk / SAVE_BYTES_PER_S) + LEAST_NOTICE_S
    return min(MOST_NOTICE_S, 10 * math.ceil(needed_s / 10))
