"""Evaluations of a run: what is recorded, which is the best, and when patience ends. Whole runs are of one process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dist_lora.config.schema import Config
from dist_lora.evaluation.evaluate import ExactMatch, HeldOut
from dist_lora.evaluation.tool_calls import Counts, ToolCalls
from dist_lora.run_folder.attempt import SUMMARY_FILE, read_summary
from dist_lora.run_folder.status import StatusWriter, read_status
from dist_lora.train.checkpoints import RunProgress
from dist_lora.train.command import evaluate
from dist_lora.train.evaluating import Evaluation
from dist_lora.world.world import World
from tests.ranks.runs import chats_settings, metrics, train_command

ADAPTER = Path("adapter", "adapter_model.safetensors")


def test_of_several_sets_all_tokens_count_alike() -> None:
    evaluation = Evaluation(
        {"a": HeldOut(2.0, 30), "b": HeldOut(1.0, 10)}, {"a": ExactMatch(1, 4), "b": ExactMatch(1, 1)}
    )
    values = evaluation.values()
    assert values == {
        "eval_loss": 1.75,
        "eval_perplexity": pytest.approx(math.exp(1.75)),
        "eval_exact_match": 0.4,
        "eval_loss/a": 2.0,
        "eval_perplexity/a": pytest.approx(math.exp(2.0)),
        "eval_exact_match/a": 0.25,
        "eval_loss/b": 1.0,
        "eval_perplexity/b": pytest.approx(math.exp(1.0)),
        "eval_exact_match/b": 1.0,
    }
    assert (evaluation.deciding_loss(None), evaluation.deciding_loss("b")) == (1.75, 1.0)


def test_tool_calls_are_counted_by_set_and_of_a_single_set_alone() -> None:
    calls = {"a": ToolCalls({"f": Counts(2, 1, 1, 1, 1)}, answers=2), "b": ToolCalls({"g": Counts(1, 1)}, answers=1)}
    losses = {name: HeldOut(1.0, 1) for name in calls}
    matches = {name: ExactMatch(0, 1, of_set) for name, of_set in calls.items()}
    several = Evaluation(losses, matches)
    counted = several.tool_counts()
    assert counted == several.to_json(None)["tool_calls"] == {name: of_set.as_json() for name, of_set in calls.items()}
    assert (counted["a"]["by_tool"]["f"]["wanted"], counted["b"]["wanted"]) == (2, 1)
    alone = Evaluation({"": HeldOut(1.0, 1)}, {"": matches["a"]})
    assert alone.tool_counts() == alone.to_json(None)["tool_calls"] == calls["a"].as_json()
    assert Evaluation(losses).tool_counts() == {} and "tool_calls" not in Evaluation(losses).to_json(None)


def test_a_single_set_has_the_names_and_the_number_that_it_has_alone() -> None:
    values = Evaluation({"": HeldOut(0.1 + 0.2, 7)}).values()
    assert values == {"eval_loss": 0.1 + 0.2, "eval_perplexity": math.exp(0.1 + 0.2)}
    assert (Evaluation({}).values(), Evaluation({}).deciding_loss(None)) == ({}, None)


def test_patience_counts_evaluations_since_the_best_and_none_before_the_first_step() -> None:
    progress = RunProgress()
    assert not progress.evaluated(0.5) and (progress.best_step, progress.evaluated_step) == (None, 0)
    found = []
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0), (4, math.nan), (5, 1.0), (6, 1.5)):
        progress.step = step
        found.append((progress.evaluated(loss), progress.stale_evaluations, progress.best_step))
    assert found == [(True, 0, 1), (True, 0, 2), (False, 1, 2), (False, 2, 2), (True, 0, 5), (False, 1, 5)]
    assert (
        progress.is_out_of_patience(1) and not progress.is_out_of_patience(2) and not progress.is_out_of_patience(None)
    )
    progress.step = 7
    assert not progress.evaluated(None) and (progress.stale_evaluations, progress.evaluated_step) == (1, 7)


def with_(settings: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {**settings, **{k: {**settings.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}}


@pytest.fixture(scope="module")
def still(tiny_llama, tmp_path_factory) -> dict[str, Any]:
    """Settings of a run whose loss stays what it is, to the bit: nothing is added to a weight that would not be rounded off."""
    folder = tmp_path_factory.mktemp("still")
    settings = chats_settings(tiny_llama("llama31"), folder, num_steps=8)
    return with_(
        settings,
        runs_dir=str(folder),
        data={"eval": settings["data"]["train"]},
        optim={"lr": 1e-30, "schedule": "constant", "warmup_steps": 0},
        checkpoint={"keep_best": True, "keep": 1, "every": 100},
        eval={"every": 1, "patience": 2},
    )


def evaluated(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ended(still) -> Path:
    assert train_command(World.alone(), still) == ""
    return Path(still["runs_dir"]) / "it"


def test_a_run_ends_well_once_its_patience_is_used_up_and_its_adapter_is_the_best(still, ended) -> None:
    assert len(metrics(ended)) == 3 and evaluated(ended) == [1, 2, 3]
    assert [path.name for path in sorted((ended / "checkpoints").glob("step-*"))] == ["step-00000001", "step-00000003"]
    why = "ended at step 3 of 8: 2 evaluations in a row had no lower loss than at step 1 (eval.patience)"
    assert read_summary(ended)["ended_early"] == why
    StatusWriter(ended, {}).end(None)
    status = read_status(ended)
    assert status is not None and (status.code, status.is_final, status.reason) == (0, True, f"done: {why}")
    one = with_(still, run="one", train={"steps": 1}, eval={"patience": None})
    assert train_command(World.alone(), one) == ""
    assert (ended / ADAPTER).read_bytes() == (ended.parent / "one" / ADAPTER).read_bytes()


def test_started_again_it_does_nothing_and_with_more_patience_it_goes_on(still, ended, caplog) -> None:
    caplog.set_level("INFO", logger="dist_lora")
    before = (ended / ADAPTER).stat().st_mtime_ns
    # The second one is looked at as a resume, since a setting of it was changed.
    for same in (still, with_(still, eval={"batch": 2})):
        caplog.clear()
        assert train_command(World.alone(), same) == ""
        assert (
            f"{ended}: finished already, on 20" in caplog.text
            and "it ended at step 3 of 8: 2 evaluations" in caplog.text
        )
        assert "raise eval.patience" in caplog.text and (ended / ADAPTER).stat().st_mtime_ns == before
    # One that was killed before its adapter was written has that to do, and no step.
    (ended / SUMMARY_FILE).unlink()
    assert train_command(World.alone(), still) == ""
    assert (len(metrics(ended)), evaluated(ended)) == (3, [1, 2, 3]) and "ended_early" in read_summary(ended)
    assert train_command(World.alone(), with_(still, eval={"patience": 4})) == ""
    assert evaluated(ended) == [1, 2, 3, 4, 5] and read_summary(ended)["ended_early"].startswith(
        "ended at step 5 of 8: 4 "
    )


def test_an_answer_is_taken_out_of_both_texts_and_those_without_one_are_told(still, tmp_path, caplog) -> None:
    lines = [{"prompt": "say", "completion": text} for text in ("so 5", "so six", "so 7")]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = {"exact_match": True, "answer": "[0-9]+", "max_new_tokens": 1, "patience": None}
    settings = with_(still, data={"eval": {"few": str(tmp_path / "eval.jsonl")}}, eval=section)
    out = tmp_path / "answers.jsonl"
    found = evaluate(Config.model_validate(settings), World.alone(), adapter=None, predictions_file=out)
    assert (
        found["exact_match"] == {"correct": 0, "total": 3}
        and found["sets"]["few"]["exact_match"] == found["exact_match"]
    )
    assert (
        "eval.answer: '[0-9]+' matches nothing in 1 of 3 expected answers of data.eval.few, like 'so six'"
        in caplog.text
    )
    assert [json.loads(line)["set"] for line in out.read_text().splitlines()] == ["few"] * 3
