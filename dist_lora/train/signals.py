"""Signals that ask a run to stop: noticed at once, obeyed by all ranks at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Whether this rank was asked to stop. A second signal changes nothing: the save goes on."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._before = {number: signal.signal(number, self._note) for number in ASKING}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    @property
    def is_asked(self) -> bool:
        """Whether a signal came."""
        return bool(self.signal_name)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
