"""Samples that a model can't take are refused with both numbers, before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dist_lora.data.model_limits import check_limits, warn_of_context
from dist_lora.data.token_set import TokenSet
from dist_lora.errors import ConfigError, DataError
from dist_lora.train.build import open_base
from dist_lora.train.command import held_out_of, tokens_of
from dist_lora.world.world import World
from tests.ranks.tiny import config_of, documents


def check(token_set: TokenSet, *, context: int = 64, vocab: int = 512) -> None:
    check_limits(token_set, which="eval", context=context, vocab=vocab, world=World.alone())


def test_a_document_may_be_as_long_as_the_context_and_one_that_is_longer_is_named() -> None:
    check(documents(seed=0, lengths=[10, 64, 3]))
    with pytest.raises(ConfigError) as raised:
        check(documents(seed=0, lengths=[10, 65, 64, 100]))
    assert str(raised.value) == (
        "data.eval: 2 of 4 samples are longer than the model's context of 64 tokens (max_position_embeddings in its "
        "config.json): the longest, sample 4, has 100. At positions that it never saw, a model's answers are arbitrary. Set "
        "train.sequence_length to 64 or less (data.on_too_long says what becomes of longer samples: truncate, drop, error), "
        "shorten the samples, or take a model with a longer context"
    )
    assert raised.value.exit_code == 2


def test_ids_that_the_model_has_no_row_for_are_told() -> None:
    ids = np.array([0, 7, 12, 3], np.uint32)
    tokens = TokenSet(ids, ids > 0, np.array([0]), np.array([4]), np.array([3]), np.array([0]))
    check(tokens, vocab=13)
    with pytest.raises(DataError) as raised:
        check(tokens, vocab=12)
    assert "data.eval: the tokenizer writes id 12 and the model has 12 rows (ids 0 to 11)" in str(raised.value)


def test_a_sequence_longer_than_the_context_is_said_before_data_are_read(caplog) -> None:
    warn_of_context(sequence_length=64, context=64, world=World.alone())
    assert not caplog.records
    warn_of_context(sequence_length=4096, context=64, world=World.alone())
    assert [record.message for record in caplog.records] == [
        "train.sequence_length: 4,096 is more than the model's context of 64 tokens (max_position_embeddings): shorter "
        "samples may be packed together, and a sample that is longer than the context will be refused"
    ]


@pytest.fixture
def short(tiny_llama, tmp_path) -> Path:
    """A model with a context of 48 tokens; its own RoPE is scaled, from 16."""
    folder = tmp_path / "short"
    folder.mkdir()
    for file in tiny_llama("llama31").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 48
    config["rope_parameters"]["original_max_position_embeddings"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_train_and_eval_refuse_long_samples_and_take_them_truncated_or_packed(short, tmp_path) -> None:
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": "b" * 30}) + "\n" for _ in range(4)))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a" * 60}) + "\n")
    data = {
        "train": str(tmp_path / "short.jsonl"),
        "eval": str(tmp_path / "long.jsonl"),
        "cache_dir": str(tmp_path / "c"),
    }
    packed = config_of(short, data=data, train={"sequence_length": 200, "packing": True})
    base = open_base(packed, World.alone())
    for tokens in (tokens_of, held_out_of):
        with pytest.raises(
            ConfigError, match=r"data\.eval: 1 of 1 samples are longer than the model's context of 48 tokens"
        ):
            tokens(packed, base, World.alone())
    truncated = config_of(short, data=data, train={"sequence_length": 48})
    assert tokens_of(truncated, base, World.alone())[1][""].lengths.tolist() == [48]
    alone = config_of(short, data={**data, "eval": None}, train={"sequence_length": 200, "packing": True})
    assert tokens_of(alone, base, World.alone())[0].lengths.max() < 48
