"""Predictions of all ranks stand in one file in the order of the samples, which is never written over."""

from __future__ import annotations

import json

import pytest

from dist_lora.errors import ConfigError
from dist_lora.evaluation.predictions import Prediction, Predictions
from dist_lora.world.world import World


def test_one_rank_writes_its_own_in_order(tmp_path) -> None:
    own = {i: Prediction(f"p{i}", "e", "g", False) for i in (2, 0, 1)}
    Predictions(tmp_path / "a.jsonl", own).write(World.alone())
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["p0", "p1", "p2"]
    assert lines[0] == {"prompt": "p0", "expected": "e", "generated": "g", "is_correct": False}


def test_an_existing_file_and_a_missing_folder_are_refused(tmp_path) -> None:
    (tmp_path / "a").touch()
    for name, told in (("a", "exists already"), ("b/a", "its folder: no such folder")):
        with pytest.raises(ConfigError, match=told):
            Predictions(tmp_path / name).refuse_existing()
