"""Columns by other names, and sets that are read differently."""

from __future__ import annotations

import pytest

from dist_lora.config.schema import DataSection
from dist_lora.data.chat import encode_sample
from dist_lora.data.columns import Reading, sources_of
from dist_lora.data.sources import read_records
from dist_lora.data.token_cache import TokenRules
from dist_lora.errors import DataError
from tests.unit.data.test_token_cache import byte_tokenizer, content, conversation, prepare, write

GSM8K = [{"question": "2 + 2?", "answer": "#### 4"}, {"question": "3 + 3?", "answer": "#### 6"}]
MAPPED = Reading(columns=(("completion", "answer"), ("prompt", "question")))


def records_of(tmp_path, rows, **columns):
    reading = Reading(columns=tuple(columns.items()))
    return read_records(write(tmp_path / "a.jsonl", rows), fmt=None, which="train", readings=(reading,))


def test_mapped_columns_are_read_by_our_names(tmp_path):
    records = records_of(tmp_path, GSM8K, prompt="question", completion="answer")
    assert records.formats == ("prompt-completion",)
    assert [records[i] for i in range(2)] == [
        {"prompt": "2 + 2?", "completion": "#### 4"},
        {"prompt": "3 + 3?", "completion": "#### 6"},
    ]


def test_a_column_that_a_mapping_displaces_is_reported_as_unused(tmp_path):
    row = {"prompt": "be nice", "question": "a", "answer": "b", "id": 7}
    records = records_of(tmp_path, [row], prompt="question", completion="answer")
    encoded = encode_sample(records[0], tokenizer=byte_tokenizer(), fmt="prompt-completion", train_on="assistant")
    assert encoded.reported == (
        "column 'prompt (not the one that is set)' is not used",
        "column 'id' is not used",
    )


def test_a_column_that_some_records_lack_may_be_mapped(tmp_path):
    rows = [{"q": "a", "a": "b"}, {"q": "a", "a": "b", "sys": "Be brief."}]
    records = records_of(tmp_path, rows, instruction="q", output="a", system="sys")
    assert records.formats == ("alpaca",)
    assert records[1] == {"instruction": "a", "output": "b", "system": "Be brief."}
    assert records[0] == {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": "question", "completion": "anser"},
            r"a.jsonl: columns: no column anser \(for completion\); found 'question', 'answer'$",
        ),
        ({"promt": "question", "completion": "answer"}, r"no column of any format is named promt \(nearest: prompt"),
        (
            {"prompt": "question", "completion": "answer", "output": "answer"},
            "no column of format prompt-completion is named output",
        ),
        ({"prompt": "question"}, "columns 'prompt', 'answer' match no known format"),
    ],
)
def test_what_is_wrong_with_a_mapping(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        records_of(tmp_path, GSM8K, **columns)


def test_sets_are_read_each_in_its_own_way_and_keep_where_they_begin(tmp_path):
    names = [
        write(tmp_path / "a.jsonl", GSM8K),
        write(tmp_path / "b.jsonl", [conversation("hi", "ho")]),
        write(tmp_path / "c.jsonl", [{"text": "once", "input_ids": [5, 6], "loss_mask": [0, 1]}]),
    ]
    rules = TokenRules(200, readings=(MAPPED, Reading(), Reading("tokens")))
    token_set = prepare(names, tmp_path / "cache", rules=rules)
    assert token_set.set_starts == (0, 2, 3)
    assert token_set.select(token_set.sample_ids[1:]).set_starts == (0, 2, 3)
    by_hand = [{"prompt": row["question"], "completion": row["answer"]} for row in GSM8K]
    plain = prepare(write(tmp_path / "d.jsonl", by_hand), tmp_path / "cache")
    assert content(token_set)[:2] == content(plain)
    assert token_set.document(3)[0].tolist() == [5, 6]
    assert prepare(names, tmp_path / "cache", rules=rules).set_starts == (0, 2, 3)  # from the cache


def test_without_sets_of_their_own_reading_the_key_of_a_cache_is_as_it_was():
    assert TokenRules(200).recipe() == {
        "sequence_length": 200,
        "format": "auto",
        "train_on": "assistant",
        "on_no_target": "error",
        "on_too_long": "truncate",
    }
    for train in ("a.jsonl", ["a.jsonl", "b.jsonl"]):
        assert sources_of(DataSection(train=train, format="text"), "train") == (train, ())
    assert sources_of(DataSection(train=[{"path": "a.jsonl"}, "b.jsonl"]), "train") == (["a.jsonl", "b.jsonl"], ())


def test_what_is_set_for_one_set_goes_before_what_is_set_for_all():
    own = {"path": "a.jsonl", "weight": 2, "format": "alpaca", "columns": {"output": "o"}}
    left_out = {"path": "c.jsonl", "weight": 0}
    section = DataSection(
        train=[own, {"path": "b.jsonl", "weight": 1}, left_out], columns={"text": "t"}, eval="e.jsonl"
    )
    assert sources_of(section, "train") == (
        ["a.jsonl", "b.jsonl"],
        (Reading("alpaca", (("output", "o"),)), Reading("auto", (("text", "t"),))),
    )
    assert sources_of(section, "eval") == ("e.jsonl", (Reading("auto", (("text", "t"),)),))
    assert section.shares() == {"a.jsonl": 2 / 3, "b.jsonl": 1 / 3, "c.jsonl": 0}
