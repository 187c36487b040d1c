"""A rank that hangs, dies or gets no memory ends the run in seconds, and is named with host, step and phase."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from dist_lora.checkpoint.read import verify
from tests.e2e.runs import ROOT, Done, command, environment, losses, run, run_each_rank, run_under_torchrun

TIMEOUT_S = 10
DEADLINE_S = 40.0  # from the instant at which a rank begins to hang to the end of all
TORCHRUNS_OWN = "torch/distributed/elastic/"  # what torchrun itself says of a worker that failed comes after ours
HOST = socket.gethostname()
AT_ONCE = 3  # runs: those that hang take no processor


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
        ours = self.done.stderr.partition(TORCHRUNS_OWN)[0]
        assert ours.count("error: ") == 1 and "Traceback" not in ours, self.done.stderr
        for text in told:
            assert text in self.done.stderr, f"{text}\n not in \n{self.done.stderr}"

    def stacks(self) -> list[str]:
        """What each rank has left, in order."""
        paths = sorted((self.folder / "stacks").iterdir())
        assert [path.name for path in paths] == ["rank-00000.txt", "rank-00001.txt"]
        return [path.read_text() for path in paths]


Launcher = Literal["ours", "none", "torchrun"]  # none: nobody sees the ranks through, each has to end by itself
# name: fault, launcher, further settings
CASES: dict[str, tuple[str, Launcher, tuple[str, ...]]] = {
    "data": ("hang_of_rank_1_in_the_data_of_step_3", "ours", ()),
    "data, alone": ("hang_of_rank_1_in_the_data_of_step_3", "none", ()),
    "forward": ("hang_of_rank_1_in_the_forward_of_step_3", "ours", ()),
    "layer": ("hang_of_rank_1_within_a_forward", "ours", ("parallel.hang_timeout=5",)),
    "save": ("hang_of_rank_1_in_the_save_of_step_4", "ours", ("parallel.hang_timeout=3",)),
    "locked": ("hang_of_rank_1_that_lets_nothing_else_run", "ours", ("parallel.hang_timeout=5",)),
    "stopped": ("stop_of_rank_1", "ours", ("parallel.hang_timeout=5",)),
    "killed": ("kill_of_rank_1_in_step_3", "none", ()),
    "refused": ("memory_refused_to_rank_1_in_step_3", "none", ()),
    "refused while loading": ("memory_refused_to_python_while_loading", "ours", ()),
    "slow": ("slow_steps_of_rank_1", "none", ("parallel.hang_timeout=5", "train.steps=3")),
    "forward, torchrun": ("hang_of_rank_1_in_the_forward_of_step_3", "torchrun", ()),
    "save, 10 s": ("hang_of_rank_1_in_the_save_of_step_4", "ours", ()),
    "save, 10 s, alone": ("hang_of_rank_1_in_the_save_of_step_4", "none", ()),
}


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest, config) -> Iterator[Callable[[str], Ended]]:
    """``ended("save")``: a case's run at its end. All that the tests ask for are started at the first use, a few at a time."""
    items: list[Any] = request.session.items
    asked = {
        item.callspec.params["name"] for item in items if item.module is request.module and "ended" in item.fixturenames
    }
    runs: dict[str, Future[Ended]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:

        def result(name: str) -> Ended:
            if not runs:
                runs.update({other: pool.submit(_run, config, other) for other in CASES if other in asked})
            return runs[name].result()

        yield result


def _run(config: Path, name: str) -> Ended:
    fault, launcher, settings = CASES[name]
    called = "hang-" + re.sub(r"\W+", "-", name)
    folder = config.parent / "runs" / called
    arguments = ("train", config, f"run={called}", f"parallel.hang_timeout={TIMEOUT_S}", *settings)
    if launcher == "torchrun":
        return Ended(run_under_torchrun(*arguments, fault=fault), folder)
    if launcher == "ours":
        return Ended(run(*arguments, "--nproc", 2, fault=fault), folder)
    codes, done = run_each_rank(*arguments, fault=fault, timeout_s=300)
    return Ended(done, folder, tuple(codes))


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        pytest.param("data", "step 3, reading its data", marks=pytest.mark.turn(of=2)),
        pytest.param("data, alone", "step 3, reading its data", marks=pytest.mark.turn(of=2)),
        pytest.param("forward", "step 3, micro-batch 1 of 2", marks=pytest.mark.slow),
        pytest.param("forward, torchrun", "step 3, micro-batch 1 of 2", marks=pytest.mark.turn(of=4)),
    ],
)
def test_a_rank_that_hangs_in_a_step_is_named_and_ends_all(name, phase, ended) -> None:
    found = ended(name)
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


@pytest.mark.turn(of=2, among="whole runs")
@pytest.mark.parametrize("name", ["layer"])
def test_of_two_ranks_in_the_same_micro_batch_the_one_that_the_other_waits_for_is_named(name, ended) -> None:
    found = ended(name)
    found.assert_told_once(f"error: rank 1 of 2 on {HOST} hangs: step 3, micro-batch 1 of 2, without progress for 5 s.")
    found.assert_in_time()
    waiting, _ = found.stacks()
    assert ": step 3, micro-batch 1 of 2, " in waiting.splitlines()[0]  # as the one that hangs says


