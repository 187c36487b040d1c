"""A format of the user's own makes our records, and says which of theirs it can't; another source is tokenized again."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lora.data.token_cache import TokenRules, prepare_tokens
from dist_lora.data.token_set import TokenSet
from dist_lora.errors import DataError
from dist_lora.world.world import World
from tests import own
from tests.unit.data.test_token_cache import RULES, byte_tokenizer


def tokens_of(records: list[dict], fmt: str, folder: Path) -> TokenSet:
    file = folder / f"{abs(hash(json.dumps(records)))}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    rules: TokenRules = replace(RULES, format=fmt)
    return prepare_tokens(
        str(file),
        which="train",
        rules=rules,
        tokenizer=byte_tokenizer(),
        tokenizer_hash="it",
        cache_dir=folder / "cache",
        world=World.alone(),
    )


def cached(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cache" / "tokens").iterdir() if path.is_dir()}


def test_records_of_ones_own_become_the_tokens_of_the_records_that_the_function_makes(tmp_path: Path) -> None:
    theirs = [{"q": f"say {i}", "a": f"{i}" * (i + 1), "more": [i]} for i in range(5)]
    found = tokens_of(theirs, "tests.own:chat", tmp_path)
    expected = tokens_of([own.chat(record) for record in theirs], "messages", tmp_path)
    assert list(found.ids) == list(expected.ids) and list(found.is_target) == list(expected.is_target)
    assert found.kinds == expected.kinds == ("chat",)


def test_each_record_that_the_function_cannot_take_is_named(tmp_path: Path) -> None:
    records = [{"q": "a"}, {"a": 1}, {"q": "odd"}, {"q": "b"}]
    with pytest.raises(DataError) as caught:
        tokens_of(records, "tests.own:text_or_nothing", tmp_path)
    head, nothing, odd = str(caught.value).splitlines()
    assert head == "data.train: 2 of 4 records are broken:"
    assert ".jsonl:2: tests.own:text_or_nothing returned None; a record is expected, e.g. {" in nothing
    assert ".jsonl:3: tests.own:text_or_nothing returned a record whose columns 'odd' match no known format" in odd
    line = inspect.getsourcelines(own.chat)[1] + 2
    with pytest.raises(DataError, match=rf"\.jsonl:1: tests\.own:chat raised KeyError: 'a' \(.*tests/own\.py:{line}\)"):
        tokens_of([{"q": "a"}], "tests.own:chat", tmp_path)


def test_another_source_of_the_module_is_tokenized_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "format_that_changes.py"
    module.write_text("def text(record):\n    return {'text': record['q']}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    records = [{"q": "a"}]
    tokens_of(records, "format_that_changes:text", tmp_path)
    first = cached(tmp_path)
    tokens_of(records, "format_that_changes:text", tmp_path)
    assert cached(tmp_path) == first and len(first) == 1
    module.write_text(module.read_text() + "# another\n")
    tokens_of(records, "format_that_changes:text", tmp_path)
    assert len(cached(tmp_path)) == 2
    sys.modules.pop("format_that_changes")
