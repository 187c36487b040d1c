"""The hashes of a user's own code that a run keeps, and the warning where a resume has another one."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_lora.config.schema import Config
from dist_lora.train.own_code import own_code_facts, warn_of_other_code


def test_a_resume_with_another_source_warns_and_the_same_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_of_a_run.py").write_text("one = 1\n")
    config = Config.model_validate(
        {
            "run": "a",
            "model": {"name": "b"},
            "data": {"train": "c", "format": "own_of_a_run:f"},
            "train": {"callbacks": ["own_of_a_run:C"]},
        }
    )
    facts = own_code_facts(config)
    first = hashlib.sha256(b"one = 1\n").hexdigest()
    assert facts == {"own_code": {"data.format own_of_a_run:f": first, "train.callbacks own_of_a_run:C": first}}
    checkpoint = SimpleNamespace(path=Path("step-1"), manifest=SimpleNamespace(progress=facts))
    with caplog.at_level(logging.WARNING, "dist_lora"):
        warn_of_other_code(checkpoint, config)
        assert caplog.messages == []
        (tmp_path / "own_of_a_run.py").write_text("one = 2\n")
        warn_of_other_code(checkpoint, config)
        for progress in ({}, {"own_code": "damaged"}):  # nothing was named then, or nothing can be read
            warn_of_other_code(SimpleNamespace(path=Path("s"), manifest=SimpleNamespace(progress=progress)), config)
    second = hashlib.sha256(b"one = 2\n").hexdigest()
    assert caplog.messages == [
        "step-1 was saved with other code of your own, by its SHA-256: "
        f"data.format own_of_a_run:f ({first[:12]} then, {second[:12]} now); "
        f"train.callbacks own_of_a_run:C ({first[:12]} then, {second[:12]} now)"
    ]
    assert own_code_facts(config.model_copy(update={"data": config.data.model_copy(update={"format": "text"})}))[
        "own_code"
    ].keys() == {"train.callbacks own_of_a_run:C"}
