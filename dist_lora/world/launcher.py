"""Which process of a run this is, as its launcher says; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_lora.errors import ConfigError
from dist_lora.world.slurm import is_step, rendezvous_of, tasks_per_node


@dataclass(frozen=True)
class Place:
    """Which process this is, as its launcher says.

    ``rendezvous`` is host and port where all meet, if the launcher hasn't left them in MASTER_ADDR and MASTER_PORT.
    """

    world_rank: int
    world_size: int
    local_rank: int
    local_size: int
    rendezvous: tuple[str, int] | None = None


_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def place_from_environment(environment: Mapping[str, str]) -> Place | None:
    """This process's place in the world that a launcher made, or None where none did.

    Understood: torchrun and ``accelerate launch`` (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), the deepspeed
    launcher (LOCAL_SIZE in place of the last), and bare ``srun`` with a task a rank. The former stand above srun, which
    may have started them. Neither a SLURM batch shell nor a step of one task is a world.

    Raises:
        ConfigError: a part of the set is there and another part is not, a value is no number, they contradict each
            other, or srun has spread the tasks unevenly.
    """
    found = {name: environment[name] for name in _OF_A_LAUNCHER if name in environment}
    if found.keys() <= {"WORLD_SIZE"}:  # which many a batch script sets for whatever srun starts
        task = _place_of_task(environment)
        if task is not None and found.get("WORLD_SIZE", str(task.world_size)) != str(task.world_size):
            raise ConfigError(
                f"WORLD_SIZE: found {found['WORLD_SIZE']}, and srun has started {task.world_size} tasks; unset it"
            )
        if task is not None or not found:
            return task
    lacking = [name for name in _OF_A_LAUNCHER if name not in found]
    if lacking:
        raise ConfigError(
            f"the environment has {', '.join(found)} but not {', '.join(lacking)}: a launcher sets all of them. "
            "Start by torchrun, deepspeed or accelerate launch, or unset them to start local ranks."
        )
    local_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", found["WORLD_SIZE"]))
    try:
        place = Place(int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"]), int(local_size))
    except ValueError as error:
        raise ConfigError(f"the launcher's variables are not all numbers: {found}, {local_size!r}") from error
    _check(place)
    return place


def is_first_of_node(environment: Mapping[str, str]) -> bool:
    """Whether this process speaks for its node, of those that a launcher has started there; True where none has.

    A part of a launcher's variables, as a shell may have left, makes nobody silent.
    """
    if all(name in environment for name in _OF_A_LAUNCHER):
        return environment["LOCAL_RANK"] == "0"
    return not is_step(environment) or environment.get("SLURM_LOCALID", "0") == "0"


def _place_of_task(environment: Mapping[str, str]) -> Place | None:
    """The place of a task that srun started beside others."""
    if not is_step(environment):
        return None
    # SLURM_NTASKS may be the job's; that of the step is there in every Slurm since 14.11.
    num_tasks = _number(
        "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS", environment
    )
    if num_tasks == 1:
        return None
    world_rank, local_rank = _number("SLURM_PROCID", environment), _number("SLURM_LOCALID", environment)
    place = Place(world_rank, num_tasks, local_rank, _local_size(num_tasks, environment), rendezvous_of(environment))
    _check(place)
    here = [int(rank) for rank in environment.get("SLURM_GTIDS", "").split(",") if rank.isdecimal()]
    first = world_rank - local_rank
    if place.world_rank % place.local_size != place.local_rank or (
        here and here != list(range(first, first + place.local_size))
    ):
        raise ConfigError(
            f"srun's tasks {', '.join(map(str, here or [world_rank]))} are on this node, which are not neighbours: "
            "the ranks of a node must follow each other. Start with srun --distribution=block."
        )
    return place


def _local_size(num_tasks: int, environment: Mapping[str, str]) -> int:
    """The tasks of a node, which all nodes have."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE")
    counts = [_number("SLURM_NTASKS_PER_NODE", environment)] if text is None else tasks_per_node(text)
    if len(set(counts)) > 1:
        raise ConfigError(
            f"srun has started {text} tasks on the nodes of this step: every node must hold the same number. "
            f"Start with --ntasks-per-node=N, N a divisor of {num_tasks}, on as many nodes as that fills."
        )
    return counts[0]


def _number(name: str, environment: Mapping[str, str]) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ConfigError(
            f"{name}: found {text!r}, expected a number: SLURM_STEP_ID says that srun started this process. "
            "Let all of the step's SLURM_ variables through to it, or unset SLURM_STEP_ID to start local ranks."
        )
    return int(text)


def _check(place: Place) -> None:
    if not (0 <= place.world_rank < place.world_size and 0 <= place.local_rank < place.local_size):
        raise ConfigError(
            f"the launcher's variables contradict each other: rank {place.world_rank} of {place.world_size}, "
            f"local rank {place.local_rank} of {place.local_size}"
        )
