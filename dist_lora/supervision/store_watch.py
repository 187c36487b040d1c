"""A rank whose store no longer answers ends by itself: the host of the store, or the network to it, is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TICK_S = 0.25
MAX_TICK_S = 1.0  # what a tick counts for at most: a job that was stopped (SIGSTOP, a suspended node) didn't wait


class StoreWatch(threading.Thread):
    """Watches whether calls to the store return, and calls ``when_silent`` once where one doesn't in time.

    A call to the store blocks in the kernel until TCP gives up the connection, which takes Linux a quarter of an hour
    (tcp_retries2); neither a timeout of the store nor a signal ends it (torch 2.13).
    """

    def __init__(self, *, limit_s: float, when_silent: Callable[[float], None]) -> None:
        super().__init__(name="store-watch", daemon=True)
        self._limit_s, self._when_silent = limit_s, when_silent
        self._stopped = threading.Event()
        self._is_asking = False
        self._silent_s = 0.0

    @contextmanager
    def asking(self) -> Iterator[None]:
        """For ``with``, around calls to the store, in one thread."""
        self._is_asking = True
        try:
            yield
        finally:
            self._is_asking, self._silent_s = False, 0.0

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def run(self) -> None:
        """See the class."""
        last_s = time.monotonic()
        while not self._stopped.wait(TICK_S):
            now_s = time.monotonic()
            elapsed_s, last_s = min(now_s - last_s, MAX_TICK_S), now_s
            if not self._is_asking:
                continue
            self._silent_s += elapsed_s
            if self._silent_s > self._limit_s:
                self._when_silent(self._silent_s)
                return
