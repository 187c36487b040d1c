"""Python's cyclic garbage collector, run between steps: where it likes, it would make one rank late, and all others wait for it."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10
"""Steps between two collections: a recomputed layer leaves some fourteen small objects in cycles, none of them a tensor (torch 2.13)."""


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    """glibc's ``malloc_trim``; on a system with another allocator a function that does nothing."""
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)


@contextmanager
def collected_between_steps(*, is_on_cpu: bool) -> Iterator[Callable[[int], None]]:
    """Inside the ``with`` garbage is collected only by calling what it gives, after each step with its number.

    Args:
        is_on_cpu: tensors are in the host's memory, and what was freed of it is also given back to the system after each step:
            glibc keeps it in pieces between what other threads hold, 0.7 GB more per step of a model of 135M (glibc 2.36).

    What is there at the start stays for the whole run and is never looked through again, so a collection takes milliseconds.
    At the end the collector is as it was.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def after(step: int) -> None:
        if is_on_cpu:
            _malloc_trim()(0)
        if step % EVERY == 0:
            gc.collect()

    try:
        yield after
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
