"""What asks a run to stop: noticed at once on one rank, obeyed by all at the same place between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from dist_lora.checkpoint.saver import Saver
from dist_lora.errors import ConfigError, StopNow, StoppedForGood, StoppedOnRequest
from dist_lora.world.world import World

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
END_VARIABLE = "SLURM_JOB_END_TIME"  # seconds since 1970, set in every job since Slurm 22.05
STOP_FILE = "STOP"
MARGIN_S = 5.0  # beyond what a step and a save took at most: for the other ranks, and for the way out


class StopRequest:
    """Whether this rank was asked to stop, from ``with`` to its end.

    While ``noted`` a request waits for the loop, which saves; a second one changes nothing. Before and after, there is
    nothing to save: a signal raises ``StopNow`` wherever this rank is, until all is ``over``.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._signal_name = ""
        self._is_noted = self._is_over = False
        self._file: Path | None = None
        self._end_s = _end_of_job(environment)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in ASKING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # Who was asked goes: a launcher that asks again while this rank takes its leave is not to kill it.
            signal.signal(number, signal.SIG_IGN if self._signal_name else handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._is_over:
            return
        is_first, self._signal_name = not self._signal_name, signal.Signals(number).name
        if is_first and not self._is_noted:
            raise StopNow(
                f"stopped on {self._signal_name}'s request, not within a step: nothing is lost, "
                "and the same command goes on."
            )

    @contextmanager
    def noted(self, folder: Path | None = None) -> Iterator[None]:
        """Only note requests meanwhile: the loop asks for the ``reason``. ``folder``: where a file STOP is looked for."""
        self._is_noted, self._file = True, folder / STOP_FILE if folder is not None else None
        try:
            yield
        finally:
            self._is_noted = False

    def reason(self, *, needed_s: float) -> str:
        """What asks this rank to stop, in words; "" where nothing does.

        Args:
            needed_s: how long what would come before the next time it is asked takes at most, a save included.
        """
        if self._signal_name:
            return f"{self._signal_name}'s request"
        if self._file is not None and self._file.exists():
            return f"the request of {self._file}"
        if self._end_s is not None and time.time() + needed_s + MARGIN_S > self._end_s:
            end = time.strftime("%H:%M:%S", time.localtime(self._end_s))
            return f"account of the job's end at {end} ({END_VARIABLE})"
        return ""

    def over(self) -> None:
        """Mind no further request: all is saved, or done, and this rank takes its leave."""
        self._is_over = True

    def obeyed(self) -> bool:
        """Take the file STOP away, since it has been obeyed and the same command is to go on; whether there was one."""
        self.over()
        if self._file is None:
            return False
        with contextlib.suppress(OSError):
            self._file.unlink()
            return True
        return False


class Stopping:
    """How all ranks stop where any is asked to: after a save, with one reason on all."""

    def __init__(self, world: World, request: StopRequest, saver: Saver) -> None:
        self._world, self._request, self._saver = world, request, saver
        self._key = world.fresh_key("stop")
        self._own_reason = ""

    def is_asked(self, needed_s: float = 0.0) -> bool:
        """Whether this rank is asked to stop.

        Args:
            needed_s: how long what comes before the next time it is asked takes at most, without saves.
        """
        reason = self._request.reason(needed_s=needed_s + 2 * self._saver.longest_s)
        if reason and not self._own_reason:
            who = f" to rank {self._world.world_rank}" if self._world.world_size > 1 else ""
            self._own_reason = f"{reason}{who}"
            self._world.share(f"{self._key}/{self._world.world_rank}", self._own_reason.encode())
        return bool(reason)

    def stop(self, where: str) -> NoReturn:
        """End the run after its save. All ranks call it.

        Raises:
            StoppedForGood: a file STOP asked.
            StoppedOnRequest: something else did.
        """
        self._saver.wait()
        kind = StoppedForGood if self._request.obeyed() else StoppedOnRequest
        reason = self._own_reason
        if self._world.store is not None:
            keys = [f"{self._key}/{rank}" for rank in range(self._world.world_size)]
            reason = next(self._world.fetch(key).decode() for key in keys if self._world.store.check([key]))
        raise kind(f"stopped {where} on {reason}; saved {self._saver.last}. The same command goes on from there.")


def _end_of_job(environment: Mapping[str, str]) -> float | None:
    """When the scheduler will end this job, in seconds since 1970, where it says so.

    Raises:
        ConfigError: the variable is no number.
    """
    told = environment.get(END_VARIABLE)
    if not told:
        return None
    try:
        end_s = float(told)
    except ValueError:
        raise ConfigError(
            f"{END_VARIABLE} is {told!r}, expected seconds since 1970. Unset it, or set it as the scheduler does"
        ) from None
    return end_s
