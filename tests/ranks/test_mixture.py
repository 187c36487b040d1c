"""A run over a mixture of sets goes on with the same batches on any number of ranks; other weights are another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.runs import chats_settings, metrics, train_command

NUM_STEPS, STOP_AT = 8, 3


def settings_of(base: Path, folder: Path, weights: tuple[float, ...] = (0.5, 0.3, 0.2)) -> dict[str, Any]:
    """Settings of a run over chats, questions with columns of other names, and token ids, by their targets, packed."""
    settings = chats_settings(base, folder, num_steps=NUM_STEPS)
    questions = [{"question": f"{i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(9)]
    ids = [[1 + (7 * i + k) % 50 for k in range(3 + 5 * i % 17)] for i in range(6)]
    rows = {"questions": questions, "ids": [{"input_ids": one, "loss_mask": [0, *[1] * (len(one) - 1)]} for one in ids]}
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sets = [
        {"path": settings["data"]["train"]},
        {"path": str(folder / "questions.jsonl"), "columns": {"prompt": "question", "completion": "answer"}},
        {"path": str(folder / "ids.jsonl"), "format": "tokens"},
    ]
    train = [one | {"weight": weight} for one, weight in zip(sets, weights, strict=True)]
    return settings | {
        "data": settings["data"] | {"train": train, "mix": "target_tokens"},
        "train": settings["train"] | {"packing": True},
    }


@pytest.mark.slow
def test_a_mixture_saved_on_two_ranks_goes_on_with_the_same_batches_on_one_three_and_zero3(
    ranks, tiny_llama, tmp_path
) -> None:
    base = tiny_llama("llama31")
    settings = settings_of(base, tmp_path)
    assert ranks(2).run(train_command, settings | {"runs_dir": str(tmp_path / "straight")}) == ["", ""]
    straight = metrics(tmp_path / "straight" / "it")
    said = ranks(2).run(train_command, settings | {"runs_dir": str(tmp_path / "stopped")}, STOP_AT)
    assert all(f"at step {STOP_AT}/{NUM_STEPS}" in text for text in said)
    for size, engine in ((1, "none"), (3, "fsdp2"), (2, "zero3")):
        shutil.copytree(tmp_path / "stopped", tmp_path / str(size))
        other = {"runs_dir": str(tmp_path / str(size)), "parallel": {"engine": engine}}
        ranks(size).run(train_command, settings | other)
        found = metrics(tmp_path / str(size) / "it")
        for name in ("step", "epoch", "target_tokens", "tokens"):
            assert [line[name] for line in found] == [line[name] for line in straight]
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in straight], rel=1e-5)
    other = settings_of(base, tmp_path, (0.5, 0.4, 0.1)) | {"runs_dir": str(tmp_path / "stopped")}
    with pytest.raises(
        Exception, match=r"data\.train: .* was trained on other samples: .* or a weight of its sets changed"
    ):
        ranks(2).run(train_command, other)
