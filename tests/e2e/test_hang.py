"""A rank that hangs, dies or gets no memory ends the run in seconds, and is named with host, step and phase."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_lora.checkpoint.resume import verify
from tests.e2e.runs import Done, losses, run, run_each_rank

TIMEOUT_S = 10
DEADLINE_S = 40.0  # from the instant at which a rank begins to hang to the end of all
HOST = socket.gethostname()
AT_ONCE = 5  # runs: those that hang take no processor


@dataclass(frozen=True)
class Ended:
    """A run that has ended, and its folder."""

    done: Done
    folder: Path
    codes: tuple[int, ...] = ()

    def assert_in_time(self, deadline_s: float = DEADLINE_S) -> None:
        struck = re.findall(r"struck ([0-9.]+)", self.done.stdout)
        assert len(struck) == 1, self.done
        assert self.done.ended - float(struck[0]) < deadline_s, self.done

    def assert_told_once(self, *told: str) -> None:
        assert self.done.returncode == 1, self.done.stderr
        assert all(code > 0 for code in self.codes), (self.codes, self.done.stderr)
        assert self.done.stderr.count("error: ") == 1, self.done.stderr
        assert "Traceback" not in self.done.stderr, self.done.stderr
        for text in told:
            assert text in self.done.stderr, (text, self.done.stderr)

    def stacks(self) -> list[str]:
        """What each rank has left, in order."""
        paths = sorted((self.folder / "stacks").iterdir())
        assert [path.name for path in paths] == ["rank-00000.txt", "rank-00001.txt"]
        return [path.read_text() for path in paths]


# name: fault, whether our launcher sees the run through (else each rank has to end by itself), further settings
FAST = {
    "data": ("hang_of_rank_1_in_the_data_of_step_3", True, ()),
    "data, alone": ("hang_of_rank_1_in_the_data_of_step_3", False, ()),
    "forward": ("hang_of_rank_1_in_the_forward_of_step_3", True, ()),
    "forward, alone": ("hang_of_rank_1_in_the_forward_of_step_3", False, ()),
    "layer": ("hang_of_rank_1_within_a_forward", True, ("parallel.hang_timeout=5",)),
    "save": ("hang_of_rank_1_in_the_save_of_step_4", True, ("parallel.hang_timeout=3",)),
    "locked": ("hang_of_rank_1_that_lets_nothing_else_run", True, ("parallel.hang_timeout=5",)),
    "stopped": ("stop_of_rank_1", True, ("parallel.hang_timeout=5",)),
    "slow steps": ("slow_steps_of_rank_1", False, ("parallel.hang_timeout=5", "train.steps=3")),
}
SLOW = {
    "save, 10 s": ("hang_of_rank_1_in_the_save_of_step_4", True, ()),
    "save, 10 s, alone": ("hang_of_rank_1_in_the_save_of_step_4", False, ()),
}
CASES = FAST | SLOW


@pytest.fixture(scope="module")
def ended(config) -> Iterator[Callable[[str], Ended]]:
    """``ended("save")``: a case's run at its end. Those of its speed are started at the first use, a few at a time."""
    runs: dict[str, Future[Ended]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:

        def result(name: str) -> Ended:
            if name not in runs:
                runs.update({other: pool.submit(_run, config, other) for other in (FAST if name in FAST else SLOW)})
            return runs[name].result()

        yield result


def _run(config: Path, name: str) -> Ended:
    fault, is_seen_through, settings = CASES[name]
    called = "hang-" + name.replace(", ", "-")
    folder = config.parent / "runs" / called
    arguments = ("train", config, f"run={called}", f"parallel.hang_timeout={TIMEOUT_S}", *settings)
    if is_seen_through:
        return Ended(run(*arguments, "--nproc", 2, fault=fault), folder)
    codes, done = run_each_rank(*arguments, fault=fault)
    return Ended(done, folder, tuple(codes))


@pytest.mark.parametrize("how", ["", ", alone"])
@pytest.mark.parametrize(
    ("name", "phase"), [("data", "step 3, reading its data"), ("forward", "step 3, micro-batch 1 of 2")]
)
def test_a_rank_that_hangs_in_a_step_is_named_and_ends_all(name, how, phase, ended) -> None:
    found = ended(name + how)
    found.assert_told_once(
        f"error: rank 1 of 2 on {HOST} hangs: {phase}, without progress for 10 s. The other ranks wait. ",
        f"the Python stacks of the ranks are in {found.folder}/stacks.",
        "raise parallel.hang_timeout",
    )
    found.assert_in_time()
    waiting, hanging = found.stacks()
    assert hanging.startswith(f"rank 1 of 2 on {HOST}") and f": {phase}, " in hanging.splitlines()[0]
    assert "thread MainThread, most recent call last:\n" in hanging and "time.sleep(LONG_S)" in hanging
    assert waiting.startswith(f"rank 0 of 2 on {HOST}") and "time.sleep(LONG_S)" not in waiting
    assert "torch/distributed/" in waiting


def test_of_two_ranks_in_the_same_micro_batch_the_one_that_the_other_waits_for_is_named(ended) -> None:
    found = ended("layer")
    found.assert_told_once(f"error: rank 1 of 2 on {HOST} hangs: step 3, micro-batch 1 of 2, without progress for 5 s.")
    found.assert_in_time()
    waiting, _ = found.stacks()
    assert ": step 3, micro-batch 1 of 2, " in waiting.splitlines()[0]  # as the one that hangs says


@pytest.mark.parametrize(
    "name", ["save", *(pytest.param(name, marks=pytest.mark.slow) for name in ("save, 10 s", "save, 10 s, alone"))]
)
def test_a_rank_that_hangs_in_a_save_is_named_and_ends_all(name, ended) -> None:
    found = ended(name)
    found.assert_told_once(f"error: rank 1 of 2 on {HOST} hangs: saving the checkpoint of step 4, without progress")
    found.assert_in_time()
    assert "time.sleep(LONG_S)" in found.stacks()[1]
    assert [path.name for path in (found.folder / "checkpoints").glob("step-*")] == ["step-00000002"]
    verify(found.folder / "checkpoints" / "step-00000002")


def test_a_rank_whose_threads_are_all_kept_from_running_is_named_by_the_other_and_leaves_its_stack(ended) -> None:
    found = ended("locked")
    found.assert_told_once(
        f"error: rank 1 of 2 on {HOST} gives no sign of life (its last word: ",
        "is stopped, gone, or stuck in a call that lets nothing else run.",
        "The other ranks wait (rank 0 in step 3, micro-batch 1 of 2).",
    )
    found.assert_in_time()
    assert "hang_of_rank_1_that_lets_nothing_else_run" in found.stacks()[1]


def test_a_rank_that_is_stopped_from_outside_is_named_by_the_other_and_ended(ended) -> None:
    found = ended("stopped")
    found.assert_told_once(
        f"error: rank 1 of 2 on {HOST} gives no sign of life (its last word: ", "(rank 0 in step 3, "
    )
    found.assert_in_time()


def test_a_slow_rank_that_lives_is_not_ended_and_leaves_no_stacks(ended, whole) -> None:
    found = ended("slow steps")
    assert found.codes == (0, 0), found.done.stderr
    assert losses(found.folder) == losses(whole)[:3]
    assert not (found.folder / "stacks").exists()
