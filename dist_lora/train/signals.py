"""Requests to stop a run: noticed at once on one rank, followed by all at the same point of the run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from dist_lora.errors import ConfigError, StopNow, StoppedForGood, StoppedOnRequest
from dist_lora.supervision.local_ranks import is_ignored

if TYPE_CHECKING:  # a launcher listens to signals too, and needs no torch
    from dist_lora.checkpoint.saver import Saver
    from dist_lora.world.world import World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
END_VARIABLE = "SLURM_JOB_END_TIME"  # seconds since 1970, set in every job since Slurm 22.05
STOP_FILE = "STOP"
MARGIN_S = 5.0  # on top of the longest step and save: for the other ranks, and for the shutdown


class StopRequest:
    """Whether this rank was asked to stop, within its ``with`` block.

    Within ``deferred`` a request waits for the training loop, which saves (and is answered at once); a second one changes
    nothing. Before and
    after, there is nothing to save: a signal raises ``StopNow`` wherever this rank is, until ``close``.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._signal_name = ""
        self._is_deferred = self._is_closed = self._is_to_say = False
        self._file: Path | None = None
        self._end_s = _end_of_job(environment)

    def __enter__(self) -> Self:
        heard = [number for number in STOP_SIGNALS if not is_ignored(number)]
        self._before = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # A launcher may repeat the signal while this rank shuts down: that must not kill it.
            signal.signal(number, signal.SIG_IGN if self._signal_name else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_closed:
            return
        is_first, self._signal_name = not self._signal_name, signal.Signals(number).name
        if is_first and self._is_deferred and self._is_to_say:
            self.say(self._signal_name)
        if is_first and not self._is_deferred:
            raise StopNow(
                f"interrupted by {self._signal_name} outside of a training step: nothing is lost, "
                "and the same command resumes the run."
            )

    @contextmanager
    def deferred(self, folder: Path | None = None) -> Iterator[None]:
        """Only record requests: the loop asks for the ``reason``. ``folder``: where to look for a file STOP."""
        self._is_deferred, self._is_to_say = True, folder is not None
        self._file = folder / STOP_FILE if folder is not None else None
        try:
            yield
        finally:
            self._is_deferred = False

    def reason(self, *, needed_s: float) -> str:
        """Why this rank has to stop, in words; "" if it doesn't.

        Args:
            needed_s: the longest time until the next call, including a save.
        """
        if self._signal_name:
            return self._signal_name
        if self._file is not None and self._file.exists():
            return f"the file {self._file}"
        if self._end_s is not None and time.time() + needed_s + MARGIN_S > self._end_s:
            end = time.strftime("%H:%M:%S", time.localtime(self._end_s))
            return f"the job's end at {end} ({END_VARIABLE})"
        return ""

    def say(self, reason: str) -> None:
        """Say, once and on the first rank alone, that the request was heard: a save may take minutes.

        By one write to the file: a handler may have interrupted a print to the same stream.
        """
        if self._is_to_say:
            self._is_to_say = False
            with contextlib.suppress(OSError):
                os.write(2, f"asked to stop by {reason}: saving, then this run ends (no need to ask again)\n".encode())

    def close(self) -> None:
        """Ignore further requests: all is saved, or done, and this rank ends."""
        self._is_closed = True

    def acknowledge(self) -> bool:
        """Close, and delete the file STOP, so that the same command can resume; returns whether there was one."""
        self.close()
        if self._file is None:
            return False
        with contextlib.suppress(OSError):
            self._file.unlink()
            return True
        return False


class Stopping:
    """How all ranks stop if any is asked to: after a save, with the same reason on all.

    Args:
        resume: ``checkpoint.resume``, of which the message says if it is to be left out then.
    """

    def __init__(self, world: World, request: StopRequest, saver: Saver, *, resume: str | Path = "auto") -> None:
        self._world, self._request, self._saver = world, request, saver
        self._resume = resume
        self._key = world.fresh_key("stop")
        self._own_reason = ""

    def is_asked(self, needed_s: float = 0.0) -> bool:
        """Whether this rank is asked to stop.

        Args:
            needed_s: the longest time until the next call, without saves.
        """
        reason = self._request.reason(needed_s=needed_s + 2 * self._saver.longest_s)
        if reason and not self._own_reason:
            who = f" on rank {self._world.world_rank}" if self._world.world_size > 1 else ""
            self._own_reason = f"{reason}{who}"
            self._world.share(f"{self._key}/{self._world.world_rank}", self._own_reason.encode())
        return bool(reason)

    def begin(self) -> None:
        """Say that the run is about to save and stop, if its signal's handler hasn't. All ranks may call it."""
        self._request.say(self._own_reason or "a request to another rank")

    def stop(self, where: str) -> NoReturn:
        """End the run after its save. All ranks call it; ``where`` is the step, in words.

        Raises:
            StoppedForGood: a file STOP asked.
            StoppedOnRequest: something else did.
        """
        self._saver.wait()
        kind = StoppedForGood if self._request.acknowledge() else StoppedOnRequest
        reason = self._own_reason
        if self._world.store is not None:
            keys = [f"{self._key}/{rank}" for rank in range(self._world.world_size)]
            reason = next(self._world.fetch(key).decode() for key in keys if self._world.store.check([key]))
        raise kind(f"interrupted by {reason} {where}; saved {self._saver.last}. {self._again()}")

    def _again(self) -> str:
        """What resumes from the last checkpoint: the same command, or without a setting that names another beginning."""
        if self._resume in ("auto", self._saver.last):
            return "The same command resumes from there."
        requeued = ", and so does this job when Slurm requeues it" if os.environ.get("SLURM_JOB_ID") else ""
        return f"The same command without checkpoint.resume={self._resume} resumes from there{requeued}."


def _end_of_job(environment: Mapping[str, str]) -> float | None:
    """When the scheduler will end this job, in seconds since 1970, if it says so.

    Raises:
        ConfigError: the variable is not a number.
    """
    value = environment.get(END_VARIABLE)
    if not value:
        return None
    try:
        end_s = float(value)
    except ValueError:
        raise ConfigError(
            f"{END_VARIABLE} is {value!r}, expected a Unix time in seconds. Unset it, or set it as the scheduler does"
        ) from None
    return end_s
