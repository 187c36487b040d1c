"""The lines of a run's metrics: one a step, whatever ended the process that wrote them."""

from __future__ import annotations

import json
import math

import pytest

from dist_lora.errors import SaveError
from dist_lora.run_folder.attempt import EVALUATIONS_FILE, METRICS_FILE, TOOL_CALLS_FILE
from dist_lora.run_folder.records import read_lines, truncate_metrics
from dist_lora.train.meter import Meter


def line(step: int, loss: float = 1.0) -> dict[str, float]:
    return {"step": step, "loss": loss, "lr": 0.1, "tokens_per_s": 5.0, "model_flops_per_s": 1e12}


def test_a_run_that_goes_on_from_an_earlier_step_writes_each_step_once(tmp_path) -> None:
    for first, last in ((1, 5), (4, 7)):  # the first process died in step 6, its last checkpoint is of step 3
        truncate_metrics(tmp_path, last_step=first - 1, last_evaluation=first - 1)
        meter = Meter(tmp_path, trackers=[], settings={}, every=1, first_step=first, num_steps=7)
        for step in range(first, last + 1):
            meter.step(line(step, loss=step / 8))
        meter.close()
        if first == 1:
            with (tmp_path / METRICS_FILE).open("a") as file:
                file.write('{"step": 6, "lo')
    lines = [json.loads(text) for text in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [(of["step"], of["loss"]) for of in lines] == [(step, step / 8) for step in range(1, 8)]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_evaluations_are_written_down_and_repeated_with_the_steps_before_them(tmp_path) -> None:
    for first, last in ((1, 5), (4, 6)):
        truncate_metrics(tmp_path, last_step=first - 1, last_evaluation=first - 1)
        meter = Meter(tmp_path, trackers=[], settings={}, every=1, first_step=first, num_steps=6)
        for step in range(first, last + 1):
            meter.step(line(step))
            if step % 2 == 0:
                meter.evaluated(step, {"eval_loss": step / 8 + first})
        meter.close()
    evaluations = list(read_lines(tmp_path / EVALUATIONS_FILE))
    assert evaluations == [
        {"step": 2, "eval_loss": 1.25}, {"step": 4, "eval_loss": 4.5}, {"step": 6, "eval_loss": 4.75},
    ]  # fmt: skip


def test_an_evaluation_that_no_checkpoint_knows_of_is_dropped_though_its_step_is_saved(tmp_path) -> None:
    """The step was saved, its evaluation was made up for by the next start, and that one was killed: it comes again."""
    meter = Meter(tmp_path, trackers=[], settings={}, every=1, first_step=1, num_steps=6)
    for step in range(1, 5):
        meter.step(line(step))
        if step % 2 == 0:
            meter.evaluated(step, {"eval_loss": 1.0}, tool_calls={"wanted": step})
    meter.close()
    truncate_metrics(tmp_path, last_step=4, last_evaluation=2)
    assert [each["step"] for each in read_lines(tmp_path / METRICS_FILE)] == [1, 2, 3, 4]
    assert [each["step"] for each in read_lines(tmp_path / EVALUATIONS_FILE)] == [2]
    assert list(read_lines(tmp_path / TOOL_CALLS_FILE)) == [{"step": 2, "tool_calls": {"wanted": 2}}]


def test_an_evaluation_that_the_disk_refuses_is_told_with_its_file(tmp_path) -> None:
    meter = Meter(tmp_path, trackers=[], settings={}, every=1, first_step=1, num_steps=6)
    (tmp_path / EVALUATIONS_FILE).mkdir()
    with pytest.raises(SaveError, match=r"evaluations.jsonl: the evaluation at step 2 can't be written: Is a dir"):
        meter.evaluated(2, {"eval_loss": 1.0})
    meter.close()


def test_metrics_that_are_not_there_are_not_made_by_dropping_lines(tmp_path) -> None:
    truncate_metrics(tmp_path, last_step=3, last_evaluation=3)
    assert not (tmp_path / METRICS_FILE).exists()


def test_a_loss_that_is_no_number_is_written_as_such(tmp_path) -> None:
    meter = Meter(tmp_path, trackers=[], settings={}, every=1, first_step=1, num_steps=1)
    meter.step(line(1, loss=math.nan))
    meter.close()
    assert math.isnan(json.loads((tmp_path / METRICS_FILE).read_text())["loss"])


def test_steps_between_two_lines_of_the_log_are_in_the_metrics_all_the_same(tmp_path, capsys) -> None:
    meter = Meter(tmp_path, trackers=[], settings={}, every=3, first_step=1, num_steps=7)
    for step in range(1, 8):
        meter.step(line(step))
    meter.close()
    told = [text.split()[1] for text in capsys.readouterr().err.splitlines()]
    assert told == ["3/7", "6/7", "7/7"]
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 7
