"""Records of token ids: taken as they are, with the targets that they say, or refused by what is wrong."""

from __future__ import annotations

import pytest

from dist_lora.data.chat import encode_sample
from dist_lora.data.token_cache import TokenRules
from dist_lora.errors import DataError
from tests.unit.data.test_token_cache import byte_tokenizer, conversation, prepare, write

IDS = [256, 5, 6, 7, 260]  # 256 is this tokenizer's <|begin_of_text|>


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def encoded(record, tokenizer, *, train_on="assistant", vocab=None):
    return encode_sample(record, tokenizer=tokenizer, fmt="tokens", train_on=train_on, vocab=vocab)


@pytest.mark.parametrize(
    "said",
    [
        {"labels": [-100, -100, 6, 7, 260]},
        {"loss_mask": [0, 0, 1, 1, 1]},
        {"assistant_masks": [False, False, True, True, True]},
        {"completion_mask": "[0, 0, 1, 1, 1]", "attention_mask": [1] * 5, "position_ids": list(range(5))},
        {"labels": [-100, -100, 6, 7, 260], "loss_mask": [0, 0, 1, 1, 1]},
    ],
)
def test_ids_stay_and_targets_are_those_of_the_record(tokenizer, said):
    found = encoded({"input_ids": IDS, **said}, tokenizer)
    assert (found.ids, found.is_target, found.reported) == (IDS, [False, False, True, True, True], ())
    assert found.kind is None


def test_a_chat_written_as_ids_and_labels_is_the_chat(tokenizer):
    chat = encode_sample(conversation("2+2?", "4"), tokenizer=tokenizer, fmt="messages", train_on="assistant")
    labels = [token if is_target else -100 for token, is_target in zip(chat.ids, chat.is_target, strict=True)]
    found = encoded({"input_ids": chat.ids, "labels": labels}, tokenizer)
    assert (found.ids, found.is_target) == (chat.ids, chat.is_target)


def test_all_are_targets_where_that_is_set_and_what_is_not_used_is_reported(tokenizer):
    found = encoded({"input_ids": [5, 6], "length": 2}, tokenizer, train_on="all")
    assert found.is_target == [False, True]
    assert found.reported == (
        "column 'length' is not used",
        "input_ids doesn't begin with the model's first token, 256",
    )


@pytest.mark.parametrize(
    ("record", "train_on", "message"),
    [
        ({"input_ids": []}, "all", "input_ids is empty"),
        ({"input_ids": "5"}, "all", "input_ids is 5; a list of whole numbers is expected"),
        ({"input_ids": [5, "6"]}, "all", r'input_ids\[1\] is "6"; a whole number is expected'),
        ({"input_ids": [5, True]}, "all", r"input_ids\[1\] is true; a whole number is expected"),
        ({"input_ids": [5, -6]}, "all", r"input_ids\[1\] is -6, which is no id"),
        ({"input_ids": [5, 300]}, "all", r"input_ids\[1\] is 300, and the model has 261 tokens \(ids 0 to 260\)"),
        ({"input_ids": [5, 6]}, "assistant", "input_ids has neither labels nor a mask .* or set data.train_on: all"),
        ({"input_ids": [5, 6], "labels": [-100, 6]}, "last", "data.train_on: last: ids don't say where a turn begins"),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, "all", "the record leaves out 1 of 3 tokens"),
        ({"input_ids": [5, 6], "labels": [6]}, "assistant", "input_ids has 2 entries and labels 1; as many are expected"),
        ({"input_ids": [5, 6], "labels": [5, 7]}, "assistant", r"labels\[1\] is 7; the id at its place, 6, or -100 is expected$"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "assistant", "they are shifted by one, and transformers' labels aren't"),
        ({"input_ids": [5, 6], "loss_mask": [0, 2]}, "assistant", r"loss_mask\[1\] is 2; 0 or 1 is expected"),
        (
            {"input_ids": [5, 6], "labels": [-100, 6], "loss_mask": [0, 0]},
            "assistant",
            "loss_mask and labels contradict each other at entry 1",
        ),
        ({"input_ids": [5, 6], "loss_mask": [0, 1], "attention_mask": [1, 0]}, "assistant", "attention_mask isn't 1 at 1 of 2"),
        ({"input_ids": [5, 6], "loss_mask": [0, 1], "position_ids": [0, 0]}, "assistant", "position_ids doesn't count from 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_record(tokenizer, record, train_on, message):
    with pytest.raises(DataError, match=message):
        encoded(record, tokenizer, train_on=train_on, vocab=261)


def test_the_cache_names_the_record_of_an_unknown_id_and_a_sample_without_targets(tmp_path):
    rows = [{"input_ids": IDS, "labels": IDS}, {"input_ids": [256, 999], "labels": [256, 999]}]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"1 of 2 records are broken:\n  .*a.jsonl:2: input_ids\[1\] is 999"):
        prepare(file, tmp_path / "cache", vocab=261)
    file = write(tmp_path / "b.jsonl", [{"input_ids": IDS, "labels": [-100] * 5}])
    with pytest.raises(DataError, match="1 of 1 samples have no target tokens"):
        prepare(file, tmp_path / "cache", vocab=261)
    long = write(tmp_path / "c.jsonl", [{"input_ids": IDS * 3, "loss_mask": [1] * 15}])
    cut = prepare(long, tmp_path / "cache", vocab=261, rules=TokenRules(sequence_length=7))
    assert (cut.lengths.tolist(), cut.num_targets.tolist(), cut.kinds) == ([7], [6], ())
