"""What may change when a run resumes."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from dist_lora.config.changes import RULES, Change, changes, flat, markdown, rule_of
from dist_lora.config.schema import Config
from tests import ROOT


def settings_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += settings_of(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def test_every_setting_has_its_rule_and_every_rule_a_setting() -> None:
    names = settings_of(Config)
    assert len(names) > 40
    assert [name for name in names if rule_of(name) is None] == []
    ruled = [setting for rule in RULES for setting in rule.settings]
    assert [s for s in ruled if not any(name == s or name.startswith(f"{s}.") for name in names)] == []


@pytest.mark.parametrize(
    "name, effect",
    [("train.steps", "logged"), ("optim.lr", "logged"), ("parallel.engine", "free"), ("model.quant", "refused"),
     ("train.seed", "refused"), ("lora.rank", "refused"), ("run", "free"), ("runs_dir", "free")],
)  # fmt: skip
def test_the_rule_of_a_setting(name: str, effect: str) -> None:
    rule = rule_of(name)
    assert rule is not None and rule.effect == effect


def test_a_name_that_begins_like_a_setting_has_not_its_rule() -> None:
    assert rule_of("running") is None and rule_of("train.stepsize") is None


def test_changes_are_named_with_both_values_and_a_setting_of_another_version_is_none() -> None:
    before = {"lora": {"rank": 4, "gone": 1}, "data": {"train": ["a", "b"]}}
    now = {"lora": {"rank": 8, "new": 2}, "data": {"train": ["a", "b"]}}
    assert changes(before, now) == [Change("lora.rank", 4, 8)]
    assert str(changes(before, now)[0]) == "lora.rank: 4 -> 8"
    assert flat(before) == {"lora.rank": 4, "lora.gone": 1, "data.train": ["a", "b"]}


def test_the_table_of_the_documents_is_this_one() -> None:
    assert markdown() in (ROOT / "docs/resume.md").read_text()


def test_columns_are_one_value_of_which_none_is_another() -> None:
    before, now = {"data": {"columns": None}}, {"data": {"columns": {"prompt": "question"}}}
    assert [(change.name, change.now) for change in changes(before, now)] == [("data.columns", {"prompt": "question"})]
