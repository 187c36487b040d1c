"""One rank from its start to its end: join, work, and whatever happens, all ranks end and one error is told."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dist_lora.config.changes import flat
from dist_lora.config.schema import Config
from dist_lora.errors import EXIT_FAILED, DistLoraError, OutOfMemory, RankError, StopNow, StoppedOnRequest
from dist_lora.supervision.hang import HangWatch, collective_timeout_s
from dist_lora.supervision.local_ranks import EXIT_LOST_PEER, leave_word
from dist_lora.supervision.out_of_memory import out_of_memory
from dist_lora.world.launcher import Place
from dist_lora.world.world import World, join

PEER_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|timed out waiting|socket|nccl", re.IGNORECASE)
BLAME_S = 3.0  # how long a rank that lost another waits to hear why
PR_SET_PDEATHSIG = 1


@contextmanager
def joined(place: Place | None, config: Config, *, report: Callable[[BaseException, str], None]) -> Iterator[World]:
    """The world that ``place`` belongs to (alone where it is None), for the work of ``with``.

    The first rank to fail reports its error, and the others end without a word. A process that is alone ends by
    ``SystemExit`` with the error's exit code; a rank of several ends at once, since a process group with a lost peer may
    hang on its way out.

    Args:
        report: tells the user of an error, and which rank's it is: "" where that goes without saying.

    Raises:
        SystemExit: the work failed, or was stopped on request.
    """
    _end_with_parent(place)
    world: World | None = None
    watch: HangWatch | None = None
    try:
        world = _enter(place, config)
        watch = HangWatch(world, timeout_s=config.parallel.hang_timeout, tell=lambda error: report(error, ""))
        world.watches.append(watch)
        watch.start()
        yield world
    except StoppedOnRequest as error:
        assert world is not None
        if world.is_first:
            report(error, "")
        world.leave()
        sys.exit(error.exit_code)
    except BaseException as error:  # whatever it is, the other ranks must hear of it
        if watch is not None:
            watch.stop()
        where = "" if world is None else world.progress.where(error)
        code = _fail(place, world, watch, _as_told(error, world, config), where, report)
        if place is None or place.world_size == 1:
            if world is not None:
                world.leave()
            sys.exit(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    world.leave()


def _enter(place: Place | None, config: Config) -> World:
    """The world of this rank; one process has a process group only where its engine works by one."""
    section = config.parallel
    if place is None or place.world_size == 1:
        if section.engine not in ("fsdp2", "zero3") and section.offload not in ("base", "all"):
            return World.alone()
        place = Place(0, 1, 0, 1)
    timeout_s = collective_timeout_s(section.hang_timeout)
    return join(
        place,
        os.environ,
        collective_timeout_s=timeout_s,
        join_timeout_s=section.join_timeout,
        node_size=section.node_size,
        settings=flat(config.model_dump(mode="json")),
    )


def _as_told(error: BaseException, world: World | None, config: Config) -> BaseException:
    """The error as the user shall read it: memory that ran out is none of our faults."""
    refused = out_of_memory(error, world=world, config=config)
    return error if refused is None else refused.with_traceback(error.__traceback__)


def _fail(
    place: Place | None,
    world: World | None,
    watch: HangWatch | None,
    error: BaseException,
    where: str,
    report: Callable[[BaseException, str], None],
) -> int:
    """Tell the user or the other ranks, whichever is this rank's part; returns its exit code."""
    code = error.exit_code if isinstance(error, DistLoraError | StopNow) else EXIT_FAILED
    if world is None:
        if not isinstance(error, RankError):
            report(error, _who(place, ""))
        return code
    # Our own errors say themselves where they come from.
    phase = "" if isinstance(error, DistLoraError) and not isinstance(error, OutOfMemory) else where
    if isinstance(error, RankError):
        return code  # another rank has told
    if isinstance(error, RuntimeError) and not isinstance(error, DistLoraError) and PEER_GONE.search(str(error)):
        deadline = time.monotonic() + BLAME_S
        while time.monotonic() < deadline:
            told = world.failure_elsewhere()
            if told is not None:
                return int(told["exit_code"])
            time.sleep(0.05)
        if leave_word(os.environ, world.world_rank, str(error)):
            return EXIT_LOST_PEER  # our parent sees which rank ended, and tells
        gone = watch.gone() if watch is not None else ""
        error = RankError(f"rank {world.world_rank} lost another rank: {gone}{error}")
        phase = ""
    if world.fail(error):
        report(error, _who(place, phase))
    return code


def _who(place: Place | None, phase: str) -> str:
    """Which rank this is, where, and at what; the first rank speaks for all, unless it tells of itself at a phase."""
    rank = ""
    if place is not None and place.world_size > 1 and (place.world_rank > 0 or phase):
        rank = f"rank {place.world_rank} of {place.world_size} on {socket.gethostname()}"
    return ", ".join(filter(None, (rank, phase)))


def _end_with_parent(place: Place | None) -> None:
    """Have the kernel ask this rank to stop when the launcher that started it is gone (Linux).

    torchrun gives each worker a session of its own, so that what kills the launcher leaves its workers at work.
    """
    if place is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = os.environ.get("DIST_LORA_PARENT")
    if parent is not None and os.getppid() != int(parent):
        sys.exit(EXIT_FAILED)
