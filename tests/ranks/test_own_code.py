"""Callbacks and metrics of a user's own in whole runs on two ranks."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from dist_lora.checkpoint.manifest import read_manifest
from dist_lora.config.schema import Config
from dist_lora.evaluation.own_metrics import Scores, own_metrics
from dist_lora.evaluation.predictions import Prediction
from dist_lora.train import command
from dist_lora.world.world import World
from tests import own
from tests.ranks.runs import chats_settings, metrics, train_command


def settings_of(base: Path, folder: Path, *, num_steps: int) -> dict[str, Any]:
    """A run with a metric and a callback, evaluated at its end, of which every second step is saved."""
    settings = chats_settings(base, folder, num_steps=num_steps)
    settings["data"] |= {"eval": 0.3}
    settings["train"] |= {"callbacks": ["tests.own:Notes"]}
    return settings | {
        "runs_dir": str(folder / "runs"),
        "checkpoint": {"every": 2},
        "eval": {"every": 100, "metrics": ["tests.own:length"], "max_new_tokens": 4},
    }


@pytest.fixture(scope="module")
def settings(ranks, tiny_llama, tmp_path_factory) -> dict[str, Any]:
    """Of a run that is asked to stop in its third step, and then goes on to its fourth and last."""
    made = settings_of(tiny_llama("llama31"), tmp_path_factory.mktemp("own"), num_steps=4)
    (stopped, also) = ranks(2).run(train_command, made, 3)
    assert "saved" in stopped and also == stopped
    assert ranks(2).run(train_command, made) == ["", ""]
    return made


def test_each_hook_is_called_once_in_order_with_what_the_run_has_written(settings) -> None:
    folder = Path(settings["runs_dir"]) / "it"
    notes = [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
    lines = metrics(folder)
    saved = [["on_save", step, str(folder / "checkpoints" / f"step-{step:08d}"), True] for step in (0, 2, 3, 4)]
    assert [note for note in notes if note[0] == "on_save"] == saved
    (evaluation,) = (json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines())
    assert [note for note in notes if note[0] != "on_save"] == [
        ["on_start", 1, 4, "it"],
        *(["on_step", line] for line in lines[:3]),
        ["on_start", 4, 4, "it"],
        ["on_step", lines[3]],
        ["on_evaluation", evaluation],
        ["on_end", json.loads((folder / "summary.json").read_text())],
    ]


def test_the_hash_of_each_module_is_kept_with_the_run_and_the_checkpoint(settings) -> None:
    folder = Path(settings["runs_dir"]) / "it"
    expected = hashlib.sha256(Path(own.__file__).read_bytes()).hexdigest()
    named = dict.fromkeys(("eval.metrics tests.own:length", "train.callbacks tests.own:Notes"), expected)
    assert json.loads((folder / "summary.json").read_text())["own_code"] == named
    assert read_manifest(folder / "checkpoints" / "step-00000004").progress["own_code"] == named


def test_the_mean_of_a_metric_is_that_of_the_answers_of_one_process(settings, tmp_path) -> None:
    folder = Path(settings["runs_dir"]) / "it"
    (evaluation,) = (json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines())
    predictions = tmp_path / "predictions.jsonl"
    found = command.evaluate(
        Config.model_validate(settings), World.alone(), adapter=folder / "adapter", predictions_file=predictions
    )
    lengths = [len(json.loads(line)["generated"]) for line in predictions.read_text().splitlines()]
    assert evaluation["eval_length"] == found["length"] == sum(lengths) / len(lengths)
    assert "eval_exact_match" not in evaluation and sum(lengths) > 0


def means_of(world: World, num_samples: int) -> dict[str, float]:
    """Of values that no sum of floats adds up exactly, judged as an evaluation deals them out."""
    config = {"run": "a", "model": {"name": "b"}, "data": {"train": "c"}, "eval": {"metrics": ["tests.own:prompted"]}}
    scores = Scores(own_metrics(Config.model_validate(config)), num_samples=num_samples, world=world)
    for sample in range(world.world_rank, num_samples, world.world_size):
        scores.add(sample, Prediction("p" * sample, "", "", is_correct=False))
    return scores.means()


def test_a_mean_is_the_same_number_on_any_number_of_ranks(ranks) -> None:
    exact = float(sum(Fraction(1 / (1 + sample)) for sample in range(1000))) / 1000
    for size in (2, 3):
        assert ranks(size).run(means_of, 1000) == [{"prompted": exact}] * size
    assert means_of(World.alone(), 1000) == {"prompted": exact}
