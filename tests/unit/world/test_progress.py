"""Looking at what the threads do keeps nothing of them alive."""

from __future__ import annotations

import gc
import threading
import weakref

from dist_lora.world.progress import Progress


class Tensors:
    """What a step holds while it runs."""


def test_notes_keep_no_local_of_another_thread_alive() -> None:
    progress, is_looked_at, held = Progress(), threading.Event(), []

    def step() -> None:
        with progress.phase("step 1"):
            tensors = Tensors()
            held.append(weakref.ref(tensors))
            running.set()
            is_looked_at.wait()

    running = threading.Event()
    thread = threading.Thread(target=step)
    gc.collect()
    gc.disable()  # as within a run's steps
    try:
        thread.start()
        running.wait()
        assert [note.text for note in progress.notes()] == ["step 1"]
        is_looked_at.set()
        thread.join()
        assert held[0]() is None
    finally:
        gc.enable()
    assert progress.notes() == []
