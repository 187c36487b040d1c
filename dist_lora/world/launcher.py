"""Which rank of a run this process is, from its launcher's environment variables; needs no torch."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_lora.errors import ConfigError
from dist_lora.text import count
from dist_lora.world.slurm import is_step, rendezvous_of, tasks_per_node


@dataclass(frozen=True)
class LaunchedRank:
    """A rank, as its launcher's environment variables define it.

    ``rendezvous`` is the host and port of the rendezvous, unless the launcher has set MASTER_ADDR and MASTER_PORT.
    """

    world_rank: int
    world_size: int
    local_rank: int
    local_size: int
    rendezvous: tuple[str, int] | None = None


_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def launched_rank(environment: Mapping[str, str]) -> LaunchedRank | None:
    """The rank that a launcher made of this process, or None where there was no launcher.

    Supported: torchrun and ``accelerate launch`` (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), the deepspeed
    launcher (LOCAL_SIZE instead of the last), and bare ``srun`` with one task per rank. The former take precedence over
    srun, which may have started them. A Slurm batch shell or a step of one task is no rank.

    Raises:
        ConfigError: only some of the variables are set, a value is no number, they contradict each other, or srun has
            distributed the tasks unevenly.
    """
    variables = {name: environment[name] for name in _LAUNCHER_VARIABLES if name in environment}
    if variables.keys() <= {"WORLD_SIZE"}:  # which many batch scripts set for whatever srun starts
        task = _task_rank(environment)
        if task is not None and variables.get("WORLD_SIZE", str(task.world_size)) != str(task.world_size):
            raise ConfigError(
                f"WORLD_SIZE: found {variables['WORLD_SIZE']}, but srun started {count(task.world_size, 'task')}; unset it"
            )
        if task is not None or not variables:
            return task
    missing = [name for name in _LAUNCHER_VARIABLES if name not in variables]
    if missing:
        raise ConfigError(
            f"the environment has {', '.join(variables)} but not {', '.join(missing)}: a launcher sets all of them. "
            "Start with torchrun, deepspeed or accelerate launch, or unset them to start local ranks."
        )
    local_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", variables["WORLD_SIZE"]))
    try:
        launched = LaunchedRank(
            int(variables["RANK"]), int(variables["WORLD_SIZE"]), int(variables["LOCAL_RANK"]), int(local_size)
        )
    except ValueError as error:
        raise ConfigError(f"the launcher's variables are not all numbers: {variables}, {local_size!r}") from error
    _check(launched)
    return launched


def is_first_of_node(environment: Mapping[str, str]) -> bool:
    """Whether this process is the first that a launcher started on its node; True where there was no launcher.

    Only some of a launcher's variables, as a shell may have left them, count as no launcher.
    """
    if all(name in environment for name in _LAUNCHER_VARIABLES):
        return environment["LOCAL_RANK"] == "0"
    return not is_step(environment) or environment.get("SLURM_LOCALID", "0") == "0"


def note_for_torchrun(environment: Mapping[str, str], text: str) -> None:
    """Leave an error's text to the torchrun that started this process, which ends with a stack of its own.

    In the format of ``torch.distributed.elastic.multiprocessing.errors`` (torch 2.13): torchrun then shows the text as
    the root cause, below its stack, instead of naming a page about how to see it. Nothing without torchrun.
    """
    path = environment.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    facts = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": facts}}), encoding="utf-8")


def _task_rank(environment: Mapping[str, str]) -> LaunchedRank | None:
    """The rank of a task that srun started as one of several."""
    if not is_step(environment):
        return None
    # SLURM_NTASKS may be the job's; the step's own variable exists in every Slurm since 14.11.
    num_tasks = _number(
        "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS", environment
    )
    if num_tasks == 1:
        return None
    world_rank, local_rank = _number("SLURM_PROCID", environment), _number("SLURM_LOCALID", environment)
    launched = LaunchedRank(
        world_rank, num_tasks, local_rank, _local_size(num_tasks, environment), rendezvous_of(environment)
    )
    _check(launched)
    tasks = [int(rank) for rank in environment.get("SLURM_GTIDS", "").split(",") if rank.isdecimal()]  # of this node
    first = world_rank - local_rank
    if launched.world_rank % launched.local_size != launched.local_rank or (
        tasks and tasks != list(range(first, first + launched.local_size))
    ):
        raise ConfigError(
            f"srun's tasks {', '.join(map(str, tasks or [world_rank]))} on this node are not consecutive: the ranks of a "
            "node must be. Start with srun --distribution=block."
        )
    return launched


def _local_size(num_tasks: int, environment: Mapping[str, str]) -> int:
    """The number of tasks per node, the same on all nodes."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE")
    counts = [_number("SLURM_NTASKS_PER_NODE", environment)] if text is None else tasks_per_node(text)
    if len(set(counts)) > 1:
        raise ConfigError(
            f"srun started {text} tasks on the nodes of this step: every node must run the same number. "
            f"Start with --ntasks-per-node=N, N a divisor of {num_tasks}, on as many nodes as that fills."
        )
    return counts[0]


def _number(name: str, environment: Mapping[str, str]) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ConfigError(
            f"{name}: found {text!r}, expected a number: SLURM_STEP_ID says that srun started this process. "
            "Pass all of the step's SLURM_ variables on to it, or unset SLURM_STEP_ID to start local ranks."
        )
    return int(text)


def _check(launched: LaunchedRank) -> None:
    if not (0 <= launched.world_rank < launched.world_size and 0 <= launched.local_rank < launched.local_size):
        raise ConfigError(
            f"the launcher's variables contradict each other: rank {launched.world_rank} of {launched.world_size}, "
            f"local rank {launched.local_rank} of {launched.local_size}"
        )
