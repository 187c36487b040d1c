"""`data` shows what a run's data are, of a model without weights, and `train` warns of what it shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dist_lora.overview.pictures import BAR_WIDTH
from tests.e2e.runs import run, write_config, write_lines


def chat(asked: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], "id": asked}


@pytest.fixture(scope="module")
def config(tiny_llama, tmp_path_factory) -> Path:
    """Ten samples of which one is a copy and one is cut, two held-out ones of which one is trained on; no weights."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(tiny_llama("llama31"), folder / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    chats = [chat(f"say {i}", "x" * (i + 1)) for i in range(8)]
    train = [*chats, chats[2], chat("more", "y\n" * 60)]
    return write_config(
        folder / "config.yaml",
        run="a",
        runs_dir=str(folder / "runs"),
        model={"name": str(folder / "base")},
        data={
            "train": str(write_lines(folder / "train.jsonl", train)),
            "eval": str(write_lines(folder / "eval.jsonl", [chat("new", "z"), chats[5]])),
            "cache_dir": str(folder / "cache"),
        },
        train={"epochs": 3, "global_batch": 2, "micro_batch": 1, "sequence_length": 64, "packing": True},
        machine={"gpu": "a100-80gb", "gpus_per_node": 1},
        parallel={"engine": "none"},
        log={"trackers": []},
    )


def test_counts_lengths_duplicates_samples_steps_and_hours_are_printed(config) -> None:
    done = run("data", config, "--samples", 2)
    assert done.returncode == 0, done.stderr
    train, rest = done.stdout.split("data.eval  ")
    held_out, training = rest.split("training  ")
    assert "  samples     10\n" in train
    assert "  truncated   1 of 10 samples, to 64 tokens: 1 lost the end of an answer and its end token\n" in train
    assert "  duplicates  1 sample equals an earlier one (10.0%): 9 equals 3\n" in train
    assert "  remark      column 'id' is not used (in 10 of 10 samples)\n" in train
    assert "█" * BAR_WIDTH in train and "█" * (BAR_WIDTH + 1) not in train
    assert "  in train    1 of 2 samples are also in data.train (sample 2 is sample 6 there)" in held_out
    assert "packed sequences of " in training and " an epoch at global_batch 2\n" in training
    assert "steps in all, 3 epochs (train.epochs: 3)\n" in training and " on 1 x a100-80gb, by the plan: " in training
    first, last = training.split("\nSample ")[1:]
    assert first.startswith("1: 30 tokens, 2 trained on") and "⟦x<|eot_id|>⟧" in first
    assert last.startswith("10: 64 tokens, 37 trained on") and "⟦y⏎\ny⏎\n" in last
    assert not (config.parent / "runs").exists()


def test_json_has_the_same_and_train_the_same_steps_and_warning(config, tiny_llama, here) -> None:
    done = here("data", config, "--json", "--samples", 1, "train.packing=false")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    train, held_out = told["sets"]["data.train"], told["sets"]["data.eval"]
    assert train["samples"]["kept"] == 10 and train["samples"]["num_truncated"] == 1
    assert train["duplicates"] == {"samples": 1, "examples": [[9, 3]]}
    assert held_out["in_train"] == {"samples": 1, "examples": [[2, 6]]}
    assert train["lengths"]["p0"] == 30 and train["lengths"]["p100"] == 64
    assert sum(number for *_, number in train["histogram"]) == 10
    assert told["training"]["steps"] == 15 and told["training"]["sequences_per_epoch"] == 10
    assert told["time"]["hours"][0] == pytest.approx(15 * told["time"]["step_s"][0] / 3600)
    (sample,) = told["samples"]
    assert [piece["is_target"] for piece in sample["pieces"]] == [False, True]
    assert sample["pieces"][1]["text"] == "x<|eot_id|>"
    # A mixture: of its sequences a quarter are of the first set, which ends last.
    files = [str(config.parent / name) for name in ("train.jsonl", "eval.jsonl")]
    sets = f"data.train=[{{path: {files[0]}, weight: 1}}, {{path: {files[1]}, weight: 3}}]"
    done = here("data", config, "--json", "--samples", 1, "train.packing=false", sets, "data.eval=null")
    assert done.returncode == 0, done.stderr
    mixed = json.loads(done.stdout)["training"]
    means = [facts["tokens"] / facts["samples"]["kept"] for facts in (train, held_out)]
    assert mixed["sequences_per_epoch"] == pytest.approx(40, abs=4)
    assert mixed["tokens_per_sequence"] == pytest.approx((means[0] + 3 * means[1]) / 4, abs=0.1)
    # With its weights the same model trains as many steps, on the same cache.
    done = here("train", config, "--dry-run", "train.packing=false", f"model.name={tiny_llama('llama31')}")
    assert done.returncode == 0, done.stderr
    assert "training  15 steps of 2 sequences" in done.stdout and "from the cache" in done.stderr
    assert "warning: data.eval: 1 of 2 samples are also in data.train (sample 2 is sample 6 there)" in done.stderr


@pytest.mark.parametrize(
    ("settings", "code", "told"),
    [
        (["data.train=none.jsonl"], 2, "none.jsonl doesn't exist"),
        (["model.name=nobody"], 2, "model.name: found 'nobody'"),
        (["data.on_too_long=error"], 2, "1 of 10 samples are longer than"),
        (["train.global_batsh=2"], 2, "nearest: global_batch"),
    ],
    ids=["no file", "no model", "a rule", "a typo"],
)
def test_a_mistake_is_told_as_train_tells_it(settings, code, told, config, here) -> None:
    done = here("data", config, *settings)
    assert done.returncode == code and told in done.stderr and done.stdout == ""
    assert done.stderr.count("error: ") == 1
