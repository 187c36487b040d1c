"""Tool calls of generated answers are counted the same on one process and on two, by ``eval`` and while training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import AutoTokenizer

from dist_lora.config.schema import Config
from dist_lora.evaluation import evaluate as evaluate_module
from dist_lora.train import command
from dist_lora.world.world import World
from tests.ranks.pool import RankFailed
from tests.ranks.runs import train_command

F, G = '{"name": "f", "parameters": {"a": 1}}', '{"name": "g", "parameters": {}}'
# What is asked, what is expected, what the model is made to answer.
SAMPLES = [
    ("q0", F, "[f(a=1)]"),
    ("q1", F, '{"name": "f", "arguments": {"a": 2}}'),
    ("q2", G, F),
    ("q3", G, "no idea"),
    ("q4", F, F[:-1]),
    ("q5", "a text", "a text"),
    ("q6", "a text", G),
]
WANTED = {
    "wanted": 5, "valid": 3, "right_name": 2, "right_arguments": 1, "missing": 2, "unwanted": 1,
    "answers": 7, "broken": 1, "without": 2, "called_without": 1,
    "by_tool": {
        "f": {"wanted": 3, "valid": 2, "right_name": 2, "right_arguments": 1, "missing": 1, "unwanted": 0},
        "g": {"wanted": 2, "valid": 1, "right_name": 0, "right_arguments": 0, "missing": 1, "unwanted": 1},
    },
}  # fmt: skip


def answering(base: str) -> Any:
    """In place of generation: the answers of ``SAMPLES``, each to its own prompt."""
    tokenizer = AutoTokenizer.from_pretrained(base)

    def generate(model: Any, prompts: Sequence[list[int]], **options: Any) -> list[list[int]]:
        asked = [tokenizer.decode(prompt) for prompt in prompts]
        answers = [next(answer for question, _, answer in SAMPLES if question in text) for text in asked]
        return [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]

    return mock.patch.object(evaluate_module, "generate", generate)


def evaluated(world: World, settings: dict[str, Any]) -> dict[str, Any]:
    """What ``dist-lora eval`` prints."""
    with answering(settings["model"]["name"]):
        return command.evaluate(Config.model_validate(settings), world, adapter=None)


def trained(world: World, settings: dict[str, Any]) -> None:
    """``dist-lora train``."""
    with answering(settings["model"]["name"]):
        train_command(world, settings)


@pytest.fixture(scope="module")
def settings(tiny_llama, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("calls")
    chats = [[{"role": "user", "content": asked}, {"role": "assistant", "content": text}] for asked, text, _ in SAMPLES]
    (folder / "data.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return {
        "run": "it",
        "runs_dir": str(folder),
        "model": {"name": str(tiny_llama("llama31")), "dtype": "fp32"},
        "lora": {"rank": 4},
        "data": {"train": f"{folder}/data.jsonl", "eval": f"{folder}/data.jsonl", "cache_dir": f"{folder}/cache"},
        "train": {"steps": 2, "global_batch": 2, "micro_batch": 1, "packing": False, "sequence_length": 128},
        "eval": {"every": 1, "tool_calls": True, "batch": 2},
        "log": {"trackers": [], "every": 100},
    }


def test_eval_counts_the_same_on_one_process_and_on_two(ranks, settings) -> None:
    results = [*ranks(1).run(evaluated, settings), *ranks(2).run(evaluated, settings)]
    assert [result["tool_calls"] for result in results] == [WANTED] * 3
    assert not any("exact_match" in result for result in results)
    both = ranks(2).run(evaluated, {**settings, "eval": {**settings["eval"], "exact_match": True}})
    assert [(result["tool_calls"], result["exact_match"]) for result in both] == [
        (WANTED, {"correct": 1, "total": 7})
    ] * 2


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_evaluations_of_a_run_have_the_shares_and_a_file_of_their_own_the_counts_by_tool(
    num_ranks, ranks, settings
) -> None:
    ranks(num_ranks).run(trained, {**settings, "run": f"on-{num_ranks}"})
    file = Path(settings["runs_dir"]) / f"on-{num_ranks}" / "evaluations.jsonl"
    for line in map(json.loads, file.read_text().splitlines()):
        shares = {key: value for key, value in line.items() if key.startswith("eval_tool")}
        assert shares == {
            "eval_tool_valid": 3 / 5,
            "eval_tool_right_name": 2 / 5,
            "eval_tool_right_arguments": 1 / 5,
            "eval_tool_missing": 2 / 5,
            "eval_tool_unwanted": 1 / 2,
        }
        assert "eval_exact_match" not in line
        assert "tool_calls" not in line
    assert len(file.read_text().splitlines()) == 2
    counted = [json.loads(line) for line in file.with_name("tool_calls.jsonl").read_text().splitlines()]
    assert counted == [{"step": step, "tool_calls": WANTED} for step in (1, 2)]


def test_held_out_answers_without_any_call_end_all_ranks_before_a_step(ranks, settings, tmp_path) -> None:
    (tmp_path / "texts.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "q5"}, {"role": "assistant", "content": "a"}]}\n'
    )
    data = {**settings["data"], "eval": f"{tmp_path}/texts.jsonl"}
    for function in (evaluated, trained):
        with pytest.raises(RankFailed) as failed:
            ranks(2).run(function, {**settings, "run": "none", "data": data})
        assert "eval.tool_calls: data.eval has 1 expected answer, and none calls a tool" in failed.value.texts[0]
        assert all("eval.tool_calls" in text for text in failed.value.texts)
    assert not (Path(settings["runs_dir"]) / "none" / "metrics.jsonl").exists()
