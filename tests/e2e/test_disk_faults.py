"""A disk that refuses in mid-run ends all ranks with the system's words, once; what was saved is whole, and the run goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_lora.checkpoint.read import verify
from tests.e2e.runs import Done, losses, run
from tests.e2e.test_faults import RANK_1, assert_ended_in_time, assert_told_once, checkpoints, folder_of

ADAPTER = Path("adapter", "adapter_model.safetensors")
Train = Callable[..., Done]


@pytest.fixture
def train(config) -> Train:
    """``train(*settings, fault=None)`` on two ranks."""

    def to_its_end(*settings: str, fault: str | None = None) -> Done:
        return run("train", config, *settings, "--nproc", 2, fault=fault, timeout_s=60)

    return to_its_end


def assert_saved(folder: Path, *, step: int) -> None:
    """Whole checkpoints lie there and nothing else, the newest of ``step``."""
    names = checkpoints(folder)
    assert all(name.startswith("step-") for name in names) and names[-1] == f"step-{step:08d}", names
    for name in names:
        verify(folder / "checkpoints" / name)


def assert_goes_on(train: Train, folder: Path, whole: Path, *settings: str, step: int) -> None:
    """The same command ends, from the checkpoint of ``step``, where a run ends that nothing befell."""
    done = train(*settings)
    assert done.returncode == 0, done.stderr
    assert f"step-{step:08d}: step {step} of 8" in done.stderr, done.stderr
    assert losses(folder) == losses(whole)
    assert (folder / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@pytest.mark.turn(of=2, among="whole runs")
@pytest.mark.parametrize(
    "fault, where, name",
    [
        ("fsync_fails_for_rank_0", "error: ", ".step-00000004.partial/rank-00000-of-00002.safetensors"),
        ("fsync_fails_for_rank_1", RANK_1, ".step-00000004.partial/rank-00001-of-00002.safetensors"),
        ("write_fails_for_rank_1", RANK_1, ".step-00000004.partial/rank-00001-of-00002.safetensors"),
        ("rename_fails", "error: ", ".step-00000004.partial"),
        ("fsync_of_the_folder_fails", "error: ", "step-00000004"),
    ],
)
def test_a_save_that_the_disk_refuses_ends_all_ranks_and_the_one_before_is_gone_on_from(
    fault, where, name, train, config, whole
) -> None:
    folder = folder_of(config, fault)
    done = train(f"run={fault}", fault=fault)
    assert_told_once(
        done, 1, f"{where}{folder}/checkpoints/{name}: Input/output error (EIO) while saving the checkpoint of step 4"
    )
    assert "Traceback" not in done.stderr
    assert_ended_in_time(done)
    assert_saved(folder, step=2)
    assert_goes_on(train, folder, whole, f"run={fault}", step=2)


@pytest.mark.turn(of=2, among="whole runs")
def test_an_adapter_that_the_disk_refuses_is_told_and_the_same_command_writes_it(train, config, whole) -> None:
    folder = folder_of(config, "unwritten")
    done = train("run=unwritten", fault="fsync_of_the_adapter_fails")
    assert_told_once(done, 1, f"error: The adapter can't be written to {folder}/adapter: Input/output error")
    assert "Traceback" not in done.stderr
    assert_ended_in_time(done)
    assert not [path.name for path in folder.iterdir() if "adapter" in path.name]
    assert_goes_on(train, folder, whole, "run=unwritten", step=8)


@pytest.mark.turn(of=2, among="whole runs")
def test_checkpoints_that_become_read_only_end_all_ranks_and_are_gone_on_from(train, config, whole, small_disk) -> None:
    folder = folder_of(config, "read-only")
    place = folder / "checkpoints"
    place.mkdir(parents=True)
    subprocess.run(["mount", "--bind", small_disk, place], check=True)
    try:
        done = train("run=read-only", fault="checkpoints_read_only_in_step_3")
        assert_told_once(
            done, 1, f"error: {place}/", "Read-only file system (EROFS) while saving the checkpoint of step 4"
        )
        assert "Traceback" not in done.stderr
        assert_ended_in_time(done)
        assert_saved(folder, step=2)
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        assert_goes_on(train, folder, whole, "run=read-only", step=2)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_disk_that_is_read_only_is_told_before_anything_is_loaded(train, config, small_disk) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = train("run=it", f"runs_dir={small_disk}")
    assert_told_once(done, 2, f"error: {small_disk}/it: the run's folder can't be written: Read-only file system.")
    assert "Traceback" not in done.stderr and "loaded base" not in done.stderr


@pytest.mark.turn(of=2, among="whole runs")
def test_checkpoints_that_are_moved_away_between_steps_are_begun_anew(train, config, whole) -> None:
    folder = folder_of(config, "moved")
    done = train("run=moved", fault="checkpoints_gone_in_step_3")
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    assert (folder / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert checkpoints(folder) == ["step-00000006", "step-00000008"]


@pytest.mark.turn(of=2, among="whole runs")
def test_checkpoints_that_vanish_in_a_save_end_all_ranks_and_the_run_begins_anew(train, config, whole) -> None:
    folder = folder_of(config, "vanished")
    done = train("run=vanished", fault="checkpoints_gone_in_the_save_of_step_4")
    name = ".step-00000004.partial/rank-0000"
    assert_told_once(done, 1, f"{folder}/checkpoints/{name}", ": No such file or directory (ENOENT)")
    assert "Traceback" not in done.stderr
    assert_ended_in_time(done)
    assert not (folder / "checkpoints").exists()
    done = train("run=vanished")
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    assert (folder / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
