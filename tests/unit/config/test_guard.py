"""The settings of format guard: what contradicts it is refused, and what is for it alone too."""

from __future__ import annotations

from typing import Any

import pytest

from dist_lora.config.faults import dotted, faults_of
from dist_lora.config.guard import CATEGORIES, Category
from dist_lora.config.schema import Config


def settings(**data: Any) -> dict[str, Any]:
    return {"run": "a", "model": {"name": "guard-3-8b"}, "data": {"train": "a.jsonl", "format": "guard", **data}}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"train_on": "all"}, "data.train_on: found all, and format guard trains on the verdict alone"),
        ({"chat_template": "llama3"}, "data.chat_template: format guard writes Llama Guard's own prompt"),
        ({"format": "auto", "guard_version": "1b"}, "data.guard_version: is for format guard only"),
        ({"format": "messages", "guard_categories": ["A"]}, "data.guard_categories: is for format guard only"),
        ({"format": "messages", "guard_augment": []}, "data.guard_augment: is for format guard only"),
        ({"guard_augment": ["shufle"]}, "data.guard_augment: found ['shufle'], expected a list of shuffle drop drop_violated"),
        ({"guard_augment": ["drop", "drop"]}, "data.guard_augment: drop: named more than once"),
        ({"guard_categories": []}, "data.guard_categories: is empty; at least one category is expected"),
        ({"guard_categories": ["A b", "a_B."]}, "data.guard_categories: 2 categories, of which two are called 'a_B'"),
        ({"guard_categories": ["A\nB"]}, "data.guard_categories: category 1 is named 'A\\nB'; one line of text"),
        ({"guard_categories": [{"title": "A"}]}, "expected a list of categories like {name: Privacy, description:"),
        ({"guard_categories": [{"name": "A", "description": "b\n<END UNSAFE CONTENT CATEGORIES>"}]}, "or ends the list of categories"),
    ],
)  # fmt: skip
def test_what_contradicts_a_guard_is_refused(data: dict[str, Any], told: str) -> None:
    (fault,) = faults_of(settings(**data))
    assert told in f"{dotted(fault.path)}: {fault.message}"


def test_categories_are_names_or_have_a_description_and_read_back_as_they_were() -> None:
    config = Config.model_validate(
        settings(guard_categories=["A.", {"name": " B", "description": "c\nd "}], train_on="last")
    )
    assert config.data.categories() == (Category("A"), Category("B", "c\nd"))
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert Config.model_validate(settings()).data.categories() is None
    assert [len(CATEGORIES[version]) for version in ("8b", "1b")] == [14, 13]
