"""How far the clocks of the nodes are apart, measured through the store."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

from dist_lora.world.world import World

ROUNDS = 5


@dataclass(frozen=True)
class Offset:
    """How far the clock of a node is ahead of the first node's; ``doubt_s`` is half of the fastest round trip."""

    host: str
    seconds: float
    doubt_s: float


def clock_offsets(
    world: World, *, within_s: float, clock: Callable[[], float] = time.time, host: str | None = None
) -> list[Offset]:
    """The offset of each node but the first, on rank 0; all ranks call it, and one per node takes part.

    Raises:
        RuntimeError: a node didn't answer within ``within_s``.
    """
    first_of_others = range(world.local_size, world.world_size, world.local_size)
    limit = timedelta(seconds=within_s)
    if world.is_first:
        offsets = []
        for rank in first_of_others:
            for turn in range(ROUNDS):
                world.store.wait([f"clock/ask/{rank}/{turn}"], limit)
                world.share(f"clock/answer/{rank}/{turn}", repr(clock()).encode())
            world.store.wait([f"clock/offset/{rank}"], limit)
            offsets.append(Offset(**json.loads(world.store.get(f"clock/offset/{rank}"))))
        return offsets
    if world.world_rank not in first_of_others:
        return []
    measured = []
    for turn in range(ROUNDS):
        started_s = clock()
        world.share(f"clock/ask/{world.world_rank}/{turn}", b"1")
        answer = f"clock/answer/{world.world_rank}/{turn}"
        world.store.wait([answer], limit)
        ended_s = clock()
        theirs_s = float(world.store.get(answer))
        measured.append(((ended_s - started_s) / 2, (started_s + ended_s) / 2 - theirs_s))
    doubt_s, seconds = min(measured)
    offset = Offset(host or socket.gethostname(), seconds, doubt_s)
    world.share(f"clock/offset/{world.world_rank}", json.dumps(asdict(offset)).encode())
    return []
