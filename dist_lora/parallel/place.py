"""Which process of a run this is, as its launcher says; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_lora.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Which process this is, as its launcher says."""

    world_rank: int
    world_size: int
    local_rank: int
    local_size: int


def place_from_environment(environment: Mapping[str, str]) -> Place | None:
    """This process's place in the world that a launcher made, or None where none did.

    Understood: torchrun and ``accelerate launch`` (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE) and
    the deepspeed launcher (LOCAL_SIZE in place of the last). Variables of a SLURM batch shell alone do not count.

    Raises:
        ConfigError: a part of the set is there and another part is not, or a value is no number.
    """
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: environment[name] for name in needed if name in environment}
    if not found:
        return None
    lacking = [name for name in needed if name not in found]
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
    if not (0 <= place.world_rank < place.world_size and 0 <= place.local_rank < place.local_size):
        raise ConfigError(
            f"the launcher's variables contradict each other: rank {place.world_rank} of {place.world_size}, "
            f"local rank {place.local_rank} of {place.local_size}"
        )
    return place