@pytest.mark.turn(of=3)
@pytest.mark.parametrize(
    "name",
    ["save", "save, 10 s", "save, 10 s, alone"],
)
def test_a_rank_that_hangs_in_a_save_is_named_and_ends_all(name, ended) -> None:
    found = ended(name)
    found.assert_told_once(f"error: rank 1 of 2 on {HOST} hangs: saving the checkpoint of step 4, without progress")
    found.assert_in_time()
    assert "time.sleep(LONG_S)" in found.stacks()[1]
    assert max(path.name for path in (found.folder / "checkpoints").glob("step-*")) == "step-00000002"
    verify(found.folder / "checkpoints" / "step-00000002")


@pytest.mark.turn(of=2, among="whole runs")
@pytest.mark.parametrize("name", ["locked"])
def test_a_rank_whose_threads_are_all_kept_from_running_is_named_by_the_other_and_leaves_its_stack(name, ended) -> None:
    found = ended(name)
    found.assert_told_once(
        f"error: rank 1 of 2 on {HOST} doesn't respond (last reported: ",
        "is stopped, gone, disconnected, or stuck in a call that never releases the GIL.",
        "The other ranks wait (rank 0 in step 3, micro-batch 1 of 2).",
    )
    found.assert_in_time()
    assert '/tests/e2e/faults.py", line' in found.stacks()[1]  # as the interpreter itself writes it down


@pytest.mark.turn(of=2, among="whole runs")
@pytest.mark.parametrize("name", ["stopped"])
def test_a_rank_that_is_stopped_from_outside_is_named_by_the_other_and_ended(name, ended) -> None:
    found = ended(name)
    found.assert_told_once(f"error: rank 1 of 2 on {HOST} doesn't respond (last reported: ", "(rank 0 in step 3, ")
    found.assert_in_time()


@pytest.mark.turn(of=2, among="whole runs")
@pytest.mark.parametrize("name", ["slow"])
def test_a_slow_rank_that_lives_is_not_ended_and_leaves_no_stacks(name, ended, whole) -> None:
    found = ended(name)
    assert found.codes == (0, 0), found.done.stderr
    assert losses(found.folder) == losses(whole)[:3]
    assert not (found.folder / "stacks").exists()


# A rank that is gone, or gets no memory


@pytest.mark.turn(of=2, among="whole runs")
@pytest.mark.parametrize("name", ["killed"])
def test_a_rank_that_is_killed_is_named_by_the_other_where_nobody_sees_them_through(name, ended) -> None:
    found = ended(name)
    assert sorted(found.codes) == [-9, 1], found.done.stderr
    assert found.done.stderr.count("error: ") == 1, found.done.stderr
    told = f"error: rank 0 lost another rank: the process of rank 1 of 2 on {HOST} no longer exists (last reported: "
    assert told in found.done.stderr, found.done.stderr
    struck = re.findall(r"struck ([0-9.]+)", found.done.stdout)
    assert found.done.ended - float(struck[0]) < 30


@pytest.mark.turn(of=2, among="whole runs")
@pytest.mark.parametrize("name", ["refused"])
def test_a_rank_that_is_refused_memory_tells_what_it_asked_for_what_it_held_and_what_helps(name, ended) -> None:
    found = ended(name)
    found.assert_told_once(
        f"error: rank 1 of 2 on {HOST}, step 3, micro-batch 1 of 2: out of memory on the host: 4000000000000 bytes were "
        "requested; this process holds ",
        " GiB are available",
        ". What helps, the cheapest first: train.activation_checkpointing=all (is auto); train.sequence_length=32 (is 64); "
        "model.quant=nf4 (is none); more nodes, so that each holds less.",
    )
    found.assert_in_time(30)


@pytest.mark.turn(of=2, among="whole runs")
@pytest.mark.parametrize("name", ["refused while loading"])
def test_a_rank_that_is_refused_memory_while_loading_names_what_helps_there(name, ended) -> None:
    found = ended(name)
    found.assert_told_once(
        f"error: rank 1 of 2 on {HOST}, loading the base: out of memory on the host: this process holds ",
        ". What helps, the cheapest first: model.quant=nf4 (is none); more nodes, so that each holds less.",
    )
    found.assert_in_time(30)


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group of 3 GiB, for whoever writes itself into its cgroup.procs."""
    for top, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        folder = top / f"dist-lora-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(3 * 2**30))
            yield folder
            return
        except OSError:
            pass
        finally:
            folder.rmdir()
    pytest.skip("no control group can be made here")


@pytest.mark.turn(of=2)
def test_a_rank_that_the_kernel_kills_for_want_of_memory_is_told_so_as_a_fact(config, control_group) -> None:
    arguments = command("train", config, "run=hang-killed-for-memory", "--nproc", 2)
    done = subprocess.run(
        ["bash", "-c", f'echo $$ > {control_group}/cgroup.procs && exec "$@"', "bash", *arguments],
        cwd=ROOT, env=environment("memory_filled_by_rank_1_in_step_3"), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    told = (
        r"error: rank 1 of 2 was killed by SIGKILL; the other ranks were terminated. "
        r"Memory ran out: the kernel killed 1 process in "
        r"this cgroup for it during the run \(oom_kill\). The ranks held at most \d.\d\d GiB, [1-3].\d\d GiB; the host has "
        r"[\d.]+ GiB, this cgroup is limited to 3.00 GiB. The same command resumes from the last checkpoint.\n"
    )
    assert re.search(told, done.stderr), done.stderr
