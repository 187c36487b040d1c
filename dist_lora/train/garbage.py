"""Python's cyclic garbage collector, run between steps: where it likes, it would make one rank late, and all others wait for it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10
"""Steps between two collections: a recomputed layer leaves some fourteen small objects in cycles, none of them a tensor (torch 2.13)."""


@contextmanager
def collected_between_steps() -> Iterator[Callable[[int], None]]:
    """Inside the ``with`` garbage is collected only by calling what it gives, after each step with its number.

    What is there at the start stays for the whole run and is never looked through again, so a collection takes milliseconds.
    At the end the collector is as it was.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def after(step: int) -> None:
        if step % EVERY == 0:
            gc.collect()

    try:
        yield after
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
