"""A job as the user requests it, and the resources it needs according to the plans of its runs."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_lora.config.load import load_config
from dist_lora.config.schema import Config
from dist_lora.errors import ConfigError, PlanError
from dist_lora.lora.planned import with_adapter
from dist_lora.plan.command import check_fits, default_gpus_per_node
from dist_lora.plan.hardware import DEFAULT_GPU, Gpu, find_gpu
from dist_lora.plan.plan import Machines, Plan, make_plan
from dist_lora.slurm.options import faults_of, value_of
from dist_lora.text import GIB, count, time_range

Launcher = Literal["srun", "torchrun"]

LOADING_S = 1800.0  # of a job's time limit, for reading the base from a shared file system
SAVE_BYTES_PER_S = 0.5e9  # lower bound for a shared file system
MIN_NOTICE_S = 120  # Slurm sends a signal up to a minute early or late
MAX_NOTICE_S = 3600
MIN_NOTICE_OF_SHORT_JOBS_S = 30  # even for a job of a minute
UNPLANNED_NOTICE_S = 600  # without a plan, so without times of a step and a save
HOST_MARGIN = 1.2  # times the plan's host memory: the page cache and other processes of a node
# And for each rank on a GPU what CUDA's libraries and NCCL map and pin, by others' reports; not measured here.
CUDA_HOST_BYTES = 4 * GIB
_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")
# GPUs of a whole node, where it is usual to rent and to buy them so: HGX boards have 8, a tray of NVL72 has 4.
GPUS_OF_A_NODE = {"gb200-186gb": 4, "gb300-279gb": 4}
USUAL_GPUS_OF_A_NODE = 8
_TYPE = re.compile(r"[A-Za-z0-9][\w.-]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Request:
    """The options as typed; ``extra`` are further #SBATCH options, ``setup`` commands of bash.

    ``gpu_type`` is the GPU's name in this Slurm; ``is_exclusive`` whether the job takes whole nodes, None to decide by the
    number of GPUs; ``binds`` are paths that a container sees too, besides those that the configs name.

    Machine options that are None are taken from the configs' section ``machine``.
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
    setup: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    cpus_per_gpu: int = 8
    max_stalled: int = 3
    gpu_type: str | None = None
    is_exclusive: bool | None = None
    binds: tuple[Path, ...] = ()

    @property
    def time_limit(self) -> str | None:
        """The time limit, by its own option or one of ``extra``."""
        return self.time or value_of(self.extra, "time")

    def check(self) -> None:
        """Raise ``ConfigError`` listing all invalid options."""
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
        if self.time_limit is not None and not _TIME.fullmatch(self.time_limit):
            faults.append(
                f"--time: found {self.time_limit!r}, expected minutes, hours:minutes:seconds or days-hours, like 36:00:00"
            )
        for pair in self.environment:
            name, equals, _ = pair.partition("=")
            if not equals or not _NAME.fullmatch(name):
                faults.append(f"--env: found {pair!r}, expected NAME=VALUE")
        one_liners = {"--partition": [self.partition], "--account": [self.account], "--mail": [self.mail]}
        for option, values in {**one_liners, "--sbatch": self.extra}.items():
            faults += [f"{option}: found {text!r}, expected one line" for text in values if text and "\n" in text]
        if self.gpu_type is not None and not _TYPE.fullmatch(self.gpu_type):
            faults.append(
                f"--gpu-type: found {self.gpu_type!r}, expected a type as in sinfo's gres, like h100 of gpu:h100:8"
            )
        if self.binds and self.container is None:
            faults.append("--bind: there is no --container to bind it in")
        faults += [*faults_of(self.extra, self._typed()), *_unreadable(self.setup)]
        if faults:
            raise ConfigError("\n".join(faults))

    def _typed(self) -> dict[str, str | None]:
        """By the name of the option of sbatch that it sets: the option that was typed, or None."""
        return {
            "time": "--time" if self.time else None,
            "partition": "--partition" if self.partition else None,
            "account": "--account" if self.account else None,
            "mail-user": "--mail" if self.mail else None,
            "gpus-per-node": "--gpu-type" if self.gpu_type else None,
            "exclusive": None
            if self.is_exclusive is None
            else "--exclusive"
            if self.is_exclusive
            else "--no-exclusive",
        }


