"""How far a long piece of work has come and how long it still takes: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from dist_lora.text import duration

EVERY_S = 10.0  # between two lines; shorter work has none

log = logging.getLogger("dist_lora")

Advance = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@contextlib.contextmanager
def pace(
    what: str, *, unit: Callable[[float], str] = lambda number: f"{number:,.0f}", is_shown: bool = True
) -> Iterator[Advance]:
    """A function to call while ``what`` advances; on ranks with nothing to show it does nothing.

    Args:
        unit: writes an amount, with its unit where it has one.
        is_shown: whether this process reports: the first rank.
    """
    if not is_shown:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar(what, unit) as advance:
            yield advance
    else:
        yield _lines(what, unit)


def _lines(what: str, unit: Callable[[float], str]) -> Advance:
    started_s = said_s = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal said_s
        now_s = time.monotonic()
        if now_s - said_s < EVERY_S or not 0 < done < total:
            return
        said_s = now_s
        left_s = (now_s - started_s) / done * (total - done)
        log.info(
            f"{time.strftime('%H:%M:%S')}  {what}: {unit(done)} of {unit(total)} ({done / total:.0%}), "
            f"about {duration(max(1, round(left_s)))} left"
        )

    return advance


@contextlib.contextmanager
def _bar(what: str, unit: Callable[[float], str]) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"),
                                TimeRemainingColumn(), TextColumn("left"))  # fmt: skip
    # It is gone when the work is done: the line that says what was done remains.
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None, amount="")

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, amount=f"{unit(done)} of {unit(total)}")

        yield advance
