"""What each thread of this rank is doing, as it reports itself, to distinguish a slow rank from one that hangs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

# paced: a part of a step; it makes progress while it says so or starts collectives (a sharded base: two per layer and pass).
# host: a part of a step on the host only (its data): it makes progress while it says so, computes, reads or writes.
# long: work on the host only, of any length (tokenizing, loading, saving): it makes progress likewise.
# unseen: its progress can't be observed from outside (a download, a compiler): it may take as long as it likes.
Kind = Literal["paced", "host", "long", "unseen"]


@dataclass
class Note:
    """What a thread is doing. ``count`` grows whenever it makes progress."""

    text: str
    kind: Kind
    thread: int
    native_thread: int  # its id in the operating system
    count: int = 0
    waits: int = 0  # above 0: it waits for another rank, on the store, so it isn't the one that hangs


class Progress:
    """The notes of this rank's threads, one each. A note is cheap: a dict entry, without communication."""

    def __init__(self) -> None:
        self._notes: dict[int, Note] = {}
        self._error: tuple[BaseException, str] | None = None  # the last one raised out of a phase, and that phase

    def now(self, text: str, *, kind: Kind = "paced") -> None:
        """This thread begins ``text``, or its next part."""
        thread = threading.get_ident()
        self._notes[thread] = Note(text, kind, thread, threading.get_native_id())

    def advance(self) -> None:
        """This thread has made progress."""
        note = self._notes.get(threading.get_ident())
        if note is not None:
            note.count += 1

    @contextmanager
    def phase(self, text: str, *, kind: Kind = "paced") -> Iterator[None]:
        """This thread does ``text`` inside the ``with``, and afterwards what it did before.

        An error that is raised out of it is remembered as this phase's, see ``where``.
        """
        thread = threading.get_ident()
        before = self._notes.get(thread)
        self.now(text, kind=kind)
        try:
            yield
        except BaseException as error:
            if self._error is None or self._error[0] is not error:
                self._error = error, text
            raise
        finally:
            if before is None:
                self._notes.pop(thread, None)
            else:
                before.count += 1
                self._notes[thread] = before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the ``with`` this thread waits for another rank, or another thread of this one, which has a note too."""
        note = self._notes.get(threading.get_ident())
        if note is None:
            yield
            return
        note.waits += 1
        try:
            yield
        finally:
            note.waits -= 1
            note.count += 1

    def notes(self) -> list[Note]:
        """The notes of all live threads, the main thread's first."""
        # Their ids alone: kept, the frames would hold this one, which holds them, and all tensors of the others until the next
        # collection of garbage.
        alive = frozenset(sys._current_frames())
        main = threading.main_thread().ident
        return sorted((n for t, n in list(self._notes.items()) if t in alive), key=lambda n: n.thread != main)

    def where(self, error: BaseException) -> str:
        """The phase in which ``error`` was raised, in any thread; else what the main thread is doing, if it has a note."""
        if self._error is not None and self._error[0] is error:
            return self._error[1]
        note = self._notes.get(threading.main_thread().ident or 0)
        return note.text if note is not None else ""
