"""Slow is told from stuck: what counts as progress, which rank all others wait for, and what is reported and kept."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_lora.errors import HangError
from dist_lora.supervision.hang import (
    HangWatch,
    Heartbeat,
    Stillness,
    collective_timeout_s,
    describe_hang,
    limit_s,
    ranks_that_hang,
)
from dist_lora.world.progress import Kind, Progress
from dist_lora.world.world import World

# Notes


def test_a_phase_is_noted_within_another_and_left_again() -> None:
    progress = Progress()
    assert progress.notes() == []
    progress.now("step 3")
    with progress.phase("saving"):
        assert [note.text for note in progress.notes()] == ["saving"]
    assert [(note.text, note.count) for note in progress.notes()] == [("step 3", 1)]  # it has made progress


def test_an_error_has_the_phase_that_it_was_raised_in_on_any_thread() -> None:
    progress = Progress()
    assert progress.where(ValueError()) == ""
    progress.now("step 3")
    raised: list[ValueError] = []

    def save() -> None:
        try:
            with progress.phase("saving"), progress.phase("writing"):
                raise ValueError
        except ValueError as error:
            raised.append(error)

    for _ in range(2):
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
    assert progress.where(raised[1]) == "writing"
    assert progress.where(ValueError()) == "step 3"
    assert [note.text for note in progress.notes()] == ["step 3"]


@contextmanager
def another_thread(
    progress: Progress, work: threading.Event, *, kind: Kind = "long", spins: bool = False
) -> Iterator[None]:
    """A thread that does "aside" until ``work`` is set: asleep, or computing."""
    begun = threading.Event()

    def run() -> None:
        with progress.phase("aside", kind=kind):
            begun.set()
            while not work.is_set() if spins else not work.wait(10):
                pass

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        work.set()
        thread.join()


def test_the_main_threads_note_comes_first_and_those_of_ended_threads_are_gone() -> None:
    progress = Progress()
    with another_thread(progress, threading.Event()):
        assert [note.text for note in progress.notes()] == ["aside"]
        progress.now("step 3")
        assert [note.text for note in progress.notes()] == ["step 3", "aside"]
    assert [note.text for note in progress.notes()] == ["step 3"]


# No progress


def still_s(progress: Progress, stillness: Stillness, *, collectives: int = 0) -> list[float]:
    # From its own thread, as the watch does: looking reads files, which is a sign of life of the thread that looks.
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(lambda: stillness.look(progress.notes(), elapsed_s=7, collectives=collectives)).result()
    return [seconds for _, seconds in seen]


def test_a_note_makes_no_progress_until_it_changes_or_says_so() -> None:
    progress, stillness = Progress(), Stillness()
    progress.now("step 3")
    assert [still_s(progress, stillness) for _ in range(3)] == [[0.0], [7.0], [14.0]]
    progress.advance()
    assert still_s(progress, stillness) == [0.0]
    assert still_s(progress, stillness) == [7.0]
    progress.now("step 3")  # the next one, though it reads the same
    assert still_s(progress, stillness) == [0.0]


def test_a_collective_that_begins_is_a_sign_of_life_of_a_step_and_not_of_work_on_the_host() -> None:
    progress, stillness = Progress(), Stillness()
    progress.now("step 3")
    assert [still_s(progress, stillness, collectives=n) for n in (1, 2, 2)] == [[0.0], [0.0], [7.0]]
    progress.now("saving", kind="long")
    assert [still_s(progress, stillness, collectives=n) for n in (3, 4)] == [[0.0], [7.0]]


def test_waiting_for_another_rank_is_not_standing_still() -> None:
    progress, stillness = Progress(), Stillness()
    progress.now("step 3")
    with progress.waiting():
        assert [still_s(progress, stillness) for _ in range(3)] == [[0.0]] * 3
    assert [still_s(progress, stillness) for _ in range(2)] == [[0.0], [7.0]]


@pytest.mark.parametrize(("kind", "spins", "has_progress"), [("long", True, True), ("host", True, True), ("long", False, False),
                                                        ("paced", True, False)])  # fmt: skip
def test_computing_is_a_sign_of_life_of_work_on_the_host_and_sleeping_is_none(kind, spins, has_progress) -> None:
    progress, stillness = Progress(), Stillness()
    with another_thread(progress, threading.Event(), kind=kind, spins=spins):
        still_s(progress, stillness)
        until = time.thread_time() + 0.2  # this thread and that one share the GIL
        while time.thread_time() < until:
            pass
        assert still_s(progress, stillness) == [0.0 if has_progress else 7.0]


def test_a_collective_times_out_after_any_hang_was_found() -> None:
    for timeout_s in (1.0, 10.0, 600.0):
        limits = [limit_s(kind, timeout_s) for kind in ("paced", "host", "long")]
        assert limits == [timeout_s, timeout_s, 3 * timeout_s + 2]
        assert collective_timeout_s(timeout_s) >= max(limits) + 30
    assert limit_s("unseen", 600.0) == float("inf")


# The rank that all wait for

AT_WORK = Heartbeat(0, "here", 100, 5, "step 3, micro-batch 1", "paced", still_s=1, collectives=40)


def heartbeats(*changes: dict[str, object]) -> list[Heartbeat]:
    return [replace(AT_WORK, world_rank=rank, **change) for rank, change in enumerate(changes)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "silent", "hanging"),
    [
        ([{}, {}], [], []),
        # Rank 1 sleeps; the others have started the collective that it hasn't.
        ([{"hangs": True, "collectives": 41}, {"hangs": True}, {"hangs": True, "collectives": 41}], [], [1]),
        # Rank 0 waits in a collective, since rank 1 makes progress, slowly.
        ([{"hangs": True, "collectives": 41}, {}], [], []),
        # Rank 0 waits for what rank 1 writes; a rank that waits on the store doesn't count.
        ([{"waits": True, "collectives": 39}, {"hangs": True}], [], [1]),
        ([{"waits": True}, {"waits": True}], [], []),
        # All of them have started the same collective, and none returns.
        ([{"hangs": True}, {"hangs": True}], [], [0, 1]),
        ([{"is_done": True, "collectives": 3}, {"hangs": True}], [], [1]),
        ([{"hangs": True}, {}], [1], [1]),
    ],
)
def test_the_rank_that_all_others_wait_for_is_found(changes, silent, hanging) -> None:
    assert ranks_that_hang(heartbeats(*changes), silent) == hanging


def test_a_hang_is_described_by_rank_host_phase_and_where_the_stacks_are() -> None:
    still = {"hangs": True, "still_s": 12.4}
    text = describe_hang(heartbeats({}, still), [1], silent=(), judge=AT_WORK, stacks=Path("run/stacks"))
    assert text == (
        "rank 1 of 2 on here hangs: step 3, micro-batch 1, without progress for 12 s. The other ranks wait. The run ends; "
        "the Python stacks of the ranks are in run/stacks. The same command resumes from the last checkpoint; if such a "
        "pause is expected, raise parallel.hang_timeout."
    )
    text = describe_hang(heartbeats({}, {}), [1], silent=[1], judge=AT_WORK, stacks=Path("run/stacks"))
    assert text.startswith(
        "rank 1 of 2 on here doesn't respond (last reported: step 3, micro-batch 1): process 100 is stopped, gone, "
        "disconnected, or stuck in a call that never releases the GIL. The other ranks wait (rank 0 in step 3, micro-batch 1). The run ends;"
    )
    text = describe_hang(heartbeats(still, still), [0, 1], silent=(), judge=AT_WORK, stacks=Path("run/stacks"))
    assert "for 12 s. No rank is ahead of the others: check the network between them. The run ends;" in text
    text = describe_hang(heartbeats(still, still), [0, 1], silent=(), judge=AT_WORK, stacks=Path("s"), on_gpu=True)
    assert "ahead" not in text and "which GPU or link the others wait for isn't known here: look for Xid" in text
    text = describe_hang(heartbeats(*[still] * 9), range(6), silent=(), judge=AT_WORK, stacks=Path("run/stacks"))
    assert text.count("rank ") == 4 and "; and 2 more. The other ranks wait." in text
    text = describe_hang(heartbeats(still), [0], silent=(), judge=AT_WORK, stacks=Path("run/stacks"))
    assert text.startswith("this run (on here) hangs: step 3, micro-batch 1, without progress for 12 s. The run ends;")


# The watch


def watch_of(world: World, timeout_s: float) -> tuple[HangWatch, list[HangError], list[int]]:
    reported: list[HangError] = []
    codes: list[int] = []
    return HangWatch(world, timeout_s=timeout_s, report=reported.append, end=codes.append), reported, codes


def test_a_single_process_that_hangs_is_reported_and_ended_and_leaves_its_stacks(tmp_path) -> None:
    world = World.alone()
    world.stacks = tmp_path / "stacks"
    watch, reported, codes = watch_of(world, 0.5)
    world.progress.now("step 3, micro-batch 1")
    watch.start()
    watch.join(30)
    watch.leave()
    assert codes == [1] and len(reported) == 1
    assert "hangs: step 3, micro-batch 1, without progress for" in str(reported[0])
    [stacks] = world.stacks.iterdir()
    assert stacks.name == "rank-00000.txt"
    text = stacks.read_text()
    assert "rank 0 of 1 on " in text and "thread MainThread, most recent call last:" in text
    assert "test_a_single_process_that_hangs_is_reported_and_ended_and_leaves_its_stacks" in text
    assert "hang.py" not in text.replace("test_hang.py", "")  # the thread that writes is of no interest


def test_a_process_that_makes_progress_is_left_alone_and_keeps_no_stacks(tmp_path) -> None:
    world = World.alone()
    world.stacks = tmp_path / "stacks"
    watch, reported, codes = watch_of(world, 1.0)
    watch.start()
    while not list(tmp_path.rglob("rank-*.txt")):  # ready to be written, should all threads be stuck
        world.progress.now("step 3")
    for _ in range(15):
        world.progress.advance()
        time.sleep(0.1)
    watch.leave()
    assert not watch.is_alive() and (reported, codes) == ([], [])
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_a_thread_reads_or_writes_are_a_sign_of_life_of_work_on_the_host(tmp_path) -> None:
    progress, stillness = Progress(), Stillness()
    progress.now("saving", kind="long")
    with (tmp_path / "file").open("wb", buffering=0) as file:
        assert [still_s(progress, stillness) for _ in range(2)] == [[0.0], [7.0]]
        file.write(b"x")
        assert [still_s(progress, stillness) for _ in range(2)] == [[0.0], [7.0]]


class SilentStore:
    """A store that answers until ``is_silent``, and then blocks in each call as TCP does."""

    def __init__(self) -> None:
        self.store, self.is_silent, self.answer = dist.HashStore(), threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        if self.is_silent.is_set():
            self.answer.wait(60)
        return getattr(self.store, name)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_store_that_no_longer_answers_ends_the_rank_and_is_reported_once_per_host(tmp_path, local_rank: int) -> None:
    store = SilentStore()
    world = World(2 + local_rank, 4, local_rank, 2, torch.device("cpu"), store, store_address="first:1234")
    world.stacks = tmp_path / "stacks"
    watch, reported, codes = watch_of(world, 0.5)
    world.progress.now("step 3")
    ended = threading.Event()
    watch._end = lambda code: (codes.append(code), ended.set())
    watch.start()
    while not store.store.check([f"heartbeat/{2 + local_rank}"]):
        world.progress.advance()
    store.is_silent.set()
    assert ended.wait(30)
    store.answer.set()
    watch.leave()
    assert codes == [1] and len(reported) == (local_rank == 0)
    assert (world.stacks / f"rank-{2 + local_rank:05d}.txt").exists()
    if reported:
        assert re.search(
            r"rank 2 of 4 on \S+ \(in: step 3\) has had no answer from the store at first:1234 for \d+ s: that host, or the "
            "network to it, is gone",
            str(reported[0]),
        )
