"""What asks a run to stop, and that nothing is lost by it: the same run afterwards, to the last byte."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_lora.config.schema import Config
from dist_lora.data.loader import Loader
from dist_lora.errors import ConfigError, StopNow, StoppedOnRequest
from dist_lora.train import step as step_module
from dist_lora.train.signals import StopRequest
from dist_lora.train.step import TrainStep
from dist_lora.world.world import World
from tests.ranks.runs import chats_settings, metrics, train_command, train_until_asked

EXACT = ("step", "loss", "grad_norm", "lr")
ADAPTER = Path("it", "adapter", "adapter_model.safetensors")


def train_and_touch_stop(world: World, config: dict[str, Any], at_step: int) -> str:
    """``dist-lora train`` in whose folder STOP appears while a step is prepared."""
    batch_of = Loader.batch

    def batch(self: Loader, step: int) -> Any:
        if step + 1 == at_step and world.is_first:
            Path(config["runs_dir"], "it", "STOP").touch()
        return batch_of(self, step)

    with mock.patch.object(Loader, "batch", batch):
        return train_command(world, config)


def train_in_long_steps(world: World, config: dict[str, Any], at_step: int, at_pass: int) -> str:
    """``dist-lora train`` whose steps count as long; the last rank gets SIGUSR1 in the middle of one, if it is done."""
    pass_of = TrainStep._micro_batch

    def micro_batch(self: TrainStep, step: int, index: int, *batches: Any) -> Any:
        if (step, index) == (at_step, at_pass) and world.world_rank == world.world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return pass_of(self, step, index, *batches)

    with mock.patch.object(step_module, "LONG_STEP_S", 0.0), mock.patch.object(TrainStep, "_micro_batch", micro_batch):
        return train_command(world, config)


@pytest.fixture(scope="module")
def config(tiny_llama, tmp_path_factory) -> dict[str, Any]:
    return chats_settings(tiny_llama("llama31"), tmp_path_factory.mktemp("stop"), num_steps=10)


@pytest.fixture(scope="module")
def straight(ranks, config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    assert ranks(2).run(train_command, config | {"runs_dir": str(folder)}) == ["", ""]
    return folder


def assert_same_run(folder: Path, straight: Path) -> None:
    def lines(runs: Path) -> list[list[Any]]:
        return [[line[name] for name in EXACT] for line in metrics(runs / "it")]

    assert lines(folder) == lines(straight)
    assert (folder / ADAPTER).read_bytes() == (straight / ADAPTER).read_bytes()


def test_a_file_stop_ends_all_ranks_at_the_step_and_is_taken_away(ranks, config, straight, tmp_path) -> None:
    config = config | {"runs_dir": str(tmp_path)}
    told = ranks(2).run(train_and_touch_stop, config, 3)
    stop, saved = tmp_path / "it" / "STOP", tmp_path / "it" / "checkpoints" / "step-00000003"
    assert (
        told
        == [
            f"interrupted by the file {stop} on rank 0 at step 3/10; saved {saved}. "
            "The same command resumes from there."
        ]
        * 2
    )
    assert not stop.exists()
    assert ranks(2).run(train_command, config) == ["", ""]
    assert_same_run(tmp_path, straight)


def test_a_long_step_is_left_between_two_passes_and_begins_again(ranks, config, straight, tmp_path) -> None:
    config = config | {"runs_dir": str(tmp_path)}
    told = ranks(2).run(train_in_long_steps, config, 3, 0)
    saved = tmp_path / "it" / "checkpoints" / "step-00000002"
    assert (
        told
        == [
            f"interrupted by SIGUSR1 on rank 1 during step 3/10 (it will be redone); saved {saved}. "
            "The same command resumes from there."
        ]
        * 2
    )
    assert [line["step"] for line in metrics(tmp_path / "it")] == [1, 2]
    assert ranks(2).run(train_command, config) == ["", ""]
    assert_same_run(tmp_path, straight)


def test_a_request_in_the_last_pass_of_a_long_step_ends_it_after_the_step(ranks, config, tmp_path) -> None:
    told = ranks(2).run(train_in_long_steps, config | {"runs_dir": str(tmp_path)}, 3, 1)
    assert [text.partition(";")[0] for text in told] == ["interrupted by SIGUSR1 on rank 1 at step 3/10"] * 2


def test_the_end_of_the_job_that_the_scheduler_tells_ends_a_run_before_it(config, tmp_path, monkeypatch) -> None:
    end_s = time.time() + 9
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(end_s)))
    endless = config | {"runs_dir": str(tmp_path), "train": config["train"] | {"steps": 1_000_000}}
    with pytest.raises(
        StoppedOnRequest, match=r"interrupted by the job's end at .* \(SLURM_JOB_END_TIME\) at step \d+/1000000; saved "
    ) as raised:
        train_until_asked(Config.model_validate(endless), World.alone())
    assert time.time() < end_s
    assert raised.value.exit_code == 75
    assert metrics(tmp_path / "it")[0]["step"] == 1


def test_what_is_still_to_come_counts_before_the_end_of_the_job(monkeypatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    stop = StopRequest({"SLURM_JOB_END_TIME": "1100"})
    assert stop.reason(needed_s=94) == ""
    assert "the job's end" in stop.reason(needed_s=96)
    assert StopRequest({}).reason(needed_s=1e9) == ""


def test_an_end_of_the_job_that_is_no_number_is_told() -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME is 'tomorrow', expected a Unix time in seconds"):
        StopRequest({"SLURM_JOB_END_TIME": "tomorrow"})


def test_signals_after_the_first_change_nothing_also_on_the_way_out() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest({}) as stop:
            with stop.deferred():
                os.kill(os.getpid(), signal.SIGUSR1)
                assert stop.reason(needed_s=0) == "SIGUSR1"
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher asks again while the rank goes: it is not killed
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, before)


def test_a_hangup_that_nohup_ignores_asks_for_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest({}) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason(needed_s=0) == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_where_there_is_nothing_to_save_ends_at_once() -> None:
    try:
        with StopRequest({}), pytest.raises(StopNow, match="interrupted by SIGTERM outside of a training step"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_request_is_answered_at_once_and_once_by_the_first_rank_alone(tmp_path, capfd) -> None:
    for folder, count in ((tmp_path, 1), (None, 0)):
        with StopRequest({}) as request:
            with request.deferred(folder):
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0)
                request.say("a request to another rank")
            request.close()
        assert capfd.readouterr().err.count("asked to stop by SIGTERM: saving, then this run ends") == count
    with StopRequest({}) as request:
        with request.deferred(tmp_path):
            request.say("SIGINT on rank 1")
        assert "asked to stop by SIGINT on rank 1: saving" in capfd.readouterr().err
