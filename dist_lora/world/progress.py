"""What each thread of this rank is at, as it says itself: so that whoever watches can tell a slow rank from one that hangs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

# paced: a part of a step; it gets on as long as it says so, or starts collectives (a sharded base: two a layer and pass).
# host: a part of a step that is the host's alone (its data): it gets on as long as it says so, computes, reads or writes.
# long: work of the host alone, of any length (tokenizing, loading, saving): it gets on likewise.
# unseen: nobody can tell from outside whether it gets on (a download, a compiler): it may take as long as it likes.
Kind = Literal["paced", "host", "long", "unseen"]


@dataclass
class Note:
    """What a thread is at. ``count`` grows whenever it gets on."""

    text: str
    kind: Kind
    thread: int
    native_thread: int  # the system's number of it
    count: int = 0
    waits: int = 0  # above 0: it waits for another rank, by the store, so that it is not the one that hangs


class Progress:
    """The notes of this rank's threads, one each. A note costs nothing worth counting: a dict entry, no word to anybody."""

    def __init__(self) -> None:
        self._notes: dict[int, Note] = {}
        self._error: tuple[BaseException, str] | None = None  # the last that left a phase, and which

    def now(self, text: str, *, kind: Kind = "paced") -> None:
        """This thread begins with ``text``, or with its next part."""
        thread = threading.get_ident()
        self._notes[thread] = Note(text, kind, thread, threading.get_native_id())

    def advance(self) -> None:
        """This thread has got on with what it is at."""
        note = self._notes.get(threading.get_ident())
        if note is not None:
            note.count += 1

    @contextmanager
    def phase(self, text: str, *, kind: Kind = "paced") -> Iterator[None]:
        """This thread is at ``text`` meanwhile, and at what it was before after it.

        An error that leaves it is remembered as this phase's, see ``where``.
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
        """This thread waits meanwhile for somebody who has a note too: another rank, or another thread of this one."""
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
        """Those of the threads that live, the main thread's first."""
        alive = sys._current_frames()
        main = threading.main_thread().ident
        return sorted((n for t, n in list(self._notes.items()) if t in alive), key=lambda n: n.thread != main)

    def where(self, error: BaseException) -> str:
        """In which phase ``error`` came up, of whichever thread; or what the main thread is at, if it has said so."""
        if self._error is not None and self._error[0] is error:
            return self._error[1]
        note = self._notes.get(threading.main_thread().ident or 0)
        return note.text if note is not None else ""