def _unreadable(setup: Sequence[str]) -> Iterator[str]:
    """What bash can't read as a whole command: it would make the whole script a syntax error."""
    bash = shutil.which("bash")
    for line in setup if bash else ():
        done = subprocess.run(
            [bash or "", "-n"], input=f"{{\n{line}\n}}\n", capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = done.stderr.strip().partition("\n")[0]
            yield f"--setup: found {line!r}, expected a whole command of bash, which says: {reason}"


@dataclass(frozen=True)
class Needs:
    """The resources that a job requests, from its runs' plans; None if unknown.

    ``notice_s``: how long before the time limit a run must be signalled.
    """

    machines: Machines
    host_gib: int | None
    minutes: int | None
    notice_s: int
    lines: tuple[str, ...]  # summaries of the plans, for comments in the script
    is_exclusive: bool  # whole nodes


def runs_of(request: Request) -> list[Config]:
    """The configs, each with the overrides.

    Raises:
        ConfigError: one is wrong, or two of an array have the same run folder.
    """
    request.check()
    loaded = [load_config(path, overrides=request.overrides) for path in request.configs]
    config_of: dict[Path, Path] = {}
    for path, config in zip(request.configs, loaded, strict=True):
        folder = config.runs_dir / config.run
        if folder in config_of:
            raise ConfigError(f"run: {config_of[folder]} and {path} both write to {folder}; give each run its own name")
        config_of[folder] = path
    return loaded


def needs_of(request: Request, runs: list[Config]) -> Needs:
    """The maximum needs of all runs.

    Raises:
        PlanError: a run doesn't fit the machines.
        ConfigError: its settings contradict the machines.
    """
    machines = _machines(request, runs)
    is_exclusive = _is_exclusive(request, machines)
    plans: dict[str, Plan] = {}
    lines = [f"Planned for {machines}{'' if not machines.assumed else f', {machines.assumed}'}"]
    for config in runs:
        try:
            plan = make_plan(with_adapter(config), machines)
        except ConfigError as error:
            if config.model.shape is not None or "its sizes are on the hub" not in str(error):
                raise
            lines.append(f"{config.run}: not planned, since the sizes of {config.model.name} are on the hub")
            continue
        _check_fits(plan)
        plans[config.run] = plan
        lines.append(_line(plan))
    if len(plans) < len(runs):
        return Needs(machines, None, None, _within(request.time_limit, UNPLANNED_NOTICE_S), tuple(lines), is_exclusive)
    return Needs(
        machines,
        math.ceil(max(plan.host_bytes * HOST_MARGIN + _cuda_bytes(plan) for plan in plans.values()) / GIB),
        _minutes(plans),
        _within(request.time_limit, max(map(_notice_s, plans.values()))),
        tuple(lines),
        is_exclusive,
    )


def _is_exclusive(request: Request, machines: Machines) -> bool:
    """Whether the job takes whole nodes: as typed, else if its GPUs are as many as nodes with that type usually have."""
    if request.is_exclusive is not None:
        return request.is_exclusive
    return machines.gpus_per_node >= GPUS_OF_A_NODE.get(machines.gpu.name, USUAL_GPUS_OF_A_NODE)


def _machines(request: Request, runs: Sequence[Config]) -> Machines:
    """The machines of a job: as typed, else from its configs.

    Raises:
        ConfigError: the number of nodes is missing, the configs name different machines, or the GPU is unknown.
    """
    sections = [config.machine for config in runs]
    named: dict[str, tuple[str, object, set[Any]]] = {
        "--nodes": ("machine.nodes", request.num_nodes, {section.nodes for section in sections}),
        "--gpus-per-node": (
            "machine.gpus_per_node",
            request.gpus_per_node,
            {config.machine.gpus_per_node or default_gpus_per_node(config) for config in runs},
        ),
        "--gpu": ("machine.gpu", request.gpu, {section.gpu for section in sections}),
    }
    for option, (setting, typed, configured) in named.items():
        if typed is None and len(configured) > 1:
            values = ", ".join(sorted(map(str, configured)))
            raise ConfigError(f"{setting}: the configs of one job have {values}; set one for all of them with {option}")
    num_nodes = request.num_nodes or sections[0].nodes
    if num_nodes is None:
        raise ConfigError("--nodes: not given, and machine.nodes of the config isn't set; expected the number of nodes")
    is_assumed = request.gpu is None and sections[0].gpu is None
    return Machines(
        num_nodes,
        request.gpus_per_node or sections[0].gpus_per_node or default_gpus_per_node(runs[0]),
        request.gpu or find_gpu(sections[0].gpu or DEFAULT_GPU, given_by="machine.gpu"),
        assumed="a type of GPU that nobody named: give --gpu, or machine.gpu in the config" if is_assumed else "",
    )


def _within(time: str | None, notice_s: int) -> int:
    """``notice_s``, but at most a quarter of the time limit: a short job would be signalled before it has begun."""
    if time is None:
        return notice_s
    days, has_days, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not has_days and len(parts) < 3:  # minutes, or minutes:seconds
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    limit_s = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return min(notice_s, max(MIN_NOTICE_OF_SHORT_JOBS_S, limit_s // 4))


def _check_fits(plan: Plan) -> None:
    try:
        check_fits(plan)
    except PlanError as error:
        changes = "; or ".join(map(str, plan.changes))
        raise PlanError(f"{plan.config.run}: {error}" + (f". It would fit with {changes}" if changes else "")) from None


def _line(plan: Plan) -> str:
    steps = "number of steps depends on the data" if plan.steps is None else count(plan.steps, "step")
    tight = " (tight)" * plan.is_tight
    return (
        f"{plan.config.run}: {plan.config.model.name}, {plan.device_bytes / GIB:.1f} of "
        f"{plan.machines.gpu.memory_bytes / GIB:.1f} GiB per GPU{tight}, "
        f"{time_range(*_step_s(plan))} per step, {steps}"
    )


def _step_s(plan: Plan) -> tuple[float, float]:
    assert plan.speed is not None, f"{plan.machines.gpu.name} is in the table, with its speed"
    return plan.speed.step_s


def _minutes(plans: Mapping[str, Plan]) -> int | None:
    """Minutes that the slowest run takes at worst, rounded up to a quarter of an hour; None if unknown."""
    seconds = [plan.steps * _step_s(plan)[1] for plan in plans.values() if plan.steps is not None]
    if len(seconds) < len(plans):
        return None
    return 15 * math.ceil((max(seconds) + LOADING_S) / 900)


def _cuda_bytes(plan: Plan) -> int:
    return plan.machines.gpus_per_node * CUDA_HOST_BYTES if plan.machines.gpu.is_gpu else 0


def _notice_s(plan: Plan) -> int:
    """Twice the time of a step and a save, and Slurm's tolerance, rounded up to ten seconds."""
    needed_s = 2 * (_step_s(plan)[1] + plan.memory.disk / SAVE_BYTES_PER_S) + MIN_NOTICE_S
    return min(MAX_NOTICE_S, 10 * math.ceil(needed_s / 10))
