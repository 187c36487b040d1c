"""Signals that ask a run to stop: noticed at once, obeyed by all ranks at the next step boundary."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from dist_lora.errors import StopNow

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Whether this rank was asked to stop, from ``with`` to its end.

    While ``noted`` a request waits for the loop, which saves; a second one changes nothing. Before and after, there is
    nothing to save: it raises ``StopNow`` wherever this rank is.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._is_noted = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in ASKING}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        is_first, self.signal_name = not self.signal_name, signal.Signals(number).name
        if is_first and not self._is_noted:
            raise StopNow(
                f"stopped on {self.signal_name}'s request, not within a step: nothing is lost, "
                "and the same command goes on."
            )

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Only note requests meanwhile: the loop looks at ``is_asked``."""
        self._is_noted = True
        try:
            yield
        finally:
            self._is_noted = False

    @property
    def is_asked(self) -> bool:
        """Whether a signal came."""
        return bool(self.signal_name)
