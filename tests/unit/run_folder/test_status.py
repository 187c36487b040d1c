"""The status file that a run leaves for whoever restarts it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from dist_lora.errors import (
    CheckpointError,
    ConfigError,
    OutOfMemory,
    PlanError,
    RankError,
    RunInUse,
    SaveError,
    StopNow,
    StoppedForGood,
    StoppedOnRequest,
    TrainingError,
)
from dist_lora.run_folder import status as status_module
from dist_lora.run_folder.attempt import begin_attempt
from dist_lora.run_folder.folder import _lock, close_run_folder
from dist_lora.run_folder.status import Status, StatusWriter, attempt_of, describe_status, read_status

JOB = {"SLURM_JOB_ID": "77"}


def saved(folder: Path, step: int) -> None:
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def mark(folder: Path, restart: int = 0) -> StatusWriter:
    return StatusWriter(folder, JOB | ({"SLURM_RESTART_COUNT": str(restart)} if restart else {}))


def test_a_shell_reads_the_mark_word_by_word(tmp_path: Path) -> None:
    saved(tmp_path, 120)
    mark(tmp_path).begin()
    mark(tmp_path, 0).end(StoppedOnRequest("interrupted by SIGUSR1\nat step 120"))
    script = 'read -r code again step stalled attempt reason < "$1"; printf "%s|" "$code" "$again" "$step" "$stalled" "$attempt" "$reason"'
    told = subprocess.run(["bash", "-c", script, "-", tmp_path / "status"], capture_output=True, text=True, check=True)
    assert told.stdout == "75|again|120|1|77.0|interrupted by SIGUSR1 at step 120|"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".status")] == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (ConfigError("x"), 2), (PlanError("x"), 3), (CheckpointError("x"), 4), (StopNow("x"), 75),
     (ValueError("x"), 1), (RankError("x", exit_code=4), 4), (KeyboardInterrupt(), 1)],
)  # fmt: skip
def test_the_mark_has_the_exit_code_of_the_error(tmp_path: Path, error: BaseException | None, code: int) -> None:
    mark(tmp_path).end(error)
    found = read_status(tmp_path)
    assert found is not None and found.code == code


@pytest.mark.parametrize(
    ("error", "is_final"),
    [(None, True), (ConfigError("x"), True), (PlanError("x"), True), (CheckpointError("x"), True),
     (StopNow("x"), False), (StoppedOnRequest("x"), False), (StoppedForGood("x"), True), (ValueError("x"), False),
     (RankError("x"), False), (TrainingError("x"), True), (OutOfMemory("x"), True), (SaveError("x"), False)],
)  # fmt: skip
def test_the_mark_says_whether_starting_again_makes_sense(
    tmp_path: Path, error: BaseException | None, is_final: bool
) -> None:
    mark(tmp_path).end(error)
    found = read_status(tmp_path)
    assert found is not None and found.is_final == is_final


def test_attempts_without_a_newer_checkpoint_are_counted_until_one_has_come(tmp_path: Path) -> None:
    stalled = []
    for restart, step in enumerate([0, 0, 40, 40, 40, 80]):
        mark(tmp_path, restart).begin()
        if step and not (tmp_path / "checkpoints" / f"step-{step:08d}").exists():
            saved(tmp_path, step)
        if restart != 4:  # which is killed before it can leave word
            mark(tmp_path, restart).end(StoppedOnRequest("asked"))
            found = read_status(tmp_path)
            assert found is not None
            stalled.append(found.stalled)
    assert stalled == [1, 2, 0, 1, 0]


def test_a_killed_attempt_counts_when_the_next_begins(tmp_path: Path) -> None:
    for restart in range(3):
        mark(tmp_path, restart).begin()
    found = read_status(tmp_path)
    assert found is not None and (found.code, found.stalled) == (None, 2)
    saved(tmp_path, 3)
    mark(tmp_path, 3).begin()
    found = read_status(tmp_path)
    assert found is not None and (found.step, found.stalled, found.attempt) == (3, 0, "77.3")


def test_another_job_begins_to_count_anew(tmp_path: Path) -> None:
    for restart in range(3):
        mark(tmp_path, restart).begin()
    StatusWriter(tmp_path, {"SLURM_JOB_ID": "78"}).begin()
    found = read_status(tmp_path)
    assert found is not None and (found.stalled, found.attempt) == (0, "78.0")


def test_an_attempt_that_ends_before_it_has_begun_counts_too(tmp_path: Path) -> None:
    for restart in range(2):
        mark(tmp_path / "run", restart).end(StopNow("while the weights were fetched"))
    found = read_status(tmp_path / "run")
    assert found is not None and (found.code, found.stalled) == (75, 2)


def test_a_mistake_by_hand_makes_no_folder(tmp_path: Path) -> None:
    StatusWriter(tmp_path / "run", {}).end(ConfigError("no such model"))
    assert not (tmp_path / "run").exists()


def test_a_rank_that_its_launcher_ends_leaves_the_reason_alone(tmp_path: Path) -> None:
    mark(tmp_path / "run").end(ConfigError("no such model"))
    mark(tmp_path / "run").end(StopNow("interrupted by SIGTERM"))
    found = read_status(tmp_path / "run")
    assert found is not None and (found.code, found.is_final, found.reason) == (2, True, "no such model")
    mark(tmp_path / "run", 1).end(StopNow("interrupted by SIGTERM"))
    found = read_status(tmp_path / "run")
    assert found is not None and (found.code, found.attempt) == (75, "77.1")


def test_who_finds_a_run_in_use_leaves_its_mark_alone(tmp_path: Path) -> None:
    mark(tmp_path).begin()
    mark(tmp_path, 1).end(RunInUse("process 1 is writing"))
    found = read_status(tmp_path)
    assert found is not None and (found.code, found.attempt) == (None, "77.0")


def test_a_probe_of_the_lock_keeps_no_run_from_it(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as probe:
        fcntl.flock(probe, fcntl.LOCK_SH)
        threading.Timer(0.2, lambda: fcntl.flock(probe, fcntl.LOCK_UN)).start()
        _lock(tmp_path)
    close_run_folder()


def test_a_start_that_fails_before_it_has_the_lock_leaves_the_mark_of_who_has_it(tmp_path: Path, monkeypatch) -> None:
    mark(tmp_path).begin()
    _lock(tmp_path)
    mark(tmp_path, 1).end(ConfigError("no such model"))
    found = read_status(tmp_path)
    assert found is not None and (found.code, found.attempt) == (None, "77.0")
    monkeypatch.setattr(status_module, "_opened", {tmp_path})  # as every rank of the run has noted
    mark(tmp_path).end(ConfigError("no such adapter"))
    found = read_status(tmp_path)
    assert found is not None and (found.code, found.reason) == (2, "no such adapter")


@pytest.mark.parametrize(
    "text", ["", "75", "x again 1 0 77.0 why", "75 again 1 0 77.0", "75 again 1 x 77.0 why", "\0\0"]
)
def test_a_mark_that_is_none_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status").write_text(text)
    assert read_status(tmp_path) is None


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mark(tmp_path / "file").begin()
    mark(tmp_path / "file" / "run").end(ValueError("x"))


@pytest.mark.parametrize(
    ("environment", "attempt"),
    [({}, "-"), (JOB, "77.0"), (JOB | {"SLURM_RESTART_COUNT": "2"}, "77.2"), ({"TORCHELASTIC_RUN_ID": "my run"}, "my_run")],
)  # fmt: skip
def test_an_attempt_is_named_by_its_job_and_start(environment: dict[str, str], attempt: str) -> None:
    assert attempt_of(environment) == attempt


@pytest.mark.parametrize(
    ("code", "restarts", "attempt", "ends"),
    [(2, "1", "job", True), (3, "1", "job", True), (4, "1", "job", True), (75, "2", "job", True),
     (1, "1", "job", False), (0, "1", "job", False), (None, "1", "job", False),
     (2, "0", "job", False), (2, "1", "another", False)],
)  # fmt: skip
def test_a_restarted_worker_ends_where_starting_again_changes_nothing(
    tmp_path: Path, code: int | None, restarts: str, attempt: str, ends: bool
) -> None:
    (tmp_path / "status").write_text(Status(code, False, 0, 0, attempt, "why").line())
    found = StatusWriter(
        tmp_path, {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": restarts}
    ).ended_before()
    assert (found is not None) == ends


# `dist-lora status`


def test_a_run_that_was_not_begun_is_told(tmp_path: Path) -> None:
    told = describe_status(tmp_path / "run")
    assert (told.text, told.exit_code) == (f"{tmp_path}/run: not started", 0)


def test_a_run_that_has_ended_is_told_with_its_code(tmp_path: Path) -> None:
    saved(tmp_path, 7)
    mark(tmp_path).end(StoppedOnRequest("interrupted by SIGTERM"))
    told = describe_status(tmp_path)
    assert (told.text, told.exit_code) == (
        f"{tmp_path}: step 7 is saved; exit code 75: interrupted by SIGTERM",
        75,
    )


def test_a_run_at_work_is_told_from_a_killed_one_by_its_lock(tmp_path: Path) -> None:
    mark(tmp_path).begin()
    _lock(tmp_path)
    assert "running since 20" in describe_status(tmp_path).text and describe_status(tmp_path).exit_code == 0
    killed = tmp_path / "killed"
    killed.mkdir()
    mark(killed).begin()
    told = describe_status(killed)
    assert "killed: it ran since 20" in told.text and told.exit_code == 1


def test_what_was_left_before_a_start_counts_as_nothing(tmp_path: Path) -> None:
    mark(tmp_path).end(StoppedOnRequest("earlier"))
    os.utime(tmp_path / "status", (time.time() - 60,) * 2)
    assert describe_status(tmp_path).exit_code == 75
    told = describe_status(tmp_path, since_s=time.time())
    assert (told.exit_code, told.text) == (1, f"{tmp_path}: ended before it opened the run's folder")


def test_a_run_at_work_is_told_with_its_step_its_loss_and_the_time_left(tmp_path: Path) -> None:
    mark(tmp_path).begin()
    _lock(tmp_path)
    begin_attempt(tmp_path, num_steps=100, is_new=True, began_s=1000.0)
    assert describe_status(tmp_path).progress is None and "; step" not in describe_status(tmp_path).text
    lines = [{"step": step, "loss": 2.0 - step / 100, "step_s": 1.0 if step < 41 else 3.0} for step in range(1, 61)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "lo')
    told = describe_status(tmp_path)
    assert told.text.endswith("; step 60/100, loss 1.4000, about 2 min left"), "by the mean of the last 20"
    assert told.to_json()["progress"] == {"step": 60, "num_steps": 100, "loss": 1.4, "left_s": 120.0}
    (tmp_path / "attempt.json").unlink()  # a run of an earlier version
    assert describe_status(tmp_path).progress is None
