"""A save beside the training: what was copied is what is written, one at a time, and no failure is silent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_lora.checkpoint.saver import Saver
from dist_lora.errors import RankError, SaveError
from dist_lora.lora.state import Piece
from dist_lora.world.world import World

PIECES = [Piece("a", "adapter", 0, 3), Piece("b", "exp_avg", 2, 4)]


def on_ranks(num_ranks: int, work: Callable[[World], Any]) -> list[Any]:
    """What ``work`` returns or raises on ranks that are threads of this process."""
    store, found = dist.HashStore(), [None] * num_ranks
    cpu = torch.device("cpu")

    def rank(number: int) -> None:
        try:
            found[number] = work(World(number, num_ranks, number, num_ranks, cpu, store))
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def test_what_is_written_is_the_state_at_the_start_of_the_save() -> None:
    live = {PIECES[0]: torch.arange(3.0), PIECES[1]: torch.tensor([5.0, 7.0])}
    trained_on, written = threading.Event(), {}
    saver = Saver(World.alone())

    def write(world: World, share: Mapping[Piece, Tensor]) -> Path:
        assert trained_on.wait(30)
        written.update({piece: values.tolist() for piece, values in share.items()})
        return Path("it")

    saver.start(live, write)
    for values in live.values():
        values.fill_(-1)
    trained_on.set()
    assert saver.last is None or saver.last == Path("it")
    saver.wait()
    assert written == {PIECES[0]: [0, 1, 2], PIECES[1]: [5, 7]}
    assert saver.last == Path("it")


def test_a_second_save_waits_for_the_first_and_its_memory_is_used_again() -> None:
    saver, order, memory = Saver(World.alone()), [], set()
    may_end = threading.Event()

    def write_as(name: str) -> Callable[[World, Mapping[Piece, Tensor]], Path]:
        def write(world: World, share: Mapping[Piece, Tensor]) -> Path:
            order.append(f"{name} begins")
            assert may_end.wait(30)
            memory.update(values.data_ptr() for values in share.values())
            order.append(f"{name} ends with {share[PIECES[0]].tolist()}")
            return Path(name)

        return write

    saver.start({PIECES[0]: torch.ones(3)}, write_as("first"))
    threading.Timer(0.2, may_end.set).start()
    saver.start({PIECES[0]: torch.zeros(3)}, write_as("second"))
    saver.wait()
    assert order == ["first begins", "first ends with [1.0, 1.0, 1.0]",
                     "second begins", "second ends with [0.0, 0.0, 0.0]"]  # fmt: skip
    assert len(memory) == 1
    times = saver.take_times()
    assert times["save_stall_s"] > 0.1  # it waited for the first
    assert saver.take_times() == {"save_stall_s": 0.0, "save_write_s": 0.0}


def test_a_save_that_fails_on_one_rank_is_raised_on_all_where_they_wait() -> None:
    def work(world: World) -> tuple[str, bool]:
        saver = Saver(world)

        def write(aside: World, share: Mapping[Piece, Tensor]) -> Path:
            error = SaveError("no room") if world.world_rank == 1 else None
            aside.agree("the save", error)
            return Path("it")

        saver.start({}, write)
        world.agree("meanwhile the main threads agree on other things", None)
        if saver._thread is not None:
            saver._thread.join()
        assert saver.has_failed
        with pytest.raises(SaveError if world.world_rank == 1 else RankError, match="no room") as raised:
            saver.wait()
        assert not saver.has_failed
        saver.wait()  # it is raised once
        return str(raised.value), saver.last is None

    assert on_ranks(3, work) == [
        ("the save: rank 1: no room", True),
        ("no room", True),
        ("the save: rank 1: no room", True),
    ]


def test_savers_one_after_another_in_a_world_do_not_meet() -> None:
    def work(world: World) -> list[Path | None]:
        paths = []
        for name in ("first", "second"):
            saver = Saver(world)

            def write(aside: World, share: Mapping[Piece, Tensor], name: str = name) -> Path:
                aside.agree("the save", None)
                if world.is_first:
                    aside.share("its name", name.encode())
                return Path(aside.fetch("its name").decode())

            saver.start({}, write)
            saver.wait()
            paths.append(saver.last)
        return paths

    assert on_ranks(2, work) == [[Path("first"), Path("second")]] * 2


def test_a_rank_that_failed_elsewhere_ends_a_save_that_waits_for_it() -> None:
    def work(world: World) -> str:
        if world.world_rank == 1:
            world.fail(ValueError("boom"))
            return ""
        saver = Saver(world)
        saver.start({}, lambda aside, share: Path(aside.fetch("never shared").decode()))
        with pytest.raises(RankError) as raised:
            saver.wait()
        return str(raised.value)

    assert on_ranks(2, work)[0] == "the value of never shared: rank 1 failed: ValueError: boom"
