"""One rank from start to end: join, work, and on any failure all ranks end and one error is reported."""

from __future__ import annotations

import contextlib
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
from dist_lora.engines.precision import set_products
from dist_lora.errors import EXIT_FAILED, DistLoraError, OutOfMemory, RankError, StoppedOnRequest, exit_code_of
from dist_lora.supervision.hang import HangWatch, collective_timeout_s
from dist_lora.supervision.local_ranks import EXIT_LOST_PEER, note_lost_peer
from dist_lora.supervision.out_of_memory import out_of_memory
from dist_lora.text import without_cpp_stack
from dist_lora.world.launcher import LaunchedRank
from dist_lora.world.world import World, join

PEER_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|timed out waiting|socket|nccl", re.IGNORECASE)
CAUSE_S = 3.0  # how long a rank that lost another waits to learn why
PR_SET_PDEATHSIG = 1


@contextmanager
def joined(
    launched: LaunchedRank | None,
    config: Config,
    *,
    report: Callable[[BaseException, str], None],
    raises_alone: bool = False,
) -> Iterator[World]:
    """The world of this rank (alone where ``launched`` is None), for the work inside the ``with``.

    The first rank to fail reports its error, and the others end silently. A single process ends by ``SystemExit`` with
    the error's exit code; a rank of several exits at once, since a process group with a lost peer may hang while it is
    destroyed.

    Args:
        report: shows the user an error and the rank that raised it: "" where no rank needs to be named.
        raises_alone: a single process raises its error, for whoever called it, in place of ``SystemExit``.

    Raises:
        SystemExit: the work failed, or was stopped on request.
    """
    _end_with_parent(launched)
    world: World | None = None
    watch: HangWatch | None = None
    try:
        world = _enter(launched, config)
        watch = HangWatch(world, timeout_s=config.parallel.hang_timeout, report=lambda error: report(error, ""))
        world.watches.append(watch)
        watch.start()
        yield world
    except StoppedOnRequest as error:
        assert world is not None
        if world.is_first:
            report(error, "")
        world.leave()
        _close(world)
        sys.exit(error.exit_code)
    except BaseException as error:  # whatever it is, the other ranks must learn of it
        if watch is not None:
            watch.stop()
        where = "" if world is None else world.progress.where(error)
        reported = _as_reported(error, world, config)
        code = _fail(launched, world, watch, reported, where, report)
        _close(world)
        if launched is None or launched.world_size == 1:
            if world is not None:
                world.leave()
            if raises_alone and isinstance(error, Exception):
                if reported is error:
                    raise
                raise reported from error
            sys.exit(code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    world.leave()


def _close(world: World | None) -> None:
    """Close what the work left open, once its error is told: to the user, and to the ranks that would wait for this one."""
    if world is not None:
        with contextlib.suppress(BaseException):  # also of a signal by which a launcher ends the wait
            world.closing.close()


def _enter(launched: LaunchedRank | None, config: Config) -> World:
    """The world of this rank; a single process has a process group only where its engine needs one."""
    section = config.parallel
    set_products(is_deterministic=config.train.deterministic)
    if launched is None or launched.world_size == 1:
        if section.engine not in ("fsdp2", "zero3"):
            return World.alone()
        launched = LaunchedRank(0, 1, 0, 1)
    timeout_s = collective_timeout_s(section.hang_timeout)
    return join(
        launched,
        os.environ,
        collective_timeout_s=timeout_s,
        join_timeout_s=section.join_timeout,
        node_size=section.node_size,
        settings=flat(config.model_dump(mode="json")),
    )


def _as_reported(error: BaseException, world: World | None, config: Config) -> BaseException:
    """The error as the user reads it: out of memory isn't an internal error."""
    no_memory = out_of_memory(error, world=world, config=config)
    return error if no_memory is None else no_memory.with_traceback(error.__traceback__)


def _fail(
    launched: LaunchedRank | None,
    world: World | None,
    watch: HangWatch | None,
    error: BaseException,
    where: str,
    report: Callable[[BaseException, str], None],
) -> int:
    """Report the error to the user or the other ranks, as is this rank's part; returns its exit code."""
    code = exit_code_of(error)
    if world is None:
        if not isinstance(error, RankError):
            report(error, _who(launched, ""))
        return code
    # Our own errors say where they come from.
    phase = "" if isinstance(error, DistLoraError) and not isinstance(error, OutOfMemory) else where
    if isinstance(error, RankError):
        return code  # another rank has reported it
    if isinstance(error, RuntimeError) and not isinstance(error, DistLoraError) and PEER_GONE.search(str(error)):
        deadline = time.monotonic() + CAUSE_S
        while time.monotonic() < deadline:
            failure = world.failure_elsewhere()
            if failure is not None:
                return int(failure["exit_code"])
            time.sleep(0.05)
        cause = without_cpp_stack(str(error))
        if note_lost_peer(os.environ, world.world_rank, cause):
            return EXIT_LOST_PEER  # our parent sees which rank ended, and reports it
        gone = watch.gone() if watch is not None else ""
        error = RankError(f"rank {world.world_rank} lost another rank: {gone}{cause}")
        phase = ""
    if world.fail(error):
        report(error, _who(launched, phase))
    return code


def _who(launched: LaunchedRank | None, phase: str) -> str:
    """This rank, its host and its phase, for an error; without a phase rank 0 reports on behalf of all ranks."""
    rank = ""
    if launched is not None and launched.world_size > 1 and (launched.world_rank > 0 or phase):
        rank = f"rank {launched.world_rank} of {launched.world_size} on {socket.gethostname()}"
    return ", ".join(filter(None, (rank, phase)))


def _end_with_parent(launched: LaunchedRank | None) -> None:
    """Have the kernel send this rank SIGTERM when the launcher that started it is gone (Linux).

    torchrun gives each worker its own session, so whatever kills the launcher leaves its workers running.
    """
    if launched is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = os.environ.get("DIST_LORA_PARENT")
    if parent is not None and os.getppid() != int(parent):
        sys.exit(EXIT_FAILED)
