"""The quickstart's data: what is measured on it is true only if nothing of the answers was seen before."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

SCRIPT = ROOT / "launch" / "quickstart_data.py"

Data = tuple[list[Any], list[Any]]  # the samples of train.jsonl and of eval.jsonl


def make(folder: Path, *arguments: str) -> Data:
    command = [sys.executable, SCRIPT, "--out", folder, *arguments]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    train, held_out = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("train.jsonl", "eval.jsonl")
    )
    return train, held_out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return make(tmp_path_factory.mktemp("quickstart") / "made" / "on the way")


def request_of(sample: Any) -> str:
    return str(sample["messages"][1]["content"])


def call_of(sample: Any) -> Any:
    return json.loads(sample["messages"][2]["content"])


def test_every_sample_is_a_system_line_a_request_and_one_json_call(data: Data) -> None:
    for sample in data[0] + data[1]:
        assert list(sample) == ["messages"]
        assert [message["role"] for message in sample["messages"]] == ["system", "user", "assistant"]
        assert list(call_of(sample)) == ["name", "arguments"]


def test_every_argument_stands_literally_in_the_request(data: Data) -> None:
    for sample in data[0] + data[1]:
        for value in call_of(sample)["arguments"].values():
            assert str(value) in request_of(sample), sample


def test_no_argument_of_the_evaluation_occurs_in_the_training(data: Data) -> None:
    seen, held_out = (
        {str(value) for sample in samples for value in call_of(sample)["arguments"].values()} for samples in data
    )
    assert not seen & held_out
    assert len(seen) > 300
    assert len(held_out) > 50


def test_no_request_occurs_twice(data: Data) -> None:
    requests = [request_of(sample) for sample in data[0] + data[1]]
    assert len(requests) == len(set(requests))


def test_all_phrasings_are_asked_equally_often(data: Data) -> None:
    def phrasing(sample: Any) -> str:
        text = request_of(sample)
        for name, value in call_of(sample)["arguments"].items():
            text = text.replace(str(value), f"<{name}>")
        return text

    for samples in data:
        counts = Counter(phrasing(sample) for sample in samples)
        assert len(counts) == 35
        assert max(counts.values()) - min(counts.values()) <= 1


def test_more_requests_than_there_are_is_said_and_not_tried_for_ever(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--out", tmp_path, "--eval", "9999"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"quickstart_data: \d+ distinct requests exist; ask for fewer\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", "0"), ("again", "0"), ("other", "1")):
        make(tmp_path / name, "--seed", seed)
    for file in ("train.jsonl", "eval.jsonl"):
        one, again, other = ((tmp_path / name / file).read_bytes() for name in ("one", "again", "other"))
        assert one == again
        assert one != other


def test_the_number_of_samples_is_what_is_asked_for(tmp_path: Path) -> None:
    train, held_out = make(tmp_path, "--train", "9", "--eval", "3")
    assert (len(train), len(held_out)) == (9, 3)


@pytest.mark.slow
def test_samples_are_short_in_smollm2s_tokens(data: Data, smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lengths = [len(tokenizer.apply_chat_template(sample["messages"], return_dict=False)) for sample in data[0]]
    assert max(lengths) <= 128
    assert sum(lengths) / len(lengths) <= 110
