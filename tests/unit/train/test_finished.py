"""A finished run that is started again: said, and left alone; it goes on where the config asks for more."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_lora.config.schema import Config
from dist_lora.run_folder.attempt import begin_attempt, read_attempt, read_summary
from dist_lora.train import command
from dist_lora.train.finished import finished_line
from dist_lora.world.world import World
from tests.ranks.runs import train_command


def text(numbers: range) -> str:
    return "".join(json.dumps({"prompt": f"say {i}", "completion": f"{i} {i}"}) + "\n" for i in numbers)


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "train.jsonl").write_text(text(range(6)))
    settings = {
        "run": "it",
        "runs_dir": str(folder),
        "model": {"name": str(tiny_llama("llama31")), "dtype": "fp32"},
        "lora": {"rank": 2},
        "data": {"train": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache")},
        "train": {"epochs": 1.0, "global_batch": 4, "micro_batch": 2, "sequence_length": 16},
        "log": {"trackers": []},
    }
    assert train_command(World.alone(), settings) == ""
    return settings


def content(folder: Path) -> dict[str, bytes]:
    """All of a run but its log, which the process that has trained still writes to."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt")
    return {str(path): path.read_bytes() for path in files}


def with_(settings: dict[str, Any], section: str, **changed: Any) -> dict[str, Any]:
    return {**settings, section: {**settings[section], **changed}}


def test_a_finished_run_is_said_to_be_and_nothing_is_loaded_or_written(finished, caplog, monkeypatch) -> None:
    folder = Path(finished["runs_dir"]) / "it"
    before, steps = content(folder), read_summary(folder)["steps"]
    monkeypatch.setattr(command, "open_base", None)  # whatever is loaded comes after it
    caplog.set_level("INFO", logger="dist_lora")
    for same in (finished, with_(finished, "train", micro_batch=1), with_(finished, "log", trackers=["tensorboard"])):
        caplog.clear()
        assert train_command(World.alone(), same) == ""
        assert f"{folder}: finished already, {steps} of {steps} steps, on 20" in caplog.text
        assert f"adapter: {folder}/adapter. Nothing is done. To train on, raise train.steps" in caplog.text
    assert content(folder) == before


def test_a_finished_run_that_took_its_adapter_s_settings_is_said_to_be_finished(finished) -> None:
    runs_dir = Path(finished["runs_dir"])
    further = {**finished, "run": "further", "lora": {"start_from": str(runs_dir / "it" / "adapter")}}
    assert train_command(World.alone(), further) == ""
    assert yaml.safe_load((runs_dir / "further" / "config.yaml").read_text())["lora"]["rank"] == 2
    assert "finished already" in finished_line(runs_dir / "further", Config.model_validate(further))
    other = with_(further, "lora", rank=3)
    assert finished_line(runs_dir / "further", Config.model_validate(other)) == ""


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_run_whose_tokenizer_was_written_since_is_looked_at_again(finished, name) -> None:
    folder, file = Path(finished["runs_dir"]) / "it", Path(finished["model"]["name"]) / name
    times = file.stat().st_mtime_ns
    os.utime(file, ns=(times, times + 10**15))
    try:
        assert finished_line(folder, Config.model_validate(finished)) == ""
    finally:
        os.utime(file, ns=(times, times))


@pytest.mark.parametrize(
    "section, changed",
    [("train", {"epochs": 2.0}), ("lora", {"rank": 3}), ("optim", {"lr": 1.0}), ("data", {"eval": 0.5}),
     ("checkpoint", {"resume": "never"})],
)  # fmt: skip
def test_a_config_that_asks_for_something_else_is_not_answered_by_the_old_run(finished, section, changed) -> None:
    other = Config.model_validate(with_({"optim": {}, "checkpoint": {}, **finished}, section, **changed))
    assert finished_line(Path(finished["runs_dir"]) / "it", other) == ""


def test_a_run_of_more_steps_goes_on_and_keeps_the_time_and_memory_of_its_first_part(finished, caplog) -> None:
    folder = Path(finished["runs_dir"]) / "it"
    first = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(first | {"seconds": 1000.0, "peak_bytes": [2**50]}))
    longer = with_(finished, "train", epochs=None, steps=first["steps"] + 1)
    assert train_command(World.alone(), longer) == ""
    summary = read_summary(folder)
    assert summary["steps"] == first["steps"] + 1 and summary["seconds"] > 1000 and summary["peak_bytes"] == [2**50]
    caplog.set_level("INFO", logger="dist_lora")
    assert train_command(World.alone(), longer) == "" and "finished already" in caplog.text
    # Other learning rates don't train a finished run again: what it has stays, once its steps are counted.
    other = {**longer, "optim": {"lr": 0.5}}
    caplog.clear()
    assert train_command(World.alone(), other) == "" and "finished already" in caplog.text
    assert read_summary(folder) == summary


def test_the_seconds_of_attempts_that_were_killed_are_summed_until_their_last_step(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert begin_attempt(tmp_path, num_steps=10, is_new=True, began_s=1000.0).former_seconds == 0.0
    metrics.touch()
    os.utime(metrics, (1030.0, 1030.0))
    assert begin_attempt(tmp_path, num_steps=10, is_new=False, began_s=2000.0).former_seconds == 30.0
    # This one is killed before its first step: the file is the former one's.
    assert begin_attempt(tmp_path, num_steps=10, is_new=False, began_s=3000.0).former_seconds == 30.0
    os.utime(metrics, (3007.5, 3007.5))
    assert begin_attempt(tmp_path, num_steps=10, is_new=False, began_s=4000.0).former_seconds == 37.5
    assert begin_attempt(tmp_path, num_steps=10, is_new=True, began_s=5000.0).former_seconds == 0.0


def test_an_attempt_that_was_killed_does_not_look_finished_and_forgets_nothing(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"steps": 5, "seconds": 7.5, "peak_bytes": [3, 9]}')
    (tmp_path / "trackers.json").write_text("{}")
    for _ in range(2):  # the second finds no summary
        attempt = begin_attempt(tmp_path, num_steps=10, is_new=False, began_s=1000.0)
        assert (attempt.num_steps, attempt.former_seconds, attempt.former_peak_bytes) == (10, 7.5, (3, 9))
        assert read_attempt(tmp_path) == attempt and read_summary(tmp_path) == {}
    assert attempt.peaks_with([4, 8]) == [4, 9] and attempt.peaks_with([1]) == [1]
    assert (tmp_path / "trackers.json").exists()
    assert begin_attempt(tmp_path, num_steps=10, is_new=True, began_s=1000.0).former_seconds == 0.0
    assert not (tmp_path / "trackers.json").exists()
